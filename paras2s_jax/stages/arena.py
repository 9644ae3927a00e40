"""The commands `arena` and `rate`: systems of several runs against each other, and by ear."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import rich.console

from paras2s_jax.bench import arena, arena_tables
from paras2s_jax.bench.aggregate import BenchError
from paras2s_jax.bench.leaderboard import differences
from paras2s_jax.bench.rating_page import write_rating_page
from paras2s_jax.bench.rows import read_benches, read_queries, read_rows
from paras2s_jax.bench.tables import Results
from paras2s_jax.judge import agreement
from paras2s_jax.stages.judge import benches_of
from paras2s_jax.stages.registry import Figures, StageError

JUDGE, PEOPLE = "judge", "people"


def run(
    folders: Sequence[str],
    *,
    by: str,
    ratings: str | None,
    margin: float,
    num_resamples: int,
    seed: int,
    output: str,
) -> Figures:
    """Rates the systems of finished runs against each other; writes tables and votes.

    Args:
        by: "judge", by the scores that the runs have, or "people", by a CSV of the rating page.
        margin: scores that differ by no more are a tie.

    Raises:
        StageError: flags do not go together. BenchError: runs that cannot be compared.
    """
    if (by == PEOPLE) != bool(ratings):
        raise StageError("--ratings=CSV and --by=people go together: give both, or neither.")
    found = read_benches(benches_of(folders))
    queries = {query.id: query for folder, _ in found for query in read_queries(folder)}
    systems = [system.name for _, results in found for system in results.systems]
    if by == PEOPLE:
        known = [row for row in agreement.read_ratings(ratings) if row.system in systems]
        votes = arena.votes_from_ratings(known, margin=margin)
        about = {"raters": len({row.rater for row in known}), "ratings": len(known)}
    else:
        _check_one_measure(found)
        verdicts = [
            row.verdict
            for folder, results in found
            for system in results.systems
            for row in read_rows(folder, read_queries(folder), system.name)
        ]
        votes = arena.votes_from_scores(verdicts, margin=margin)
        about = {"judge": ", ".join(found[0][1].judges)}
    result = arena.rate(votes, list(queries.values()), num_resamples=num_resamples, seed=seed)
    about |= {"margin": margin, "runs": ", ".join(str(folder) for folder, _ in found)}
    arena_tables.write(result, votes, about, Path(output))
    rich.console.Console().print(arena_tables.to_rich(result, about))
    print(f"written: {Path(output) / 'arena.md'}")
    return arena_tables.figures(result)


def _check_one_measure(found: Sequence[tuple[Path, Results]]) -> None:
    """Scores of different judges, or on different queries, decide nothing between systems."""
    first_folder, first = found[0]
    for folder, results in found[1:]:
        why = differences(results, first)
        if why:
            raise BenchError(
                f"{folder} and {first_folder} cannot meet: {'; '.join(why)}. Judge both in the "
                "same way on the same queries, or let people decide (--by=people)."
            )


def rate(
    folders: Sequence[str], *, queries: str, num_pairs: int, together: bool, seed: int, output: str
) -> Path:
    """Writes the rating page of finished runs, over which `arena --by=people` can be held."""
    page = write_rating_page(
        benches_of(folders),
        Path(queries).parent,
        Path(output) / "index.html",
        num_pairs=num_pairs,
        seed=seed,
        together=together,
    )
    print(f"let people rate: {page}")
    return page
