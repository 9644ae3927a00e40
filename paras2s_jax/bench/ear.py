"""An ear outside the training: PocketSphinx names which of the bank's answers a waveform speaks.

RL could learn sounds that only its own reward hears as words. This recogniser shares no weights and
no data with the judge or the reward, so what it hears is evidence of real words. It makes a forced
choice between the listed answers; speech of other words gets the likeliest of them, noise none.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import math
import multiprocessing
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
from pocketsphinx import Decoder
from rapidfuzz.distance import Levenshtein
from tqdm import tqdm

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.data.tokenizer import normalize

# Words of the built-in bank that the recogniser's dictionary lacks, in its ARPAbet.
PRONUNCIATIONS = {"kiddo": "K IH D OW"}

# Synthetic speech has digital silence, for which the recogniser's models have no sound: with this
# little noise (RMS of PCM16 values) it names 100 % of clean answers, without it 97 %.
_DITHER_RMS = 100.0
# Wide enough that a miss is the speaker's, not the search's: 48 of 48 clips that had gone through
# a small codec, where the recogniser's own beams lose one, for 40 % more time.
_BEAMS = {"beam": 1e-80, "pbeam": 1e-80, "wbeam": 1e-60}
_CLIPS_PER_TASK = 8


class EarError(ValueError):
    """The recogniser cannot listen for these answers."""


@dataclasses.dataclass(frozen=True)
class Hearing:
    """What the ear heard in one answer, and which listed answer its text stream is nearest to.

    `hit`: both are the same. An answer without text has no `expected` and is no hit. `key` is the
    `hearing_key` of the wav.
    """

    query_id: str
    sample: int
    heard: str | None
    expected: str | None
    hit: bool
    key: str


def ear_name() -> str:
    """Name and version, for tables."""
    return f"PocketSphinx {metadata.version('pocketsphinx')}"


def hearing_key(path: Path, answers: Iterable[str]) -> str:
    """Hash of all that decides what is heard: the file's bytes, the answers, the recogniser."""
    about = hashlib.sha256(Path(path).read_bytes())
    about.update(grammar(answers).encode())
    about.update(ear_name().encode())
    return about.hexdigest()


def grammar(answers: Iterable[str]) -> str:
    """A JSGF grammar that accepts exactly the answers' words."""
    lines = sorted({normalize(answer) for answer in answers} - {""})
    if not lines:
        raise EarError("the list of answers has no words; give the answers of the bank.")
    choice = " |\n  ".join(lines)
    return f"#JSGF V1.0;\ngrammar bank;\npublic <answer> =\n  {choice} ;\n"


class Ear:
    """Names the answer spoken in a waveform.

    Args:
        answers: texts to listen for.
        pronunciations: word -> ARPAbet phones, for words that the dictionary lacks.
    """

    def __init__(self, answers: Sequence[str], pronunciations: Mapping[str, str] = PRONUNCIATIONS):
        self._answers = {normalize(answer): answer for answer in answers}
        # No language model: the grammar is the whole language. The lattice's best path rescores
        # with one, which costs 5 points here.
        self._decoder = Decoder(
            samprate=wave_lib.RATE_HZ, lm=None, bestpath=False, loglevel="FATAL", **_BEAMS
        )
        words = sorted({word for line in self._answers for word in line.split()})
        unknown = [word for word in words if self._decoder.lookup_word(word) is None]
        for word in unknown:
            if word in pronunciations:
                self._decoder.add_word(word, pronunciations[word], True)
        lacking = [word for word in unknown if word not in pronunciations]
        if lacking:
            raise EarError(
                f"the recogniser's dictionary lacks {', '.join(lacking)}; "
                "add their phones to the pronunciations or use other words."
            )
        self._decoder.add_jsgf_string("bank", grammar(answers))
        self._decoder.activate_search("bank")

    def hear(self, wave: np.ndarray) -> str | None:
        """wave: float32[L] at 16 kHz. Returns one of the answers, or None if none fits."""
        dither = np.random.default_rng(0).normal(0.0, _DITHER_RMS, len(wave))
        limit = 2**15 - 1
        samples = np.clip(np.asarray(wave) * limit + dither, -limit, limit).astype(np.int16)
        self._decoder.start_utt()
        # full_utt: features are normalised over this waveform alone, whatever was heard before.
        self._decoder.process_raw(samples.tobytes(), full_utt=True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return None if found is None else self._answers.get(found.hypstr.strip())


def nearest(text: str, answers: Sequence[str]) -> str | None:
    """The answer with the fewest word edits from `text`, the first of equals; None without words.

    Distances are relative to the length of the longer text, so that a short answer is not nearest
    to everything.
    """
    words = normalize(text).split()
    if not words or not answers:
        return None
    return min(
        answers,
        key=lambda answer: Levenshtein.normalized_distance(words, normalize(answer).split()),
    )


@functools.cache
def _ear(answers: tuple[str, ...], pronunciations: tuple[tuple[str, str], ...]) -> Ear:
    return Ear(answers, dict(pronunciations))


def _hear_files(
    answers: tuple[str, ...], pronunciations: tuple[tuple[str, str], ...], paths: list[Path]
) -> list[str | None]:
    ear = _ear(answers, pronunciations)
    return [ear.hear(wave_lib.load(path)) for path in paths]


def hear_files(
    paths: Sequence[Path],
    answers: Sequence[str],
    *,
    pronunciations: Mapping[str, str] = PRONUNCIATIONS,
    num_workers: int | None = None,
) -> list[str | None]:
    """The answer heard in each file, in order; in parallel (None: one worker per core)."""
    num_workers = min(num_workers or os.cpu_count() or 1, math.ceil(len(paths) / _CLIPS_PER_TASK))
    args = (tuple(answers), tuple(pronunciations.items()))
    tasks = [paths[at : at + _CLIPS_PER_TASK] for at in range(0, len(paths), _CLIPS_PER_TASK)]
    heard = []
    with tqdm(total=len(paths), desc="ear", unit="wav") as bar:
        if num_workers <= 1:
            results = map(functools.partial(_hear_files, *args), tasks)
            for part in results:
                heard += part
                bar.update(len(part))
            return heard
        # Spawned, because a forked copy of a process that runs JAX threads may hang.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(num_workers, context) as pool:
            for part in pool.map(functools.partial(_hear_files, *args), tasks):
                heard += part
                bar.update(len(part))
    return heard


def hit_rate(hearings: Sequence[Hearing]) -> float:
    """Share of hits; NaN where no answer has text (a system without a text stream)."""
    if not any(hearing.expected for hearing in hearings):
        return math.nan
    return sum(hearing.hit for hearing in hearings) / len(hearings)
