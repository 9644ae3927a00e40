"""Data of the report's table of all answers: JSON that the page's script shows row by row."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paras2s_jax.bench import tables
from paras2s_jax.bench.aggregate import column_of
from paras2s_jax.bench.cards import (
    answer_sound,
    answer_wav,
    query_sound,
    query_wav,
    reason_of,
    select_sentences,
)
from paras2s_jax.bench.rows import AnswerRow
from paras2s_jax.bench.sounds import Sounds
from paras2s_jax.data.records import Query


@dataclasses.dataclass(frozen=True)
class AnswerTable:
    """Three blocks of JSON, so that the page reads the large ones only when they are asked for.

    answers: systems, queries and one row per answer. raw: what each stage returned, in the order of
    the rows. sounds: name of a player -> its source, for those that the cards do not hold.
    """

    answers: dict[str, Any]
    raw: list[dict[str, Any]]
    sounds: dict[str, str]


def answer_table(
    folder: Path,
    root: Path,
    queries: Sequence[Query],
    rows: Mapping[str, Sequence[AnswerRow]],
    sounds: Sounds,
    held: set[str],
) -> AnswerTable:
    """The table of a bench.

    Args:
        rows: by system.
        sounds: gives the sources; sentences come in an even order, so that what no longer fits in
            the page is not all of one dimension.
        held: names of players that the page has already.
    """
    place = {query.id: index for index, query in enumerate(queries)}
    flat = [(index, row) for index, part in enumerate(rows.values()) for row in part]
    answers = {
        "systems": list(rows),
        "queries": [_query(query) for query in queries],
        "rows": [_row(system, place[row.query.id], row) for system, row in flat],
    }
    return AnswerTable(
        answers=_strict(answers),
        raw=_strict([_raw(row) for _, row in flat]),
        sounds=_sources(folder, root, queries, [row for _, row in flat], sounds, held),
    )


def _query(query: Query) -> dict[str, Any]:
    return {
        "id": query.id,
        "text": query.text,
        "dimension": tables.TITLES[column_of(query)],
        "style": query.style,
        "contrast": query.contrast,
        "voice": query.voice,
        "topic": query.topic,
        "sound": query_sound(query),
    }


def _row(system: int, query: int, row: AnswerRow) -> dict[str, Any]:
    verdict, response = row.verdict, row.response
    score = verdict.raw.get("score")
    swapped = math.nan if row.swapped is None else row.swapped.score
    repeats = score.get("repeats") if isinstance(score, Mapping) else None
    return {
        "system": system,
        "query": query,
        "sample": response.sample,
        "score": verdict.score,
        "swapped": swapped,
        "gain": verdict.score - swapped,
        "status": verdict.status,
        "says": response.text,
        "heard": verdict.transcript_out,
        "tone": verdict.tone_out,
        "queryHeard": verdict.transcript_in,
        "styleHeard": verdict.style_in if verdict.style_source == "analyzer" else None,
        "content": verdict.content,
        "toneFit": verdict.tone_fit,
        "reason": reason_of(row),
        "repeats": list(repeats or ()),
        "ear": row.hearing and row.hearing.heard,
        "earHit": bool(row.hearing and row.hearing.hit),
        "cut": not response.finished,
        "sound": "" if response.error else answer_sound(row),
    }


def _raw(row: AnswerRow) -> dict[str, Any]:
    found = {"judge": row.verdict.judge, "own query": row.verdict.raw}
    if row.swapped is not None:
        # The answer itself was heard once.
        once = ("transcribe answer", "tone")
        swapped = {name: part for name, part in row.swapped.raw.items() if name not in once}
        found["other style"] = swapped
    return found


def _sources(
    folder: Path,
    root: Path,
    queries: Sequence[Query],
    rows: Sequence[AnswerRow],
    sounds: Sounds,
    held: set[str],
) -> dict[str, str]:
    wavs: dict[str, dict[str, Path]] = {query.sentence_id: {} for query in queries}
    for query in queries:
        wavs[query.sentence_id][query_sound(query)] = query_wav(query, root)
    for row in rows:
        wav = answer_wav(row, folder)
        if wav is not None:
            wavs[row.query.sentence_id][answer_sound(row)] = wav
    return {
        name: sounds.source(wav)
        for sentence in select_sentences(queries, len(wavs))
        for name, wav in wavs[sentence].items()
        if name not in held
    }


def _strict(value: Any) -> Any:
    """NaN as null, which strict JSON lacks; floats to four digits, more than is shown."""
    if isinstance(value, Mapping):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(part) for part in value]
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value
