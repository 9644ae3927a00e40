"""The records that cross stages, and strict jsonl files of them.

Every `wav` is a path relative to the folder of the jsonl file that names it, so that a working
directory can be moved. Reading checks every key and type, because users bring their own files.
"""

import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

Dimension = Literal["emotion", "sarcasm", "age", "gender", "neutral"]
Split = Literal["train", "test"]

# The dimensions with a pair of contrastive styles (paper section 2: ParaS2SBench).
DIMENSIONS = ("emotion", "sarcasm", "age", "gender")

Record = TypeVar("Record")


class RecordError(ValueError):
    """A row or file does not hold what its record type asks for."""


@dataclasses.dataclass(frozen=True)
class Query:
    """A spoken query: neutral words in one of two contrastive styles.

    `style` is how it is spoken, `contrast` the other style of its sentence; both are "neutral" in
    the dimension "neutral".
    """

    id: str
    sentence_id: str
    dimension: Dimension
    text: str
    style: str
    contrast: str
    topic: str
    split: Split
    voice: str
    wav: str
    dur_s: float


@dataclasses.dataclass(frozen=True)
class Response:
    """A system's spoken answer number `sample` to a query; `text` is what it meant to say.

    error: why there is no answer, "" where there is one; `wav` is "" then.
    """

    query_id: str
    system: str
    sample: int
    text: str
    wav: str
    tone: str | None = None
    dur_s: float = 0.0
    finished: bool = True
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a judge found in one (query, response) pair.

    `score` is 1..5, or NaN (null in json) where a stage failed; then `status` is
    "<stage>: <reason>" instead of "ok". `raw` keeps the stages' own outputs.
    """

    query_id: str
    system: str
    sample: int
    score: float = dataclasses.field(metadata={"nan": True})
    status: str
    transcript_in: str
    style_in: str
    style_source: Literal["analyzer", "label"]
    transcript_out: str
    tone_out: str
    content: float | None
    tone_fit: float | None
    judge: str
    raw: dict


@dataclasses.dataclass(frozen=True)
class PolytoneClip:
    """A labelled clip for a style analyzer.

    `set`: "polytone" (the same text under every label), "plain" (leading texts spoken as their
    words suggest) or "test" (leading texts spoken against their words).
    """

    id: str
    attribute: str
    label: str
    text: str
    text_id: str
    set: Literal["polytone", "plain", "test"]
    voice: str
    wav: str
    dur_s: float


@dataclasses.dataclass(frozen=True)
class SpeechClip:
    """A transcribed clip for the recogniser, the codec and the tone classifier."""

    id: str
    text: str
    wav: str
    split: Split
    dur_s: float
    kind: str
    tone: str | None = None


def read_jsonl(path: str | Path, cls: type[Record], *, partial_tail: bool = False) -> list[Record]:
    """Reads a jsonl file of `cls` rows; a wrong row raises RecordError naming file, line and key.

    Args:
        partial_tail: ignore a last line without its newline, which a stopped `append_jsonl`
            leaves behind.
    """
    path = Path(path)
    if not path.is_file():
        raise RecordError(f"{path}: no such file; run the stage that writes it, or fix the path.")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}: not UTF-8 text ({error}); save it as UTF-8.") from error
    lines = text.split("\n")
    if partial_tail:
        lines = lines[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise RecordError(f"{where}: not valid JSON ({error}); fix the line.") from error
        rows.append(from_dict(values, cls, where))
    return rows


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> Path:
    """Writes rows to a jsonl file atomically."""
    return write_text(path, "".join(_line(row) for row in rows))


def with_null(value: Any) -> Any:
    """Plain data with tuples as lists and NaN as null, the only way that strict JSON has for it."""
    if isinstance(value, Mapping):
        return {key: with_null(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [with_null(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def write_text(path: str | Path, text: str) -> Path:
    """Writes a text file atomically (temporary file, then rename). Returns: its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        tmp.write_text(text, encoding="utf-8")
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
    return path


def append_jsonl(path: str | Path, row: Any) -> None:
    """Appends one row; first cuts off a half-written last line that a stopped run left."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = _line(row).encode("utf-8")
    with open(path, "ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line)


def from_dict(values: Any, cls: type[Record], where: str = "row") -> Record:
    """Builds a record from parsed json; `where` opens the message of a RecordError."""
    if not isinstance(values, dict):
        raise RecordError(f"{where}: expected a JSON object, got {type(values).__name__}.")
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)
    unknown = sorted(set(values) - {field.name for field in fields})
    if unknown:
        raise RecordError(f"{where}: unknown key '{unknown[0]}' for {cls.__name__}; remove it.")
    kwargs = {}
    for field in fields:
        if field.name not in values:
            if field.default is dataclasses.MISSING:
                raise RecordError(f"{where}: key '{field.name}' of {cls.__name__} is missing.")
            continue
        value = values[field.name]
        if value is None and field.metadata.get("nan"):
            value = math.nan
        kwargs[field.name] = _checked(value, hints[field.name], field, where)
    return cls(**kwargs)


def to_dict(row: Any) -> dict:
    """A record as plain json values; checks types as reading does, so no bad file is written."""
    hints = typing.get_type_hints(type(row))
    values = {}
    for field in dataclasses.fields(row):
        where = f"{type(row).__name__} to write"
        value = _checked(getattr(row, field.name), hints[field.name], field, where)
        is_nan = isinstance(value, float) and math.isnan(value)
        values[field.name] = None if is_nan else value
    return values


def _line(row: Any) -> str:
    return json.dumps(to_dict(row), ensure_ascii=False, allow_nan=False) + "\n"


def _checked(value: Any, hint: Any, field: dataclasses.Field, where: str) -> Any:
    if not _matches(value, hint):
        expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        raise RecordError(f"{where}: key '{field.name}' must be {expected}, got {value!r}.")
    is_float = isinstance(value, float)
    allowed = is_float and math.isnan(value) and field.metadata.get("nan", False)
    if is_float and not math.isfinite(value) and not allowed:
        raise RecordError(f"{where}: key '{field.name}' must be finite, got {value!r}.")
    return value


def _matches(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_matches(value, part) for part in typing.get_args(hint))
    if origin is Literal:
        return value in typing.get_args(hint)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
