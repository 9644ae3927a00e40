"""Queries joined with their answers: the rows that training stages feed to tf.data."""

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from paras2s_jax.data.batches import ManifestError
from paras2s_jax.data.records import Query, Response


def pair_rows(
    queries: Iterable[Query],
    queries_dir: str | os.PathLike,
    responses: Sequence[Response],
    responses_dir: str | os.PathLike,
) -> tuple[list[dict], Path]:
    """One row per response, with both wavs relative to one root.

    Args:
        queries_dir, responses_dir: folders that the records' wavs are relative to.

    Returns:
        (rows with keys query, answer (paths), text, query_id, sentence_id, sample; their root).

    Raises:
        ManifestError: a response names a query that is not there.
    """
    queries_dir, responses_dir = Path(queries_dir).resolve(), Path(responses_dir).resolve()
    by_id = {query.id: query for query in queries}
    lacking = sorted({row.query_id for row in responses} - by_id.keys())
    if lacking:
        raise ManifestError(
            f"{len(lacking)} queries of the responses in {responses_dir} are not in "
            f"{queries_dir}, first {lacking[0]!r}; use the queries that were answered."
        )
    root = Path(os.path.commonpath([queries_dir, responses_dir]))
    rows = [
        {
            "query": str((queries_dir / by_id[row.query_id].wav).relative_to(root)),
            "answer": str((responses_dir / row.wav).relative_to(root)),
            "text": row.text,
            "query_id": row.query_id,
            "sentence_id": by_id[row.query_id].sentence_id,
            "sample": row.sample,
        }
        for row in responses
    ]
    return rows, root


def query_rows(queries: Iterable[Query]) -> list[dict]:
    """Rows of queries alone, as RL hears them: speech without words or labels."""
    return [{"query": query.wav, "query_id": query.id} for query in queries]


def in_other_style(
    queries: Iterable[Query], responses: Sequence[Response], seed: int
) -> list[Response]:
    """Each answer again, as if given to the same sentence in its other style.

    Whether an answer fits is then a matter of how the query sounds and of nothing else. Sentences
    that are there in one style only are left out.
    """
    by_style: dict[tuple[str, str], list[str]] = {}
    by_id = {query.id: query for query in queries}
    for query in by_id.values():
        by_style.setdefault((query.sentence_id, query.style), []).append(query.id)
    rng = np.random.default_rng(seed)
    found = []
    for response in responses:
        query = by_id[response.query_id]
        others = by_style.get((query.sentence_id, query.contrast), [])
        if others:
            other = others[rng.integers(len(others))]
            found.append(dataclasses.replace(response, query_id=other))
    return found
