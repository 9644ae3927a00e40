"""Answers of a bench with all that was found about them, read back from its folder."""

import dataclasses
from pathlib import Path

from paras2s_jax.bench.aggregate import REAL, BenchError, column_of
from paras2s_jax.bench.ear import Hearing
from paras2s_jax.data.records import Query, Response, Verdict, read_jsonl


@dataclasses.dataclass(frozen=True)
class AnswerRow:
    """One answer. `swapped`: the verdict on it as an answer to its words in the other style.

    None for real speech, of which there is no other style.
    """

    query: Query
    response: Response
    verdict: Verdict
    swapped: Verdict | None
    hearing: Hearing


def read_queries(folder: Path) -> list[Query]:
    """The queries of a bench; BenchError where there are none."""
    queries = read_jsonl(folder / "queries.jsonl", Query)
    if not queries:
        raise BenchError(f"{folder / 'queries.jsonl'} lists no query; run the bench first.")
    return queries


def read_rows(folder: Path, queries: list[Query], system: str) -> list[AnswerRow]:
    """A system's answers, in the order of its responses.jsonl.

    Raises:
        BenchError: an answer has no query, no verdict or no hearing.
    """
    by_id = {query.id: query for query in queries}
    files = {"verdicts.jsonl": Verdict, "swapped.jsonl": Verdict, "heard.jsonl": Hearing}
    found = {
        name: {(row.query_id, row.sample): row for row in read_jsonl(folder / system / name, cls)}
        for name, cls in files.items()
    }
    # A query that was asked again after a failure has more than one row: the last one counts.
    responses = {}
    for response in read_jsonl(folder / system / "responses.jsonl", Response):
        responses[response.query_id, response.sample] = response
    rows = []
    for key, response in responses.items():
        needed = {"queries.jsonl": by_id, **found}
        if key[0] in by_id and column_of(by_id[key[0]]) in REAL:
            del needed["swapped.jsonl"]
        for name, part in needed.items():
            if (key[0] if part is by_id else key) not in part:
                raise BenchError(
                    f"{folder / system}: {name} lacks answer {key} of responses.jsonl; run the "
                    "bench again."
                )
        rows.append(AnswerRow(by_id[key[0]], response, *(part.get(key) for part in found.values())))
    return rows
