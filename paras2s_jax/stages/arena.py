"""The commands `arena`, `duel` and `rate`: systems of several runs against each other."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import rich.console
from ml_collections import ConfigDict

from paras2s_jax.bench import arena, arena_tables
from paras2s_jax.bench.aggregate import BenchError
from paras2s_jax.bench.leaderboard import differences
from paras2s_jax.bench.rating_page import write_rating_page
from paras2s_jax.bench.rows import AnswerRow, read_benches, read_queries, read_rows
from paras2s_jax.bench.tables import Results
from paras2s_jax.judge import agreement
from paras2s_jax.judge.duel import Duel
from paras2s_jax.judge.interfaces import Heard, Score
from paras2s_jax.judge.ledger import Ledger
from paras2s_jax.judge.stored_scores import StoredScores
from paras2s_jax.stages.judge import benches_of
from paras2s_jax.stages.judging import LEDGER, make_comparer
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
    about: dict[str, object] = {"margin": margin}
    if by == PEOPLE:
        systems = [system.name for _, results in found for system in results.systems]
        known = [row for row in agreement.read_ratings(ratings) if row.system in systems]
        votes = arena.votes_from_ratings(known, margin=margin)
        about |= {"raters": len({row.rater for row in known}), "ratings": len(known)}
    else:
        _check_one_measure(found)
        votes = arena.votes_from_scores([row.verdict for row in _rows(found)], margin=margin)
        about["judge"] = ", ".join(found[0][1].judges)
    return _rate(found, votes, about, Path(output), num_resamples, seed)


def duel(config: ConfigDict, workdir: str, *, runs: str, num_queries: int) -> Figures:
    """Lets the judge's language model compare answers of two systems each, in both orders.

    What was heard in the answers is taken from the runs; outcomes are kept in the ledger of the
    workdir, so that none is paid for twice.

    Args:
        runs: folders, with commas between.
        num_queries: as many of those that all systems answered, evenly chosen; 0: all.

    Raises:
        StageError: the judge has no language model. BenchError: as `run`.
        EndpointError: the server gives nothing.
    """
    folder, comparer = Path(workdir), make_comparer(config)
    found = read_benches(benches_of(runs.split(",")))
    _check_one_measure(found)
    lacking = {"transcribe", "tone"} - set(found[0][1].judge.settings)
    if lacking:
        raise BenchError(
            f"{found[0][0]} was judged without the stage {min(lacking)!r}, so that nobody knows "
            "what the answers say: judge with a transcriber and a tone namer first."
        )
    games = _games(_rows(found), num_queries)
    with Ledger(folder / LEDGER) as ledger:
        scores = StoredScores(comparer, ledger)
        outcomes = scores.get([game for _, _, _, game in games])
    decided = [
        (query_id, first, second, outcomes[game].score)
        for query_id, first, second, game in games
        if isinstance(outcomes[game], Score)
    ]
    judge = f"{comparer.name}-{comparer.version}"
    about = {"judge": judge, "duels without an outcome": len(games) - len(decided)}
    votes = arena.votes_from_shares(decided, judge)
    return _rate(found, votes, about, folder / "arena", 500, config.seed)


def _rows(found: Sequence[tuple[Path, Results]]) -> list[AnswerRow]:
    """All answers of all systems."""
    return [
        row
        for folder, results in found
        for system in results.systems
        for row in read_rows(folder, read_queries(folder), system.name)
    ]


def _games(rows: Sequence[AnswerRow], num_queries: int) -> list[tuple[str, str, str, Duel]]:
    """(query, first system, second system, duel): the first samples of any two, in both orders.

    Answers in which something could not be heard have no games.
    """
    heard: dict[str, dict[str, Heard]] = defaultdict(dict)
    for row in rows:
        verdict, query = row.verdict, row.query
        is_heard = verdict.status == "ok" or verdict.status.startswith("score:")
        if row.response.sample == 0 and is_heard:
            heard[query.id][verdict.system] = Heard(
                query.dimension,
                verdict.transcript_in,
                verdict.style_in,
                verdict.transcript_out,
                verdict.tone_out,
            )
    together = sorted(query_id for query_id, answers in heard.items() if len(answers) > 1)
    step = max(1, len(together) // num_queries) if num_queries else 1
    return [
        (query_id, first, second, Duel(heard[query_id][first], heard[query_id][second]))
        for query_id in together[::step][: num_queries or None]
        for first, second in itertools.permutations(sorted(heard[query_id]), 2)
    ]


def _rate(
    found: Sequence[tuple[Path, Results]],
    votes: Sequence[arena.Vote],
    about: Mapping[str, object],
    out: Path,
    num_resamples: int,
    seed: int,
) -> Figures:
    """Ratings from votes, written and printed."""
    queries = {query.id: query for folder, _ in found for query in read_queries(folder)}
    result = arena.rate(votes, list(queries.values()), num_resamples=num_resamples, seed=seed)
    about = dict(about) | {"runs": ", ".join(str(folder) for folder, _ in found)}
    arena_tables.write(result, votes, about, out)
    rich.console.Console().print(arena_tables.to_rich(result, about))
    print(f"written: {out / 'arena.md'}")
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
