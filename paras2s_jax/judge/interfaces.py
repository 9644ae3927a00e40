"""What passes between the judge's stages, and what a stage must offer.

Hearing and judging are kept apart (paper section 2): waveforms become words and names of style and
tone, and only these are scored, so that words cannot make the judge "hear" a style.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Failure:
    """A stage could not answer for one item: the verdict becomes NaN with this reason.

    `raw` keeps what the stage did return, for instance a reply that could not be parsed.
    """

    reason: str
    raw: Any = None


@dataclasses.dataclass(frozen=True)
class Transcript:
    """The words heard; "" if none. `mean_logp` is per token, before the no-speech decision."""

    text: str
    mean_logp: float


class Item(Protocol):
    """What a scorer is given of a pair; hashable."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a score of it is stored under, as JSON."""


@dataclasses.dataclass(frozen=True)
class Heard:
    """All that a scorer may know of one (query, answer) pair."""

    dimension: str
    transcript_in: str
    style_in: str
    transcript_out: str
    tone_out: str

    @property
    def identity(self) -> dict[str, Any]:
        """See Item."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Sounds:
    """All that a scorer of waveforms may know of one pair: two files.

    query, answer: sha256 of their bytes. query_wav, answer_wav: where they lie.
    """

    query: str
    answer: str
    query_wav: Path = dataclasses.field(compare=False)
    answer_wav: Path = dataclasses.field(compare=False)

    @property
    def identity(self) -> dict[str, Any]:
        """See Item."""
        return {"query": self.query, "answer": self.answer}


@dataclasses.dataclass(frozen=True)
class Score:
    """A scorer's answer: `score` in 1..5, its parts in 0..1 where it has them, and a sentence.

    raw: what a model replied, as JSON. repeats: where a score was asked for several times, each
    answer, None where one failed; `score` is the mean of the others.
    """

    score: float
    content: float | None
    tone_fit: float | None
    reason: str
    raw: Any = None
    repeats: tuple[float | None, ...] = ()


class Stage(Protocol):
    """What every stage tells the ledger about itself."""

    @property
    def model_id(self) -> str:
        """Changes whenever the weights or the version do."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """JSON values that change the output."""


class Transcriber(Stage, Protocol):
    """Waveforms → words."""

    max_dur_s: float

    def transcribe(self, waves: Sequence[np.ndarray]) -> list[Transcript]:
        """waves: float32[L] each, at 16 kHz and at most max_dur_s long."""


class WaveNamer(Stage, Protocol):
    """Waveforms → one of a fixed list of names: the style of a query, the tone of an answer."""

    labels: tuple[str, ...]
    max_dur_s: float

    def name(self, waves: Sequence[np.ndarray]) -> tuple[list[str], np.ndarray]:
        """waves: float32[L] each. Returns: labels, and their probabilities float32[B, C]."""


@runtime_checkable
class WaveCaptioner(Stage, Protocol):
    """Waveforms → the tone of voice in free words."""

    max_dur_s: float

    def caption(self, waves: Sequence[np.ndarray]) -> Iterable[tuple[int, str | Failure]]:
        """(index, tone) of every wave, float32[L], in any order; they are stored as they come.

        A reply that names no tone is a Failure.
        """


class Scorer(Protocol):
    """Names and words → scores: the rubric here, or a language model behind the same interface.

    `name`, `version` and `settings_hash` go into every table that quotes its scores.
    """

    name: str
    version: str

    @property
    def settings_hash(self) -> str:
        """Hash of everything else that changes a score (rubric, prompt, temperature)."""

    def score(
        self, heard: Sequence[Heard], repeat: int = 0
    ) -> Iterable[tuple[int, Score | Failure]]:
        """(index, answer) of every item, in any order; one that cannot be scored is a Failure.

        Answers are stored as they come, so that a crash loses only those under way. repeat: number
        of the repetition, for scorers that draw.
        """


@runtime_checkable
class WaveScorer(Protocol):
    """Pairs of waveforms → scores; otherwise as a Scorer."""

    name: str
    version: str

    @property
    def settings_hash(self) -> str:
        """Hash of everything else that changes a score."""

    def score_waves(
        self, pairs: Sequence[Sounds], repeat: int = 0
    ) -> Iterable[tuple[int, Score | Failure]]:
        """As `Scorer.score`."""
