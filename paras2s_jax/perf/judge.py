"""Judging in batches against judging one pair at a time, with the same local stages."""

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from paras2s_jax.audio import styles
from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.data import speaking
from paras2s_jax.data.bank import load_bank
from paras2s_jax.data.records import DIMENSIONS, Response
from paras2s_jax.data.synthesize import query_row
from paras2s_jax.judge.chain import Judge, Pair
from paras2s_jax.judge.classifier import WaveClassifier
from paras2s_jax.judge.ledger import Ledger
from paras2s_jax.judge.recipe import init_variables
from paras2s_jax.judge.score import RubricScorer
from paras2s_jax.judge.transcribe import MODEL_FILE, WhisperTranscriber
from paras2s_jax.models.whisper import WhisperForAudioClassification
from paras2s_jax.models.whisper_layers import WhisperConfig
from paras2s_jax.perf.race import RaceError
from paras2s_jax.stages.registry import Figures
from paras2s_jax.stages.speech import PACKAGED, TONE_FILE
from paras2s_jax.train.checkpoint import load_part

PARTS = PACKAGED / "tiny"
# Sentences times styles that are spoken, as many of each dimension.
NUM_SPOKEN = 64
# Verdicts may differ by what sums in another order make of probabilities and scores.
TOLERANCE = 1e-4


def run(pairs: int, single: int, batch_size: int) -> Figures:
    """Judges `pairs` pairs in batches, and `single` of them one by one.

    The recogniser and the tone namer are the packaged ones; the style analyzers have their size and
    random weights, which take as long. Every file is new to the judge: its ledger is empty.
    Returns: judge/pairs_per_s, judge/single_pairs_per_s and their quotient judge/throughput_ratio.

    Raises:
        RaceError: the two give different verdicts.
    """
    single = min(single, pairs)
    with tempfile.TemporaryDirectory(prefix="paras2s-judge-") as scratch:
        folder = Path(scratch)
        made = write_pairs(folder, pairs + NUM_SPOKEN)
        # Pairs of all lengths and dimensions come first, so that nothing is compiled in between.
        warm, measured = made[:NUM_SPOKEN], made[NUM_SPOKEN:]
        batched = _judge(folder / "batched.sqlite", batch_size)
        one = _judge(folder / "single.sqlite", 1)
        for judge in (batched, one):
            judge.judge(warm)
        started = time.perf_counter()
        verdicts = batched.judge(measured)
        batched_s = time.perf_counter() - started
        started = time.perf_counter()
        alone = [one.judge([pair])[0] for pair in measured[:single]]
        single_s = time.perf_counter() - started
    _check_equal([v.score for v in verdicts[:single]], [v.score for v in alone])
    rate, single_rate = pairs / batched_s, single / single_s
    print(
        f"{pairs} pairs in batches of {batch_size}: {rate:.1f} a second; {single} one by one: "
        f"{single_rate:.1f} a second",
        flush=True,
    )
    return {
        "judge/pairs_per_s": rate,
        "judge/single_pairs_per_s": single_rate,
        "judge/throughput_ratio": rate / single_rate,
        "judge/pairs": float(pairs),
    }


def _check_equal(batched: Sequence[float], single: Sequence[float]) -> None:
    gap = np.abs(np.array(batched) - np.array(single))
    if not np.all(gap <= TOLERANCE):
        raise RaceError(f"verdicts differ by up to {np.nanmax(gap):.3g} between the two ways")


def write_pairs(folder: Path, count: int) -> list[Pair]:
    """Spoken queries of the bank with spoken answers, each a file of its own."""
    bank, rng = load_bank(), np.random.default_rng(0)
    by_dimension = [[s for s in bank.sentences if s.dimension == name] for name in DIMENSIONS]
    # One of each dimension in turn.
    spoken = itertools.chain.from_iterable(zip(*by_dimension))
    clips = {}
    for sentence, style in itertools.islice(
        ((s, style) for s in spoken for style in (s.style_a, s.style_b)), NUM_SPOKEN
    ):
        name = f"{sentence.id}-{style}"
        query = query_row(sentence, style, "", name)
        text = bank.answers[sentence.dimension, style][0]
        answer = Response(name, "perf", 0, text, "", tone="gentle")
        delivery = styles.tone_delivery("gentle", speaking.rng_of(0, name))
        clips[name] = [
            speaking.Clip(query, "in", name, sentence.text, delivery),
            speaking.Clip(answer, "out", name, text, delivery),
        ]
    rows, _ = speaking.speak([clip for pair in clips.values() for clip in pair], folder)
    waves = {row.wav: wave_lib.load(folder / row.wav) for row in rows}
    made = []
    for index in range(count):
        query, answer = rows[2 * (index % len(clips))], rows[2 * (index % len(clips)) + 1]
        paths = []
        for kind, row in (("in", query), ("out", answer)):
            # A little louder or quieter: another file, which the ledger does not know.
            path = folder / f"pairs/{kind}-{index}.wav"
            gain = rng.uniform(0.5, 0.99)
            wave_lib.save(path, (gain * waves[row.wav]).astype(np.float32), wave_lib.RATE_HZ)
            paths.append(path)
        made.append((query, paths[0], answer, paths[1]))
    return made


def _judge(ledger: Path, batch_size: int) -> Judge:
    transcriber = WhisperTranscriber.load(PARTS, batch_size=batch_size)
    tone = WaveClassifier.load(PARTS / TONE_FILE, batch_size=batch_size)
    _, meta = load_part(PARTS / MODEL_FILE)
    config = dataclasses.replace(WhisperConfig(**meta["config"]), classifier_proj_size=64)
    bank = load_bank()
    analyzers = {}
    for seed, dimension in enumerate(DIMENSIONS):
        labels = bank.styles(dimension)
        analyzers[dimension] = WaveClassifier(
            config,
            init_variables(WhisperForAudioClassification(config, len(labels)), config, seed),
            labels,
            len_buckets_s=meta["len_buckets_s"],
            batch_size=batch_size,
        )
    scorer = RubricScorer(bank.rubric)
    return Judge(transcriber, analyzers, tone, scorer, Ledger(ledger), progress=False)
