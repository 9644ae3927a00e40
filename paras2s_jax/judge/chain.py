"""The judge: transcribe · name the style · name the tone · score, each stage stored in a ledger."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from paras2s_jax.data.records import DIMENSIONS, Query, Response, Verdict
from paras2s_jax.judge.interfaces import (
    Failure,
    Heard,
    Item,
    Score,
    Scorer,
    Sounds,
    Stage,
    Transcriber,
    Transcript,
    WaveCaptioner,
    WaveNamer,
    WaveScorer,
)
from paras2s_jax.judge.ledger import Ledger, digest, ledger_key
from paras2s_jax.judge.stored_scores import (
    Pending,
    StoredScores,
    replayed_failures,
    store_failures,
)
from paras2s_jax.judge.waves import hash_or_failure, load_or_failure, too_long

Pair = tuple[Query, Path, Response, Path]

# Of the stage that names the style of a dimension.
STYLE_PREFIX = "style "
# Waves held in memory at once, and rows lost at most when a run is cut off.
WAVES_PER_CHUNK = 512


@dataclasses.dataclass(frozen=True)
class Named:
    """A name that a stage gave a wave, with the probability of every name it may give.

    A captioner chooses freely: it has none.
    """

    label: str
    probs: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class _Listener:
    """A stage that hears single waves, in the form the chain runs and the ledger stores.

    run: waves -> parts of their outputs by index; each part is stored as it comes.
    """

    stage: str
    model: Stage
    max_dur_s: float
    run: Callable[[Sequence[np.ndarray]], Iterable[Mapping[int, dict[str, Any] | Failure]]]
    parse: Callable[[dict[str, Any]], Any]

    def key(self, wav_hash: str) -> str:
        return ledger_key(self.stage, wav_hash, self.model.model_id, self.model.settings)


class Judge:
    """Scores pairs of a spoken query and a spoken answer.

    What a stage cannot do for one pair (a wav that is missing, empty, not finite, or too long; an
    answer that the scorer cannot score) makes that verdict NaN, with the stage and the reason as
    its status. Silence and noise are not failures: no words are heard in them, which scores 1.

    Args:
        transcriber: waves → words, for queries and answers.
        style_analyzers: per dimension, query waves → style.
        tone_namer: answer waves → tone of voice, from a list or in free words.
        scorer: words and names → score, or both waves → score. For the latter, what the other
            stages find only goes into the verdict beside the score; they may be None.
        ledger: where stage outputs are kept; a wav is heard once however often it is judged.
        num_repeats: how often each pair is scored; the verdict has the mean, `raw` the answers.
        progress: shows a progress bar.
        replay: takes everything from the ledger; no stage runs (see `judge.replay`).
    """

    def __init__(
        self,
        transcriber: Transcriber | None,
        style_analyzers: Mapping[str, WaveNamer],
        tone_namer: WaveNamer | WaveCaptioner | None,
        scorer: Scorer | WaveScorer,
        ledger: Ledger,
        *,
        num_repeats: int = 1,
        progress: bool = True,
        waves_per_chunk: int = WAVES_PER_CHUNK,
        replay: bool = False,
    ):
        self._replay = replay
        self._scores = StoredScores(
            scorer, ledger, num_repeats=num_repeats, progress=progress, replay=replay
        )
        self._ledger = ledger
        self._progress = progress
        self._waves_per_chunk = waves_per_chunk
        if None in (transcriber, tone_namer) and not self._scores.wants_waves:
            raise ValueError(f"{scorer.name} scores words and tones: name who hears them.")
        self._listeners = {}
        if transcriber is not None:
            self._listeners["transcribe"] = _transcribe_listener(transcriber)
        if tone_namer is not None:
            self._listeners["tone"] = _tone_listener(tone_namer)
        for dimension, analyzer in style_analyzers.items():
            stage = _style_stage(dimension)
            self._listeners[stage] = _naming_listener(stage, analyzer)
        self.name = f"{scorer.name}-{scorer.version}-{digest(self.describe())[:12]}"

    def describe(self) -> dict[str, Any]:
        """Every stage's model and settings: what `name` stands for in a table."""
        stages = {
            stage: {
                "model": listener.model.model_id,
                "settings": dict(listener.model.settings),
            }
            for stage, listener in self._listeners.items()
        }
        return {**stages, "score": self._scores.describe()}

    def judge(self, pairs: Sequence[Pair], *, use_labels: bool = False) -> list[Verdict]:
        """One verdict per pair, in order.

        Args:
            pairs: (query, its wav, response, its wav).
            use_labels: take the query's style from its label instead of from the analyzer.
        """
        findings = self._find(pairs, use_labels)
        scores = self._scores.get([found.item for found in findings if found.item is not None])
        return [
            found.verdict(self.name, None if found.item is None else scores[found.item])
            for found in findings
        ]

    def pending(self, pairs: Sequence[Pair], *, use_labels: bool = False) -> dict[str, Pending]:
        """Ledger key -> what is still to be scored, after all other stages have run.

        For scorers that answer much later (batch files); arguments as in `judge`.
        """
        findings = self._find(pairs, use_labels)
        return self._scores.pending([found.item for found in findings if found.item is not None])

    def _find(self, pairs: Sequence[Pair], use_labels: bool) -> list["_Findings"]:
        """Runs the listening stages."""
        stages_in = [self._stages_in(query, use_labels) for query, *_ in pairs]
        stages_out = [stage for stage in ("transcribe", "tone") if stage in self._listeners]
        wanted: dict[tuple[Path, str], None] = {}  # An ordered set.
        for (_, path_in, _, path_out), stages in zip(pairs, stages_in):
            wanted.update(dict.fromkeys((path_in, stage) for stage in stages))
            wanted.update(dict.fromkeys((path_out, stage) for stage in stages_out))
        hashes = {path: hash_or_failure(path) for pair in pairs for path in (pair[1], pair[3])}
        outputs = self._listen(wanted, hashes)
        sounds = hashes if self._scores.wants_waves else None
        return [
            _Findings.gather(pair, stages, outputs, sounds)
            for pair, stages in zip(pairs, stages_in)
        ]

    def _stages_in(self, query: Query, use_labels: bool) -> tuple[str, ...]:
        words = tuple(stage for stage in ("transcribe",) if stage in self._listeners)
        if use_labels or query.dimension not in DIMENSIONS:
            return words
        stage = _style_stage(query.dimension)
        if stage not in self._listeners:
            if self._scores.wants_waves:
                return words
            raise ValueError(
                f"the judge has no style analyzer for the dimension {query.dimension} of query "
                f"{query.id}; train one (stage analyzers) or judge with use_labels=True."
            )
        return (*words, stage)

    def _listen(
        self, wanted: Iterable[tuple[Path, str]], hashes: Mapping[Path, str | Failure]
    ) -> dict[tuple[Path, str], Any]:
        """wanted: (wav path, stage). Returns, for each, the stage's output, or a Failure."""
        wanted = list(wanted)
        # Files with the same bytes are heard once, through the last of their paths.
        path_of = {wav: path for path, wav in hashes.items() if not isinstance(wav, Failure)}
        keys = {
            (wav, stage): self._listeners[stage].key(wav)
            for wav, stage in ((hashes[path], stage) for path, stage in wanted)
            if not isinstance(wav, Failure)
        }
        results = self._ledger.get_many(keys.values())
        missing = {key: place for place, key in keys.items() if key not in results}
        if self._replay:
            results.update(replayed_failures(self._ledger, list(missing)))
        else:
            todo: dict[Path, dict[str, str]] = {}
            for key, (wav, stage) in missing.items():
                todo.setdefault(path_of[wav], {})[stage] = key
            results.update(self._hear(todo))
        outputs = {}
        for path, stage in wanted:
            wav = hashes[path]
            value = wav if isinstance(wav, Failure) else results[keys[wav, stage]]
            parse = self._listeners[stage].parse
            outputs[path, stage] = value if isinstance(value, Failure) else parse(value)
        return outputs

    def _hear(self, todo: Mapping[Path, Mapping[str, str]]) -> dict[str, Any]:
        """Runs stages on waves, chunk by chunk. todo: path → stage → key. Returns key → output."""
        results: dict[str, Any] = {}
        paths = list(todo)
        with tqdm(
            total=len(paths), desc="judge: listen", unit="wav", disable=not self._progress
        ) as bar:
            for start in range(0, len(paths), self._waves_per_chunk):
                chunk = paths[start : start + self._waves_per_chunk]
                waves = {path: load_or_failure(path) for path in chunk}
                for stage, listener in self._listeners.items():
                    batch = {
                        todo[path][stage]: waves[path] for path in chunk if stage in todo[path]
                    }
                    results.update(self._run(listener, batch))
                bar.update(len(chunk))
        return results

    def _run(
        self, listener: _Listener, batch: Mapping[str, np.ndarray | Failure]
    ) -> dict[str, Any]:
        """Runs one stage on one chunk and stores what it found. batch: key → wave."""
        results: dict[str, Any] = {}
        fit = {}
        for key, wave in batch.items():
            unfit = wave if isinstance(wave, Failure) else too_long(wave, listener.max_dur_s)
            if unfit is None:
                fit[key] = wave
            else:
                results[key] = unfit
        self._store(listener.stage, results)
        keys = list(fit)
        for part in listener.run(list(fit.values())) if fit else ():
            found = {keys[index]: output for index, output in part.items()}
            self._store(listener.stage, found)
            results.update(found)
        return results

    def _store(self, stage: str, results: Mapping[str, Any]) -> None:
        """Failures are only noted: a file may be repaired and a server may come back."""
        failures = {key: value for key, value in results.items() if isinstance(value, Failure)}
        outputs = {key: value for key, value in results.items() if key not in failures}
        if outputs:
            self._ledger.put_many(stage, outputs)
        if failures:
            store_failures(self._ledger, stage, failures)


@dataclasses.dataclass(frozen=True)
class _Findings:
    """What the listening stages found for one pair; `item` is what is scored, None where a stage
    failed."""

    pair: Pair
    style_source: str
    outputs: Mapping[str, Any]
    item: Item | None

    @classmethod
    def gather(
        cls,
        pair: Pair,
        stages_in: Sequence[str],
        outputs: Mapping[tuple[Path, str], Any],
        hashes: Mapping[Path, str | Failure] | None,
    ) -> "_Findings":
        """hashes: of all wavs, where the scorer wants waveforms."""
        query, path_in, _, path_out = pair
        style_stage = next((stage for stage in stages_in if stage.startswith(STYLE_PREFIX)), None)
        places = {
            "transcribe query": (path_in, "transcribe"),
            "transcribe answer": (path_out, "transcribe"),
            "tone": (path_out, "tone"),
            "style": (path_in, style_stage),
        }
        found = {name: outputs[place] for name, place in places.items() if place in outputs}
        if hashes is not None:
            files = {"read query": hashes[path_in], "read answer": hashes[path_out]}
            found |= {name: part for name, part in files.items() if isinstance(part, Failure)}
        if any(isinstance(value, Failure) for value in found.values()):
            item = None
        elif hashes is not None:
            item = Sounds(hashes[path_in], hashes[path_out], path_in, path_out)
        else:
            item = Heard(
                dimension=query.dimension,
                transcript_in=found["transcribe query"].text,
                style_in=found["style"].label if "style" in found else query.style,
                transcript_out=found["transcribe answer"].text,
                tone_out=found["tone"].label,
            )
        return cls(pair, "analyzer" if "style" in found else "label", found, item)

    def verdict(self, judge_name: str, score: Score | Failure | None) -> Verdict:
        """The verdict; fields of failed stages stay empty, and the first failure is the status."""
        query, _, response, _ = self.pair
        found = self.outputs if score is None else {**self.outputs, "score": score}
        failures = {stage: value for stage, value in found.items() if isinstance(value, Failure)}
        status = next((f"{stage}: {value.reason}" for stage, value in failures.items()), "ok")
        ok_score = score if isinstance(score, Score) else None
        style = query.style if self.style_source == "label" else _text(self.outputs["style"])
        return Verdict(
            query_id=query.id,
            system=response.system,
            sample=response.sample,
            score=math.nan if ok_score is None else ok_score.score,
            status=status,
            transcript_in=_text(self.outputs.get("transcribe query")),
            style_in=style,
            style_source=self.style_source,
            transcript_out=_text(self.outputs.get("transcribe answer")),
            tone_out=_text(self.outputs.get("tone")),
            content=None if ok_score is None else ok_score.content,
            tone_fit=None if ok_score is None else ok_score.tone_fit,
            judge=judge_name,
            raw={stage: _raw(value) for stage, value in found.items()},
        )


def _style_stage(dimension: str) -> str:
    return STYLE_PREFIX + dimension


def _text(output: Transcript | Named | Failure | None) -> str:
    if output is None or isinstance(output, Failure):
        return ""
    return output.text if isinstance(output, Transcript) else output.label


def _raw(output: Transcript | Named | Score | Failure) -> dict[str, Any]:
    return dataclasses.asdict(output)


def _transcribe_listener(transcriber: Transcriber) -> _Listener:
    def run(waves: Sequence[np.ndarray]) -> Iterable[Mapping[int, dict[str, Any] | Failure]]:
        heard = transcriber.transcribe(waves)
        yield {index: dataclasses.asdict(transcript) for index, transcript in enumerate(heard)}

    return _Listener(
        "transcribe", transcriber, transcriber.max_dur_s, run, lambda values: Transcript(**values)
    )


def _naming_listener(stage: str, namer: WaveNamer) -> _Listener:
    def run(waves: Sequence[np.ndarray]) -> Iterable[Mapping[int, dict[str, Any] | Failure]]:
        labels, probs = namer.name(waves)
        # Rounded so that the ledger stays readable; four digits are beyond the model's own.
        rows = [{k: round(float(p), 4) for k, p in zip(namer.labels, row)} for row in probs]
        found = zip(labels, rows, strict=True)
        yield {index: {"label": name, "probs": row} for index, (name, row) in enumerate(found)}

    return _Listener(stage, namer, namer.max_dur_s, run, lambda values: Named(**values))


def _tone_listener(namer: WaveNamer | WaveCaptioner) -> _Listener:
    if not isinstance(namer, WaveCaptioner):
        return _naming_listener("tone", namer)

    def run(waves: Sequence[np.ndarray]) -> Iterable[Mapping[int, dict[str, Any] | Failure]]:
        for index, tone in namer.caption(waves):
            yield {index: tone if isinstance(tone, Failure) else {"label": tone, "probs": {}}}

    return _Listener("tone", namer, namer.max_dur_s, run, lambda values: Named(**values))
