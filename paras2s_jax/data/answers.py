"""A system's folder: responses.jsonl and the wavs it names, kept while the system is the same."""

import dataclasses
import json
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.data.records import (
    Query,
    Response,
    append_jsonl,
    read_jsonl,
    write_jsonl,
    write_text,
)

# Stands for an answer without any sound, so that a judge hears silence instead of a broken file.
NO_ANSWER_S = 0.1
ROWS = "responses.jsonl"

Unit = tuple[str, int]  # query id, sample


def wav_name(query_id: str, sample: int) -> str:
    """Path below a system's folder; quoting keeps any id a plain file name."""
    return f"wavs/{urllib.parse.quote(query_id, safe='')}.{sample}.wav"


class AnswerStore:
    """Answers that are there already, and those that come; continues after a stop.

    done: (query id, sample) -> answer. A query that the system failed to answer is not done: it is
    asked again when the same command runs again.

    Args:
        folder: of the system.
        identity: JSON of all that decides an answer; answers of another identity are discarded.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]):
        self.folder, self.done = Path(folder), {}
        self._failed: dict[Unit, Response] = {}
        mark, rows = self.folder / "identity.json", self.folder / ROWS
        if mark.is_file() and json.loads(mark.read_text(encoding="utf-8")) == identity:
            found = read_jsonl(rows, Response, partial_tail=True) if rows.is_file() else []
            kept = [row for row in found if not row.error and (self.folder / row.wav).is_file()]
            if len(kept) < len(found):
                write_jsonl(rows, kept)
            self.done = {(row.query_id, row.sample): row for row in kept}
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        rows.unlink(missing_ok=True)
        write_text(mark, json.dumps(identity))

    def add(self, response: Response, wave: np.ndarray, rate_hz: int = wave_lib.RATE_HZ) -> None:
        """Keeps an answer, unless it is there already. wave: float32[L]; may be empty."""
        unit = (response.query_id, response.sample)
        if unit in self.done:
            return
        named = dataclasses.replace(response, wav=wav_name(*unit))
        saved = save_answer(named, wave, self.folder, rate_hz)
        append_jsonl(self.folder / ROWS, saved)
        self.done[unit] = saved

    def fail(self, response: Response) -> None:
        """Notes that the system gave no answer; `response.error` says why."""
        self._failed[response.query_id, response.sample] = response
        append_jsonl(self.folder / ROWS, response)

    def plan(
        self, queries: Sequence[Query], num_samples: int
    ) -> tuple[list[tuple[Query, int]], list[tuple[Query, int]]]:
        """(query, sample) of all answers that are wanted, and of those that are not done."""
        units = [(query, sample) for query in queries for sample in range(num_samples)]
        return units, [unit for unit in units if (unit[0].id, unit[1]) not in self.done]

    def answer(self, query_id: str, sample: int) -> Response:
        """What there is: the answer, or the note that there is none."""
        unit = (query_id, sample)
        return self.done[unit] if unit in self.done else self._failed[unit]


def save_answer(
    response: Response, wave: np.ndarray, folder: Path, rate_hz: int = wave_lib.RATE_HZ
) -> Response:
    """Writes an answer's wav; returns the response with its duration, 0 where there is no sound."""
    silence = np.zeros(round(NO_ANSWER_S * rate_hz), np.float32)
    wave_lib.save(folder / response.wav, wave if len(wave) else silence, rate_hz)
    return dataclasses.replace(response, dur_s=len(wave) / rate_hz)
