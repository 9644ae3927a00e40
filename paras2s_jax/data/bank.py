"""The text bank: what users say, what a fitting answer is, and how to tell (package data, JSON).

The words of a sentence give away its dimension (each has its own sentence frames) but not the
style: that is in the voice alone. An answer fits a style, whatever the topic, so that a model can
be tested on topics it never saw.
"""

import dataclasses
import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

from paras2s_jax.data.records import DIMENSIONS

BANK_DIR = Path(__file__).parent / "bank_data"


@dataclasses.dataclass(frozen=True)
class Sentence:
    """A neutral sentence and its two contrastive styles.

    `requirement` maps each of the two styles to what a fitting answer must do.
    """

    id: str
    dimension: str
    text: str
    style_a: str
    style_b: str
    topic: str
    split: str
    requirement: dict[str, str]

    def contrast(self, style: str) -> str:
        """The other one of the two styles."""
        return self.style_b if style == self.style_a else self.style_a


@dataclasses.dataclass(frozen=True)
class Rubric:
    """How to tell whether an answer fits a (dimension, style).

    acts: what the words must do; an act is done where one of its cue phrases occurs.
    tones: how well each assistant tone suits, 0..1.
    bland: cue phrases of a polite answer that ignores the style.
    """

    requirement: str
    acts: tuple[tuple[str, ...], ...]
    tones: dict[str, float]
    bland: tuple[str, ...]

    def acts_done(self, text: str) -> float:
        """The share of acts that the text does, 0..1."""
        return sum(has_cue(text, cues) for cues in self.acts) / len(self.acts)


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """A question without a style and its one right answer.

    Test questions ask in new words for what train answers say: they measure what is retained.
    """

    id: str
    topic: str
    text: str
    answer: str
    split: str


@dataclasses.dataclass(frozen=True)
class Leading:
    """A sentence whose words suggest a style (`value`) of an attribute."""

    id: str
    attribute: str
    value: str
    text: str
    split: str


@dataclasses.dataclass(frozen=True)
class Bank:
    """All texts.

    answers, tones: by (dimension, style); style "neutral" holds the bland, tone-deaf answers.
    rubric: by (dimension, style), for the two styles only.
    """

    sentences: tuple[Sentence, ...]
    answers: dict[tuple[str, str], tuple[str, ...]]
    tones: dict[tuple[str, str], str]
    rubric: dict[tuple[str, str], Rubric]
    dialogues: tuple[Dialogue, ...]
    leading: tuple[Leading, ...]

    def styles(self, dimension: str) -> tuple[str, str]:
        """The two styles of a dimension; they are the labels of its analyzer too."""
        return tuple(style for dim, style in self.rubric if dim == dimension)

    def of(self, split: str, dimension: str | None = None) -> list[Sentence]:
        """The sentences of a split, of one dimension or of all."""
        wanted = (dimension,) if dimension else DIMENSIONS
        return [s for s in self.sentences if s.split == split and s.dimension in wanted]

    def leading_of(self, attribute: str, value: str, split: str) -> list[Leading]:
        """The leading texts that suggest `value`."""
        key = (attribute, value, split)
        return [row for row in self.leading if (row.attribute, row.value, row.split) == key]

    def texts(self, split: str = "train") -> list[str]:
        """All distinct texts that a split may know; the answers are known to both."""
        rows = [*self.sentences, *self.dialogues, *self.leading]
        texts = [row.text for row in rows if row.split == split]
        texts += [text for answers in self.answers.values() for text in answers]
        texts += [row.answer for row in self.dialogues if row.split == split]
        return list(dict.fromkeys(texts))

    def first(self, count: int) -> "Bank":
        """The bank cut to so many sentences of each dimension and split; 0: all of it.

        So many dialogues of each split, and leading texts of each value and split, too.
        """
        if not count:
            return self

        def cut(rows: Sequence, group: Callable[[Any], Hashable]) -> tuple:
            return tuple(_first_of_each(rows, group, count))

        return dataclasses.replace(
            self,
            sentences=cut(self.sentences, lambda row: (row.dimension, row.split)),
            dialogues=cut(self.dialogues, lambda row: row.split),
            leading=cut(self.leading, lambda row: (row.attribute, row.value, row.split)),
        )


def _first_of_each(rows: Sequence, group: Callable[[Any], Hashable], count: int) -> Iterator:
    """The first `count` rows of each group, in their order."""
    seen = Counter()
    for row in rows:
        seen[group(row)] += 1
        if seen[group(row)] <= count:
            yield row


def has_cue(text: str, cues: tuple[str, ...]) -> bool:
    """Whether one of the cue phrases occurs in the text, as whole words in their order."""
    padded = f" {' '.join(_words(text))} "
    return any(f" {' '.join(_words(cue))} " in padded for cue in cues)


@functools.cache
def load_bank(folder: Path = BANK_DIR) -> Bank:
    """Reads the bank from its JSON files; see the files for their form."""
    sentences, answers, tones, rubric = [], {}, {}, {}
    for dimension in DIMENSIONS:
        values = json.loads((folder / f"{dimension}.json").read_text(encoding="utf-8"))
        bland = values["bland"]
        answers[dimension, "neutral"] = tuple(bland["answers"])
        tones[dimension, "neutral"] = "flat"
        for style in (values["style_a"], values["style_b"]):
            entry = values["styles"][style]
            answers[dimension, style] = tuple(entry["answers"])
            tones[dimension, style] = entry["tone"]
            rubric[dimension, style] = Rubric(
                requirement=entry["requirement"],
                acts=tuple(tuple(cues) for cues in entry["acts"]),
                tones=entry["tones"],
                bland=tuple(bland["cues"]),
            )
        sentences += _sentences(values)
    dialogues = json.loads((folder / "neutral.json").read_text(encoding="utf-8"))
    leading = json.loads((folder / "leading.json").read_text(encoding="utf-8"))
    return Bank(
        sentences=tuple(sentences),
        answers=answers,
        tones=tones,
        rubric=rubric,
        dialogues=tuple(Dialogue(**row) for row in dialogues),
        leading=tuple(_leading(leading)),
    )


def _sentences(values: dict) -> list[Sentence]:
    requirement = {style: entry["requirement"] for style, entry in values["styles"].items()}
    shared = {key: values[key] for key in ("dimension", "style_a", "style_b")}
    return [Sentence(**row, **shared, requirement=requirement) for row in values["sentences"]]


def _leading(values: dict) -> list[Leading]:
    rows = []
    for attribute, by_value in values.items():
        for value, by_split in by_value.items():
            for split, texts in by_split.items():
                for index, text in enumerate(texts):
                    name = f"leading-{value}-{split}-{index:02d}"
                    rows.append(Leading(name, attribute, value, text, split))
    return rows


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())
