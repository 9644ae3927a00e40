"""The bench: systems answer, the judge scores, the ear listens, the tables are written.

Layout of the folder, all of it readable by hand and continued after a stop:
    queries.jsonl                  the queries asked (wav paths relative to the queries' root)
    judge.json                     models and settings of the judge, for replays
    <system>/responses.jsonl       answers, with their wavs in <system>/wavs/
    <system>/verdicts.jsonl        each answer against its own query
    <system>/swapped.jsonl         each answer against the same words in the other style; the row's
                                   query_id is still that of the answer, `raw` names the query heard
    <system>/heard.jsonl           what the ear named
    results.json table.md table.csv
"""

import dataclasses
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import rich.console

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.bench import aggregate, comparison, ear, tables
from paras2s_jax.bench.aggregate import BenchError, Estimate
from paras2s_jax.bench.systems import System
from paras2s_jax.bench.tables import JudgeInfo, Results, SystemResult
from paras2s_jax.data.records import Query, Response, Verdict, read_jsonl, write_jsonl
from paras2s_jax.judge.card import Card
from paras2s_jax.judge.chain import Pair
from paras2s_jax.judge.ledger import digest, file_digest
from paras2s_jax.judge.replay import write_description

HEARD_QUERY = "heard_query_id"
# System names become folder names and parts of figure names.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class Judge(Protocol):
    """What the bench asks of a judge."""

    name: str

    def describe(self) -> dict[str, Any]:
        """Models and settings of its stages: what `name` stands for."""
        ...

    def judge(
        self, pairs: Sequence[tuple[Query, Path, Response, Path]], *, use_labels: bool = False
    ) -> list[Verdict]:
        """One verdict per pair, in order."""
        ...


@dataclasses.dataclass(frozen=True)
class Judged:
    """A system's answers and all that was found about them, row by row."""

    responses: list[Response]
    verdicts: list[Verdict]
    swapped: list[Verdict]
    hearings: list[ear.Hearing]


def bench(
    systems: Sequence[System],
    queries: Sequence[Query],
    root: Path,
    folder: Path,
    *,
    judge: Judge,
    answers: Sequence[str],
    comparisons: Sequence[tuple[str, str]] = (),
    use_labels: bool = False,
    card: Card | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
    num_workers: int | None = None,
    console: rich.console.Console | None = None,
) -> Results:
    """Benches systems on queries and writes the tables.

    Args:
        systems: rows of the table, in order.
        queries: those without a style dimension are left out.
        root: the queries' wavs are relative to it.
        folder: where everything is written; what is already there is used.
        answers: texts that the ear listens for; none: it does not listen.
        comparisons: (a, b) names of systems to compare pairwise.
        use_labels: give the judge the true styles (the table says so).
        card: of this judge, where there is one; the table says whether it passed.

    Returns:
        the results; `tables.figures` makes them flat figures.
    """
    folder, root = Path(folder), Path(root)
    _check_names([system.name for system in systems], comparisons)
    _check_card(card, judge)
    if answers:
        ear.Ear(answers)  # Raises on words that it does not know before any answer is made.
    queries = [query for query in queries if aggregate.columns_of([query])]
    aggregate.swap_pairs(queries, [Response(query.id, "", 0, "", "") for query in queries])
    write_jsonl(folder / "queries.jsonl", queries)
    write_description(judge, folder)
    found = {}
    for system in systems:
        out_dir = folder / system.name
        responses = system.respond(queries, root, out_dir)
        verdicts, swapped = _judge(judge, queries, root, responses, out_dir, use_labels)
        found[system.name] = (responses, verdicts, swapped)
    hearings = _listen(
        folder, {name: part[0] for name, part in found.items()}, answers, num_workers
    )
    judged = {name: Judged(*part, hearings[name]) for name, part in found.items()}
    results = summarize(
        judged,
        queries,
        comparisons,
        judge=JudgeInfo.of(judge.describe(), card),
        query_set=query_set_of(queries, root),
        num_resamples=num_resamples,
        seed=seed,
    )
    tables.write_results(results, folder)
    (console or _console()).print(tables.to_rich(results))
    return results


def _console() -> rich.console.Console:
    """Where no terminal tells its width (a log), the table needs more than the usual 80 columns."""
    return rich.console.Console(width=None if sys.stdout.isatty() else 110)


def query_set_of(queries: Sequence[Query], root: Path) -> str:
    """Hash of what was asked: the queries' labels and the bytes of their wavs, in any order."""
    rows = []
    for query in queries:
        labels = dataclasses.asdict(query)
        del labels["wav"]
        rows.append([labels, file_digest(wave_lib.inside(root, query.wav))])
    return digest(sorted(rows, key=lambda row: row[0]["id"]))[:16]


def _check_names(names: Sequence[str], comparisons: Sequence[tuple[str, str]]) -> None:
    for name in names:
        if not _NAME.fullmatch(name) or names.count(name) > 1:
            raise BenchError(
                f"system name {name!r}: names must be unique and use only letters, digits, '_', "
                "'-' and '.'."
            )
    for pair in comparisons:
        for name in pair:
            if name not in names:
                raise BenchError(f"comparison {pair}: there is no system {name!r} in the bench.")


def _check_card(card: Card | None, judge: Judge) -> None:
    if card is not None and card.judge != judge.name:
        raise BenchError(
            f"the card is of {card.judge!r}, not of {judge.name!r}; examine the judge."
        )


def _judge(
    judge: Judge,
    queries: Sequence[Query],
    root: Path,
    responses: Sequence[Response],
    out_dir: Path,
    use_labels: bool,
) -> tuple[list[Verdict], list[Verdict]]:
    """(verdicts, swapped verdicts) in the order of the responses; written to the system's folder.

    Nothing is skipped when they are there already: the judge's ledger makes repeats cheap, and an
    answer that changed gets a new verdict.
    """
    by_id = {query.id: query for query in queries}
    pairs = [(by_id[response.query_id], response) for response in responses]
    pairs += aggregate.swap_pairs(queries, responses)
    answered = _with_wavs(pairs, root, out_dir)
    judged = judge.judge(answered, use_labels=use_labels)
    if len(judged) != len(answered):
        raise BenchError(f"the judge gave {len(judged)} verdicts for {len(answered)} pairs.")
    judged_in_turn = iter(judged)
    source = "label" if use_labels else "analyzer"
    found = [
        _unanswered(query, response, judge.name, source) if response.error else next(judged_in_turn)
        for query, response in pairs
    ]
    verdicts, swapped = found[: len(responses)], found[len(responses) :]
    swapped = [
        dataclasses.replace(
            verdict,
            query_id=response.query_id,
            raw=verdict.raw | {HEARD_QUERY: query.id},
        )
        for verdict, (query, response) in zip(swapped, pairs[len(responses) :], strict=True)
    ]
    write_jsonl(out_dir / "verdicts.jsonl", verdicts)
    write_jsonl(out_dir / "swapped.jsonl", swapped)
    return verdicts, swapped


def pairs_to_judge(
    queries: Sequence[Query], root: Path, responses: Sequence[Response], out_dir: Path
) -> list[Pair]:
    """What a bench asks its judge: each answer with its own query, then with the swapped one."""
    by_id = {query.id: query for query in queries}
    pairs = [(by_id[response.query_id], response) for response in responses]
    return _with_wavs([*pairs, *aggregate.swap_pairs(queries, responses)], root, out_dir)


def _with_wavs(pairs: Sequence[tuple[Query, Response]], root: Path, out_dir: Path) -> list[Pair]:
    """Those that were answered, with the paths of both wavs."""
    return [
        (query, wave_lib.inside(root, query.wav), response, out_dir / response.wav)
        for query, response in pairs
        if not response.error
    ]


def _unanswered(query: Query, response: Response, judge: str, style_source: str) -> Verdict:
    """The verdict on an answer that the system did not give: counted as failed, never dropped."""
    return Verdict(
        query_id=query.id,
        system=response.system,
        sample=response.sample,
        score=math.nan,
        status=f"respond: {response.error}",
        transcript_in="",
        style_in=query.style if style_source == "label" else "",
        style_source=style_source,
        transcript_out="",
        tone_out="",
        content=None,
        tone_fit=None,
        judge=judge,
        raw={"respond": {"error": response.error}},
    )


def _listen(
    folder: Path,
    responses: Mapping[str, Sequence[Response]],
    answers: Sequence[str],
    num_workers: int | None,
) -> dict[str, list[ear.Hearing]]:
    """What the ear names in each system's answers; a wav that it heard before is not heard again.

    All systems at once: the workers start once.
    """
    if not answers:
        return {name: [] for name in responses}
    known, keys, todo = {}, {}, {}
    for name, rows in responses.items():
        path = folder / name / "heard.jsonl"
        if path.is_file():
            known |= {row.key: row.heard for row in read_jsonl(path, ear.Hearing)}
        wavs = [folder / name / row.wav if answers and not row.error else None for row in rows]
        keys[name] = [ear.hearing_key(wav, answers) if wav else "" for wav in wavs]
        todo |= {key: wav for key, wav in zip(keys[name], wavs, strict=True) if wav}
    todo = {key: wav for key, wav in todo.items() if key not in known}
    known[""] = None
    heard = ear.hear_files(list(todo.values()), answers, num_workers=num_workers)
    known |= dict(zip(todo, heard, strict=True))
    hearings = {}
    for name, rows in responses.items():
        hearings[name] = [
            _hearing(row, key, known[key], answers)
            for row, key in zip(rows, keys[name], strict=True)
        ]
        write_jsonl(folder / name / "heard.jsonl", hearings[name])
    return hearings


def _hearing(
    response: Response, key: str, heard: str | None, answers: Sequence[str]
) -> ear.Hearing:
    expected = None if response.error else ear.nearest(response.text, answers)
    hit = expected is not None and heard == expected
    return ear.Hearing(response.query_id, response.sample, heard, expected, hit, key)


def summarize(
    judged: dict[str, Judged],
    queries: Sequence[Query],
    comparisons: Sequence[tuple[str, str]] = (),
    *,
    judge: JudgeInfo,
    query_set: str,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Results:
    """All figures of a bench from its rows; no audio is touched."""
    settings = {"num_resamples": num_resamples, "seed": seed}
    scores, rows = {}, []
    for name, part in judged.items():
        scores[name] = aggregate.scores_of(queries, part.verdicts, name)
        rows.append(
            SystemResult(
                name=name,
                scores=aggregate.column_estimates(queries, scores[name], **settings),
                swap=_swap_estimates(queries, scores[name], part.swapped, name, **settings),
                asr_hit=ear.hit_rate(part.hearings),
                asr_total=len(part.hearings),
                styles=aggregate.breakdown(queries, scores[name], aggregate.style_of, **settings),
                voices=aggregate.breakdown(queries, scores[name], _voice_of, **settings),
            )
        )
    verdicts = [verdict for part in judged.values() for verdict in part.verdicts + part.swapped]
    return Results(
        systems=tuple(rows),
        comparisons=tuple(
            comparison.compare(queries, scores[a], scores[b], names=(a, b), **settings)
            for a, b in comparisons
        ),
        judges=tuple(sorted({verdict.judge for verdict in verdicts})),
        style_sources=tuple(sorted({verdict.style_source for verdict in verdicts})),
        judge=judge,
        query_set=query_set,
        ear=ear.ear_name(),
        num_queries=len(queries),
        num_resamples=num_resamples,
    )


def _swap_estimates(
    queries: Sequence[Query],
    scores: Mapping[aggregate.Key, float],
    swapped: Sequence[Verdict],
    name: str,
    **settings,
) -> dict[str, Estimate]:
    """Swap gains by column; real speech, which has no other style, is no part of them."""
    paired = [query for query in queries if aggregate.column_of(query) not in aggregate.REAL]
    if not paired:
        return {aggregate.MEAN: Estimate(math.nan, math.nan, math.nan, 0, 0, 0)}
    ids = {query.id for query in paired}
    own = {key: score for key, score in scores.items() if key[0] in ids}
    gains = aggregate.swap_gains(own, aggregate.scores_of(paired, swapped, f"{name} (swapped)"))
    return aggregate.column_estimates(paired, gains, **settings)


def _voice_of(query: Query) -> str:
    return query.voice
