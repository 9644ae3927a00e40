"""report/index.html: tables, curves, players and every answer in one file that opens from disk."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paras2s_jax.bench import charts, page, tables
from paras2s_jax.bench.answer_table import answer_table
from paras2s_jax.bench.cards import Cards, select_sentences
from paras2s_jax.bench.charts import Chart
from paras2s_jax.bench.comparison import ALPHA, POWER
from paras2s_jax.bench.rows import read_queries, read_rows
from paras2s_jax.bench.sounds import Sounds
from paras2s_jax.bench.tables import Results


def write_report(
    folder: Path,
    root: Path,
    out: Path,
    *,
    curves: Sequence[Chart] = (),
    title: str = "ParaS2S bench",
    about: Mapping[str, str] | None = None,
    sentences_per_column: int = 4,
    max_mb: float = 12.0,
) -> Path:
    """Writes the page from the files of a bench.

    Args:
        folder: of `run.bench`.
        root: the queries' wavs are relative to it.
        out: the page, for instance report/index.html.
        curves: charts of metrics.jsonl files, for instance `charts.grpo_charts(path)`.
        about: facts for the top of the page (config, commit, hardware).
        sentences_per_column: how many sentences the page lays side by side for listening.
        max_mb: of sound inside the page; further answers play from their wavs, by relative links.

    Returns:
        out.
    """
    folder, root, out = Path(folder), Path(root), Path(out)
    results = tables.read_results(folder)
    queries = read_queries(folder)
    rows = {system.name: read_rows(folder, queries, system.name) for system in results.systems}
    sounds = Sounds(out, max_mb)
    picked = select_sentences(queries, sentences_per_column)
    cards = Cards(folder, root, queries, rows).within(picked, sounds)
    table = answer_table(folder, root, queries, rows, sounds, _held(cards))
    text = page.render(
        "report.html",
        styles=("page.css", "report.css"),
        scripts=("page.js", "listen.js", "curves.js", "answers.js"),
        title=title,
        about=dict(about or {}),
        panels=[charts.line_panel(chart) for chart in curves],
        frame=charts,
        cards=cards,
        num_sentences=len({query.sentence_id for query in queries}),
        num_linked=sounds.num_linked,
        table=table,
        **_figures(results),
    )
    return page.write(out, text)


def _figures(results: Results) -> dict[str, Any]:
    """What the page says of scores."""
    columns = tables.layout(results)
    return {
        "results": results,
        "judged_by": judged_by(results),
        "notes": tables.notes(results),
        "headings": [heading for heading, _ in columns],
        "rows": [
            [(cell(system), sort_value(cell(system))) for _, cell in columns]
            for system in results.systems
        ],
        "dots": charts.dot_panels({system.name: system for system in results.systems}),
        "breakdowns": breakdowns(results),
        "number": number,
        "alpha": ALPHA,
        "power": POWER,
    }


def _held(cards: Sequence[dict]) -> set[str]:
    """Names of the players that cards hold."""
    names = set()
    for take in (take for card in cards for take in card["takes"]):
        names.add(take["sound"])
        names |= {answer["sound"] for answer in take["answers"] if answer["audio"]}
    return names


def judged_by(results: Results) -> dict[str, str]:
    """Facts about the judge, for the top of a page."""
    facts = {
        "judge": ", ".join(results.judges),
        "scorer": results.judge.words,
        "styles": tables.style_sources(results),
        "queries": f"{results.num_queries} (set {results.query_set})",
    }
    for stage, part in results.judge.settings.items():
        if isinstance(part, Mapping) and "model" in part and stage != "score":
            facts[stage] = str(part["model"])
    return facts


def sort_value(cell: str) -> str:
    """What a cell sorts by: its number, "" for a cell that has none."""
    first = cell.split(" ", maxsplit=1)[0].split("/", maxsplit=1)[0].rstrip("%")
    try:
        return f"{float(first):g}"
    except ValueError:
        return ""


def number(value: float, spec: str = "g") -> str:
    """A number in Python's format `spec`; for the eye 'n/a', for sorting "", where it is NaN."""
    if math.isnan(value):
        return "" if spec == "g" else "n/a"
    return f"{value:{spec}}"


def breakdowns(results: Results) -> list[dict]:
    """Tables of scores by style and by voice, a column per system."""
    found = []
    for name, groups in (("Style", "styles"), ("Voice", "voices")):
        present = {group for system in results.systems for group in getattr(system, groups)}
        rows = []
        for group in sorted(present):
            column, _, style = group.rpartition("/")
            label = f"{tables.TITLES[column]}: {style}" if name == "Style" else group
            estimates = [getattr(system, groups).get(group) for system in results.systems]
            rows.append({"label": label, "cells": [charts.interval_mark(e) for e in estimates]})
        found.append({"name": name, "rows": rows})
    return found
