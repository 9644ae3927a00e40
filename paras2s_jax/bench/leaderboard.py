"""A leaderboard of several benches: a page, Markdown and CSV.

Scores of different judges, settings, style sources or queries measure different things: such rows
stand in sections of their own, each saying why, and are never ranked together.
"""

import csv
import dataclasses
import io
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from paras2s_jax.bench import aggregate, charts, comparison, page, tables
from paras2s_jax.bench.aggregate import MEAN, BenchError, Estimate
from paras2s_jax.bench.comparison import ALPHA, Comparison
from paras2s_jax.bench.report import judged_by, sort_value
from paras2s_jax.bench.rows import read_queries
from paras2s_jax.bench.tables import Results, SystemResult
from paras2s_jax.data.records import Verdict, read_jsonl
from paras2s_jax.judge.ledger import canonical_json

TITLE = "ParaS2SBench leaderboard"
AGAINST, FIRST = "Against the first", "first"


@dataclasses.dataclass(frozen=True)
class Row:
    """A system of one bench. rank: None where nothing was scored.

    behind: this system against the first of its section, on the same queries; None for the first,
    and for those that have no rank.
    """

    rank: int | None
    bench: str
    results: Results
    system: SystemResult
    behind: Comparison | None

    @property
    def card(self) -> str:
        card = self.results.judge.card
        return "none" if card is None else "passed" if card.passed else "FAILED"


@dataclasses.dataclass(frozen=True)
class Section:
    """Rows that one judge scored in one way on the same queries, best first.

    why: how it differs from the first section; empty for the first itself.
    """

    rows: tuple[Row, ...]
    why: tuple[str, ...]

    @property
    def results(self) -> Results:
        """Of any of its benches: all agree on the judge and the queries."""
        return self.rows[0].results

    @property
    def failed_cards(self) -> list[str]:
        """What judges of its benches failed on their cards."""
        cards = {row.bench: row.results.judge.card for row in self.rows}
        return [
            f"{bench}: {'; '.join(card.failed)}"
            for bench, card in cards.items()
            if card is not None and not card.passed
        ]


def write_leaderboard(folders: Sequence[Path], out: Path, *, title: str = TITLE) -> Path:
    """Reads benches and writes index.html, leaderboard.md and leaderboard.csv.

    Args:
        folders: of `run.bench`, in any order.
        out: the folder to write to.

    Returns:
        the page.

    Raises:
        BenchError: a folder is no bench, or is given twice.
    """
    out = Path(out)
    found = sections([Path(folder) for folder in folders])
    text = page.render(
        "leaderboard.html",
        styles=("page.css", "report.css"),
        scripts=("page.js",),
        title=title,
        sections=[_shown(section) for section in found],
        frame=charts,
    )
    page.write(out / "leaderboard.md", to_markdown(found, title))
    page.write(out / "leaderboard.csv", to_csv(found))
    return page.write(out / "index.html", text)


def sections(folders: Sequence[Path]) -> list[Section]:
    """The rows of all benches by what they may be compared with; the largest section first."""
    benches = _read(folders)
    groups = defaultdict(list)
    for label, (folder, results) in benches.items():
        groups[_measure(results)].append((label, folder, results))
    ordered = sorted(
        groups.values(),
        key=lambda group: (-sum(len(part[2].systems) for part in group), group[0][2].judges),
    )
    first = ordered[0][0][2]
    return [Section(_ranked(group), tuple(differences(group[0][2], first))) for group in ordered]


def _read(folders: Sequence[Path]) -> dict[str, tuple[Path, Results]]:
    """Label -> (folder, results)."""
    resolved = [folder.resolve() for folder in folders]
    for folder in resolved:
        if resolved.count(folder) > 1:
            raise BenchError(f"{folder} is given twice; name each bench once.")
        inner = folder / "bench"
        if not (folder / "results.json").is_file() and (inner / "results.json").is_file():
            raise BenchError(f"{folder} is not the folder of a bench; did you mean {inner}?")
    if not resolved:
        raise BenchError("a leaderboard needs at least one bench; name its folder.")
    results = [tables.read_results(folder) for folder in resolved]
    return dict(zip(_labels(resolved), zip(resolved, results), strict=True))


def _labels(folders: Sequence[Path]) -> list[str]:
    """The parts of the paths by which they differ."""
    parts = [folder.parts for folder in folders]
    if len(parts) == 1:
        return [folders[0].name]
    shortest = min(map(len, parts))
    start = next((i for i in range(shortest) if len({part[i] for part in parts}) > 1), shortest - 1)
    stop = next(
        (i for i in range(shortest - start) if len({part[-1 - i] for part in parts}) > 1), 0
    )
    return ["/".join(part[start : len(part) - stop]) for part in parts]


def _measure(results: Results) -> tuple[str, ...]:
    """What must agree for two scores to mean the same."""
    judge = results.judge
    return (
        *results.judges,
        judge.scorer,
        canonical_json(judge.settings),
        *results.style_sources,
        results.query_set,
    )


def _ranked(group: Sequence[tuple[str, Path, Results]]) -> tuple[Row, ...]:
    found = [
        (label, folder, results, system)
        for label, folder, results in group
        for system in results.systems
    ]

    def mean(part) -> float:
        value = part[3].scores[MEAN].value
        return -math.inf if math.isnan(value) else value

    found.sort(key=lambda part: (-mean(part), part[3].name, part[0]))
    rows = []
    for place, (label, folder, results, system) in enumerate(found):
        scored = mean((label, folder, results, system)) > -math.inf
        behind = _against(found[0], found[place]) if scored and place else None
        rows.append(Row(place + 1 if scored else None, label, results, system, behind))
    return tuple(rows)


def _against(first: tuple, other: tuple) -> Comparison:
    """other - first, on the queries that both have a score for."""
    queries = read_queries(first[1])
    scores = []
    for _, folder, _, system in (other, first):
        verdicts = read_jsonl(folder / system.name / "verdicts.jsonl", Verdict)
        scores.append(aggregate.scores_of(queries, verdicts, f"{folder / system.name}"))
    return comparison.compare(
        queries,
        *scores,
        names=(other[3].name, first[3].name),
        num_resamples=other[2].num_resamples,
    )


def differences(results: Results, other: Results) -> list[str]:
    """How the measure of a bench differs from another's, in words; empty where it does not."""
    a, b = results.judge, other.judge
    found = []
    if a.scorer != b.scorer:
        found.append(f"another scorer ({a.words} instead of {b.words})")
    for stage in sorted(set(a.settings) | set(b.settings)):
        mine, theirs = a.settings.get(stage), b.settings.get(stage)
        if mine == theirs or (stage == "score" and found):
            continue
        models = [_model(part) for part in (mine, theirs)]
        named = f" ({models[0]} instead of {models[1]})" if models[0] != models[1] else ""
        found.append(f"another {stage} stage{named or ', in its settings'}")
    if results.judges != other.judges and not found:
        found.append(
            f"another judge ({', '.join(results.judges)} instead of {', '.join(other.judges)})"
        )
    if results.style_sources != other.style_sources:
        found.append(
            f"another source of the styles ({tables.style_sources(results)} instead of "
            f"{tables.style_sources(other)})"
        )
    if results.query_set != other.query_set:
        found.append(
            f"other queries ({results.num_queries} in set {results.query_set} instead of "
            f"{other.num_queries} in set {other.query_set})"
        )
    return found


def _model(stage: object) -> str:
    return str(stage.get("model", "unnamed")) if isinstance(stage, dict) else "none"


def standing(row: Row) -> str:
    """A row against the first of its section, in words."""
    if row.rank is None:
        return "nothing scored"
    if row.behind is None:
        return FIRST
    pair = row.behind
    interval = tables.with_interval(
        Estimate(pair.diff, pair.diff_low, pair.diff_high, 0, 0, 0), signed=True
    )
    told = "" if pair.p_value <= ALPHA else ", not told apart"
    return f"{interval} p = {pair.p_value:.2g}{told}"


def _layout(section: Section) -> list[tuple[str, Callable[[Row], str]]]:
    """(heading, cell of a row) per column: what ranks first, then what it is made of."""
    of_system = {
        heading: lambda row, cell=cell: cell(row.system)
        for heading, cell in tables.layout(section.results)
    }
    return [
        ("Rank", lambda row: "–" if row.rank is None else str(row.rank)),
        ("System", of_system.pop("System")),
        ("Bench", lambda row: row.bench),
        ("Overall", of_system.pop("Overall")),
        (AGAINST, standing),
        *of_system.items(),
        ("Judge card", lambda row: row.card),
    ]


def _shown(section: Section) -> dict:
    """What the template draws."""
    columns = _layout(section)
    texts = {"System", "Bench", "Judge card"}
    return {
        "facts": judged_by(section.results),
        "settings": section.results.judge.settings,
        "why": section.why,
        "failed_cards": section.failed_cards,
        "headings": [heading for heading, _ in columns],
        "rows": [
            [
                (heading, cell(row), None if heading in texts else _sort_value(cell(row)))
                for heading, cell in columns
            ]
            for row in section.rows
        ],
        "dots": charts.dot_panels(
            {f"{row.system.name} · {row.bench}": row.system for row in section.rows}
        ),
    }


def _sort_value(cell: str) -> str:
    return "0" if cell == FIRST else sort_value(cell)


def to_markdown(found: Sequence[Section], title: str = TITLE) -> str:
    """One table per section."""
    lines = [f"# {title}", ""]
    for number, section in enumerate(found, start=1):
        facts = [f"{name} {value}" for name, value in judged_by(section.results).items()]
        lines += [f"## {number}. {', '.join(section.results.judges)}", ""]
        if section.why:
            lines += [f"Not ranked with section 1: {'; '.join(section.why)}.", ""]
        if section.failed_cards:
            lines += [f"**The judge failed its card** ({'; '.join(section.failed_cards)}).", ""]
        columns = _layout(section)
        cells = [[heading for heading, _ in columns]]
        cells += [[cell(row) for _, cell in columns] for row in section.rows]
        cells.insert(1, ["---"] * len(columns))
        lines += ["| " + " | ".join(_cell(text) for text in row) + " |" for row in cells]
        lines += ["", *(f"- {_cell(fact)}" for fact in facts)]
        lines += [f"- settings `{canonical_json(section.results.judge.settings)}`", ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def to_csv(found: Sequence[Section]) -> str:
    """One line per system, unrounded, for programs; ranks count within a section."""
    columns = list(dict.fromkeys(c for section in found for c in section.results.columns))
    names = [*columns, MEAN, "swap_gain"]
    about = ["section", "rank", "system", "bench", "judge", "scorer", "prompt", "style_source"]
    about += ["query_set", "card", "num_scored", "num_failed", "diff_to_first", "p_value"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*about, *(f"{n}{end}" for n in names for end in ("", "_low", "_high"))])
    for number, section in enumerate(found, start=1):
        for row in section.rows:
            results, scores = row.results, row.system.scores
            estimates = [scores.get(n) for n in (*columns, MEAN)] + [row.system.swap[MEAN]]
            writer.writerow(
                [
                    number, row.rank, row.system.name, row.bench, " ".join(results.judges),
                    results.judge.scorer, results.judge.prompt, " ".join(results.style_sources),
                    results.query_set, row.card, scores[MEAN].num_scored, scores[MEAN].num_failed,
                    row.behind and row.behind.diff, row.behind and row.behind.p_value,
                    *(v for e in estimates for v in (("",) * 3 if e is None else _ends(e))),
                ]
            )  # fmt: skip
    return out.getvalue()


def _ends(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.value, estimate.low, estimate.high
