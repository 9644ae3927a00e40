"""The command `judge`: any voice model's answers, judged, tabled, and shown on a page.

Also the judge's own card, its batch files, replays from the ledger, and leaderboards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from paras2s_jax.bench import run as bench_run
from paras2s_jax.bench import tables
from paras2s_jax.bench.aggregate import MEAN, columns_of
from paras2s_jax.bench.leaderboard import write_leaderboard
from paras2s_jax.bench.rating_page import write_rating_page
from paras2s_jax.bench.report import write_report
from paras2s_jax.bench.systems import KeptSystem
from paras2s_jax.data.bank import load_bank
from paras2s_jax.data.endpoint import ChatClient, Endpoint
from paras2s_jax.data.records import Query, Verdict, read_jsonl
from paras2s_jax.judge import agreement, batch_score, probes
from paras2s_jax.judge.card import Card, read_card, verdict_figures, write_card
from paras2s_jax.judge.chain import Judge
from paras2s_jax.judge.endpoint_score import EndpointScorer
from paras2s_jax.judge.ledger import Ledger
from paras2s_jax.judge.replay import DESCRIPTION, replay_judge
from paras2s_jax.stages.attack import attack_figures
from paras2s_jax.stages.judging import ENDPOINT, LEDGER, make_judge, make_scorer, use_labels
from paras2s_jax.stages.registry import Figures, StageError, print_figures
from paras2s_jax.stages.speech import maker_of
from paras2s_jax.stages.systems import make_system

NO_BATCH = "no"
BENCH, CARD, BATCH = "bench", "card", "batch"


def run(
    config: ConfigDict,
    workdir: str,
    *,
    queries: str,
    replay: bool = False,
    card: bool = False,
    humans: str | None = None,
    force: bool = False,
    batch: str = NO_BATCH,
) -> Figures:
    """Lets config.system answer the queries and judges what it said.

    Args:
        queries: a queries.jsonl; wavs relative to its folder.
        replay: makes the tables again from the ledger alone.
        card: judges the judge instead, on probes made for these queries.
        humans: CSV of the rating page, for the card.
        force: scores although the judge failed its card.
        batch: "write", "submit" or "collect" batch files instead of asking the scorer at once.

    Raises:
        StageError: the card was failed, or the arguments do not go together.
        EndpointError: a server gives nothing.
    """
    folder, path = Path(workdir), Path(queries)
    rows, root = read_jsonl(path, Query), path.parent
    if card:
        return _make_card(config, folder, rows, root, humans)
    if humans:
        raise StageError("--humans is for the judge card: give --card with it.")
    if replay:
        judge = replay_judge(folder / BENCH / DESCRIPTION, Ledger(folder / LEDGER))
    else:
        judge = make_judge(config, folder)
    found = _card_of(folder, judge, force)
    if batch != NO_BATCH:
        return _batch(config, folder, judge, rows, root, batch)
    results = bench_run.bench(
        [KeptSystem(config.system.name) if replay else make_system(config, folder)],
        rows,
        root,
        folder / BENCH,
        judge=judge,
        answers=(),
        use_labels=use_labels(config, rows),
        num_resamples=config.bench.num_resamples,
        seed=config.seed,
        card=found,
    )
    _write_pages(config, folder, root, results)
    return tables.figures(results)


def _write_pages(config: ConfigDict, folder: Path, root: Path, results: tables.Results) -> None:
    """The report, and the page on which people rate."""
    page = write_report(
        folder / BENCH,
        root,
        folder / "report" / "index.html",
        title=f"ParaS2S: does {config.system.name} listen?",
        sentences_per_column=config.bench.sentences_in_report,
    )
    print(f"open {page}")
    num_pairs = min(config.bench.num_rated_pairs, results.systems[0].scores[MEAN].num_scored)
    if num_pairs:
        out = folder / "rating" / "index.html"
        write_rating_page([folder / BENCH], root, out, num_pairs=num_pairs, seed=config.seed)
        print(f"let people rate: {out}")


def _card_of(folder: Path, judge: Judge, force: bool) -> Card | None:
    """This judge's card, if it has one; StageError if it failed it and nobody insists."""
    found = read_card(folder / CARD)
    if found is None or found.judge != judge.name:
        return None
    if not found.is_passed and not force:
        raise StageError(
            f"the judge {judge.name} failed its card ({'; '.join(found.failures)}): mend it, or "
            "score with --force, and the tables will say so."
        )
    return found


def _make_card(
    config: ConfigDict, folder: Path, queries: Sequence[Query], root: Path, humans: str | None
) -> Figures:
    """Probes, attacks, repeats and agreement of the judge; writes card.json and card.md."""
    judge, bank = make_judge(config, folder), load_bank()
    known = [q for q in queries if (q.dimension, q.style) in bank.rubric]
    if not known:
        raise StageError(
            "no query is of a style that the bank has answers for, so that no probe can be made: "
            f"give queries in {', '.join(sorted({style for _, style in bank.rubric}))}."
        )
    some = known[:: max(1, len(known) // config.bench.num_probes)]
    made = probes.build(
        some, bank, folder / CARD / "probes", seed=config.seed, maker=maker_of(config)
    )
    figures, verdicts = probes.run(judge, made, root, use_labels=use_labels(config, queries))
    figures |= verdict_figures(verdicts)
    figures["judge/usd_per_1000"] = _usd(config, figures) * 1000 / len(verdicts)
    attacked = attack_figures(config, folder)
    (changed,) = (value for name, value in attacked.items() if name.endswith("/changed"))
    figures |= attacked | {"judge/attack_changed": changed}
    agreements, ranking = {}, None
    if humans:
        judged = [
            verdict
            for path in sorted((folder / BENCH).glob("*/verdicts.jsonl"))
            for verdict in read_jsonl(path, Verdict)
        ]
        ratings = agreement.read_ratings(humans)
        agreements = agreement.by_dimension(queries, judged, ratings, seed=config.seed)
        ranking = agreement.rank_systems(judged, ratings)
    found = Card(judge.name, judge.describe(), figures, agreements, ranking)
    write_card(found, folder / CARD)
    print_figures("judge card", figures)
    for failure in found.failures:
        print(f"failed: {failure}")
    print(f"{'passed' if found.is_passed else 'NOT PASSED'}: {folder / CARD / 'card.md'}")
    return figures


def _usd(config: ConfigDict, figures: Figures) -> float:
    """What the scorer's tokens cost at the prices of the config; NaN where there are none."""
    c = config.judge.endpoint
    if config.judge.scorer != ENDPOINT or not (c.usd_per_million_in or c.usd_per_million_out):
        return math.nan
    tokens_in, tokens_out = (figures[f"judge/tokens_{way}"] for way in ("in", "out"))
    return 1e-6 * (tokens_in * c.usd_per_million_in + tokens_out * c.usd_per_million_out)


def _batch(
    config: ConfigDict, folder: Path, judge: Judge, queries: Sequence[Query], root: Path, step: str
) -> Figures:
    """One step of scoring by batch files."""
    scorer = make_scorer(config, folder)
    if not isinstance(scorer, EndpointScorer):
        raise StageError(
            "--batch needs a scorer behind a server: set --config.judge.scorer=endpoint."
        )
    client = ChatClient(Endpoint(**config.judge.endpoint))
    if step == "submit":
        started = batch_score.submit(folder / BATCH, client)
        print(f"submitted: {', '.join(started) or 'nothing new'}")
        return {"batch/submitted": len(started)}
    if step == "collect":
        found = batch_score.collect(folder / BATCH, client, Ledger(folder / LEDGER))
        for name in found.waiting:
            print(f"waiting: {name}")
        for key, reason in list(found.failures.items())[:10]:
            print(f"failed: {key[:12]} {reason}")
        return {
            "batch/scores": found.num_scores,
            "batch/failed": len(found.failures),
            "batch/waiting": len(found.waiting),
        }
    queries = [query for query in queries if columns_of([query])]
    system = make_system(config, folder)
    responses = system.respond(queries, root, folder / BENCH / system.name)
    pairs = bench_run.pairs_to_judge(queries, root, responses, folder / BENCH / system.name)
    pending = judge.pending(pairs, use_labels=use_labels(config, queries))
    files = batch_score.write(folder / BATCH, scorer, pending)
    print(f"{len(pending)} requests in {', '.join(map(str, files)) or 'no file'}")
    return {"batch/requests": len(pending)}


def compare(folders: Sequence[str], out: str) -> Path:
    """A leaderboard of finished benches: their folders, or those of the runs around them."""
    page = write_leaderboard(benches_of(folders), Path(out))
    print(f"open {page}")
    return page


def benches_of(folders: Sequence[str]) -> list[Path]:
    """Folders of benches: those given, or the ones inside runs."""
    return [
        path / BENCH if (path / BENCH / "results.json").is_file() else path
        for path in map(Path, folders)
    ]
