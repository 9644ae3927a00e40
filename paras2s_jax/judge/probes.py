"""Judging the judge: answers whose order of merit is known, and how often the judge finds it."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jiwer
import numpy as np

from paras2s_jax.audio import styles
from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.data import speaking
from paras2s_jax.data.bank import Bank
from paras2s_jax.data.records import Query, Response, Verdict
from paras2s_jax.data.tokenizer import normalize
from paras2s_jax.judge.chain import Judge

# What each kind of answer deserves: any higher rank must score above any lower one.
# wrong_style: fitting words in a tone that clashes with them.
# wrong_words: the words for the other style, in the tone for this one.
RANKS = {"fitting": 3, "wrong_style": 2, "wrong_words": 1, "noise": 0, "silence": 0}
SPOKEN = ("fitting", "wrong_style", "wrong_words")
# A model that plays the query back. It says no answer in the very voice of the user; where it
# stands among the others is open, but for the fitting answers, which are above it.
ECHO = "echo"

NOISE_DUR_S = 1.5
NOISE_RMS = 0.05

Resynthesize = Callable[[Sequence[np.ndarray]], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Probe:
    """One answer to a query, of a known kind."""

    kind: str
    query: Query
    response: Response
    wav: Path


def build(
    queries: Sequence[Query],
    bank: Bank,
    out_dir: Path,
    *,
    seed: int = 0,
    maker: speaking.Maker = speaking.ESPEAK,
    num_workers: int = 1,
    resynthesize: Resynthesize | None = None,
) -> list[Probe]:
    """Writes the answers' waves; five probes per query.

    Args:
        queries: of the dimensions that have two styles.
        maker: of `speaking.maker_of`.
        resynthesize: passes waves through a codec, so that probes sound like a policy.
    """
    clips = [_spoken_clip(kind, query, bank, seed) for query in queries for kind in SPOKEN]
    responses, _ = speaking.speak(clips, out_dir, maker, num_workers=num_workers)
    waves = {}
    if resynthesize is not None:
        responses, waves = _resynthesized(responses, out_dir, resynthesize)
    for query in queries:
        for kind, wave in _wordless(seed, query).items():
            wav = f"wavs/probes/{query.id}-{kind}.wav"
            responses.append(_response(kind, query, "", None, wav, len(wave)))
            waves[wav] = wave
    for wav, wave in waves.items():
        wave_lib.save(out_dir / wav, wave, wave_lib.RATE_HZ)
    by_id = {query.id: query for query in queries}
    return [
        Probe(_kind(response), by_id[response.query_id], response, out_dir / response.wav)
        for response in responses
    ]


def run(
    judge: Judge,
    probes: Sequence[Probe],
    query_dir: Path,
    *,
    use_labels: bool = False,
) -> tuple[dict[str, float], list[Verdict]]:
    """Judges the probes, and an echo of each query.

    Returns: the figures of `figures_of`, and the verdicts in order, those on echoes last.
    """
    queries = {probe.query.id: probe.query for probe in probes}
    probes = [*probes, *(_echo(query, query_dir) for query in queries.values())]
    pairs = [
        (probe.query, query_dir / probe.query.wav, probe.response, probe.wav) for probe in probes
    ]
    verdicts = judge.judge(pairs, use_labels=use_labels)
    return figures_of(probes, verdicts), verdicts


def figures_of(probes: Sequence[Probe], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The judge's card.

    judge/probe_order: share of pairs within a query, of different rank, scored in the right order
        (a tie or a failed verdict is a wrong one); judge/echo_order: share of queries whose
        fitting answer is above their echo; judge/probe/<kind>: mean score;
    judge/probe_failed: share of failed verdicts;
    judge/style_accuracy, judge/tone_accuracy, judge/word_error: of the stages, where the truth is
        known (word_error over the spoken probes, after normalisation) and they were run.
    """
    by_query: dict[str, dict[str, float]] = {}
    for probe, verdict in zip(probes, verdicts, strict=True):
        by_query.setdefault(probe.query.id, {})[probe.kind] = verdict.score
    ranked = [{kind: kinds[kind] for kind in RANKS if kind in kinds} for kinds in by_query.values()]
    echoed = [kinds for kinds in by_query.values() if ECHO in kinds]
    figures = {
        "judge/probe_order": order_share(ranked),
        "judge/echo_order": _mean([kinds["fitting"] > kinds[ECHO] for kinds in echoed]),
    }
    for kind in (*RANKS, ECHO):
        scores = [kinds[kind] for kinds in by_query.values() if kind in kinds]
        figures[f"judge/probe/{kind}"] = _mean([s for s in scores if not math.isnan(s)])
    figures["judge/probe_failed"] = _mean([math.isnan(verdict.score) for verdict in verdicts])
    heard = [(probe, verdict) for probe, verdict in zip(probes, verdicts) if verdict.status == "ok"]
    spoken = [(probe, verdict) for probe, verdict in heard if probe.kind in SPOKEN]
    figures["judge/style_accuracy"] = _mean(
        [v.style_in == p.query.style for p, v in heard if v.style_source == "analyzer"]
    )
    figures["judge/tone_accuracy"] = _mean(
        [v.tone_out == p.response.tone for p, v in spoken if "tone" in v.raw]
    )
    words = [
        (normalize(p.response.text), normalize(v.transcript_out))
        for p, v in spoken
        if "transcribe answer" in v.raw
    ]
    figures["judge/word_error"] = jiwer.wer(*map(list, zip(*words))) if words else math.nan
    return figures


def order_share(scores: Sequence[Mapping[str, float]]) -> float:
    """Share of well ordered pairs. scores: per query, kind → score (NaN = failed)."""
    right = [
        kinds[better] > kinds[worse]
        for kinds in scores
        for better, worse in itertools.permutations(kinds, 2)
        if RANKS[better] > RANKS[worse]
    ]
    return _mean(right)


def _spoken_clip(kind: str, query: Query, bank: Bank, seed: int) -> speaking.Clip:
    rng = speaking.rng_of(seed, "probes", query.id, kind)
    tones = bank.rubric[query.dimension, query.style].tones
    style = query.contrast if kind == "wrong_words" else query.style
    tone = min(tones, key=tones.get) if kind == "wrong_style" else max(tones, key=tones.get)
    text = rng.choice(bank.answers[query.dimension, style]).item()
    return speaking.Clip(
        row=_response(kind, query, text, tone, "", 0),
        folder="probes",
        name=f"{query.id}-{kind}",
        text=text,
        delivery=styles.tone_delivery(tone, rng),
    )


def _echo(query: Query, query_dir: Path) -> Probe:
    response = Response(query.id, f"probe_{ECHO}", 0, query.text, query.wav, dur_s=query.dur_s)
    return Probe(ECHO, query, response, query_dir / query.wav)


def _wordless(seed: int, query: Query) -> dict[str, np.ndarray]:
    rng = speaking.rng_of(seed, "probes", query.id, "noise")
    num_samples = round(NOISE_DUR_S * wave_lib.RATE_HZ)
    noise = NOISE_RMS * rng.standard_normal(num_samples).astype(np.float32)
    return {"noise": noise, "silence": np.zeros(num_samples, np.float32)}


def _resynthesized(
    responses: Sequence[Response], out_dir: Path, resynthesize: Resynthesize
) -> tuple[list[Response], dict[str, np.ndarray]]:
    """Returns: the responses with new wav paths, and the waves to write there."""
    originals = [wave_lib.load(out_dir / response.wav) for response in responses]
    renamed, waves = [], {}
    for response, wave in zip(responses, resynthesize(originals), strict=True):
        wav = response.wav.replace("wavs/probes/", "wavs/probes_resynthesized/", 1)
        dur_s = round(len(wave) / wave_lib.RATE_HZ, 4)
        renamed.append(dataclasses.replace(response, wav=wav, dur_s=dur_s))
        waves[wav] = wave
    return renamed, waves


def _response(
    kind: str, query: Query, text: str, tone: str | None, wav: str, len_samples: int
) -> Response:
    return Response(
        query_id=query.id,
        system=f"probe_{kind}",
        sample=0,
        text=text,
        wav=wav,
        tone=tone,
        dur_s=round(len_samples / wave_lib.RATE_HZ, 4),
    )


def _kind(response: Response) -> str:
    return response.system.removeprefix("probe_")


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan
