"""Answers of a bench with all that was found about them, read back from its folder."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from paras2s_jax.bench import tables
from paras2s_jax.bench.aggregate import REAL, BenchError, column_of
from paras2s_jax.bench.ear import Hearing
from paras2s_jax.bench.tables import Results
from paras2s_jax.data.records import Query, Response, Verdict, read_jsonl


@dataclasses.dataclass(frozen=True)
class AnswerRow:
    """One answer.

    swapped: the verdict on it as an answer to its words in the other style; None for real speech,
    of which there is no other style. hearing: None where the ear did not listen.
    """

    query: Query
    response: Response
    verdict: Verdict
    swapped: Verdict | None
    hearing: Hearing | None


def read_benches(folders: Sequence[Path]) -> list[tuple[Path, Results]]:
    """Benches side by side; BenchError where two of their systems have one name."""
    found = [(Path(folder), tables.read_results(Path(folder))) for folder in folders]
    seen: dict[str, Path] = {}
    for folder, results in found:
        for system in results.systems:
            if system.name in seen:
                raise BenchError(
                    f"{seen[system.name]} and {folder} both have a system {system.name!r}: give "
                    "each a name of its own (--config.system.name)."
                )
            seen[system.name] = folder
    return found


def read_queries(folder: Path) -> list[Query]:
    """The queries of a bench; BenchError where there are none."""
    queries = read_jsonl(folder / "queries.jsonl", Query)
    if not queries:
        raise BenchError(f"{folder / 'queries.jsonl'} lists no query; run the bench first.")
    return queries


def read_rows(folder: Path, queries: list[Query], system: str) -> list[AnswerRow]:
    """A system's answers, in the order of its verdicts.

    Answers to queries of earlier benches, which its folder may keep, are no part of them.

    Raises:
        BenchError: a verdict has no query, no answer, or no verdict in the other style beside it.
    """
    by_id = {query.id: query for query in queries}
    # A query that was asked again after a failure has more than one answer: the last one counts.
    responses, verdicts, swapped, hearings = (
        {(row.query_id, row.sample): row for row in read_jsonl(path, cls)} if path.is_file() else {}
        for path, cls in (
            (folder / system / "responses.jsonl", Response),
            (folder / system / "verdicts.jsonl", Verdict),
            (folder / system / "swapped.jsonl", Verdict),
            (folder / system / "heard.jsonl", Hearing),
        )
    )
    if not verdicts:
        raise BenchError(
            f"{folder / system} has no verdicts.jsonl with a row; run the bench again."
        )
    rows = []
    for key, verdict in verdicts.items():
        query = by_id.get(key[0])
        is_real = query is not None and column_of(query) in REAL
        for name, is_there in (
            ("queries.jsonl", query is not None),
            ("responses.jsonl", key in responses),
            ("swapped.jsonl", key in swapped or is_real),
        ):
            if not is_there:
                raise BenchError(
                    f"{folder / system}: {name} lacks {key}, which verdicts.jsonl has; run the "
                    "bench again."
                )
        found = (part.get(key) for part in (swapped, hearings))
        rows.append(AnswerRow(query, responses[key], verdict, *found))
    return rows
