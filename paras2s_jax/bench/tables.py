"""Results of a bench: their file, their figures, and the table of paper section 4."""

import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.box
import rich.table
import rich.text

from paras2s_jax.bench.aggregate import MEAN, REAL, SYNTHETIC, BenchError, Estimate
from paras2s_jax.bench.comparison import POWER, Comparison
from paras2s_jax.data.records import with_null, write_text
from paras2s_jax.judge.card import Card

# How the versions of scorers that read a prompt begin (judge.endpoint_score, judge.local_score).
_PROMPT = re.compile(r"-prompt(\w+)(?:-|$)")
TITLES = {name: name.capitalize() for name in SYNTHETIC} | {
    "iemocap": "IEMOCAP",
    "meld": "MELD",
    MEAN: "Overall",
}


@dataclasses.dataclass(frozen=True)
class SystemResult:
    """One row: `scores` and `swap` by column (and `MEAN`), and what an independent ear heard.

    `asr_hit` is the share of `asr_total` answers whose words the ear names; NaN for a system
    without a text stream. `styles` has scores by "<column>/<style>", `voices` by voice.
    """

    name: str
    scores: dict[str, Estimate]
    swap: dict[str, Estimate]
    asr_hit: float
    asr_total: int
    styles: dict[str, Estimate]
    voices: dict[str, Estimate]


@dataclasses.dataclass(frozen=True)
class CardMark:
    """Whether the judge passed its card (answers of known worth), and what it failed there."""

    passed: bool
    failed: tuple[str, ...] = ()

    @classmethod
    def of(cls, card: Card) -> "CardMark":
        return cls(card.is_passed, card.failures or (() if card.is_passed else ("not probed",)))


@dataclasses.dataclass(frozen=True)
class JudgeInfo:
    """Who scored: rows of a table are comparable where this is the same.

    scorer: its name and version. prompt: version of the prompt of a scorer that reads one, "" for
    others. settings: every stage's model and settings (`judge.chain.Judge.describe`). card: None
    where the judge was not examined.
    """

    scorer: str
    prompt: str
    settings: dict[str, Any]
    card: CardMark | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any], card: Card | None = None) -> "JudgeInfo":
        """settings: of `Judge.describe`. card: of this judge."""
        scorer = settings["score"]["model"]
        prompt = _PROMPT.search(scorer)
        mark = None if card is None else CardMark.of(card)
        return cls(scorer, prompt[1] if prompt else "", dict(settings), mark)

    @property
    def hears_styles(self) -> bool:
        """Whether the scorer is given waveforms, and no names."""
        return self.settings.get("score", {}).get("wants") == "waves"

    @property
    def words(self) -> str:
        """The scorer, and the version of its prompt, in words."""
        return f"{self.scorer}, prompt version {self.prompt}" if self.prompt else self.scorer


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything a table or a report says about a bench.

    judges: names found in the verdicts. query_set: hash of the queries, their sound included.
    """

    systems: tuple[SystemResult, ...]
    comparisons: tuple[Comparison, ...]
    judges: tuple[str, ...]
    style_sources: tuple[str, ...]
    judge: JudgeInfo
    query_set: str
    ear: str
    num_queries: int
    num_resamples: int

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(name for name in SYNTHETIC + REAL if name in self.systems[0].scores)


def figures(results: Results) -> dict[str, float]:
    """Flat figures `bench/<system>/<name>` and `bench/<a>_vs_<b>/<name>` for summary.json."""
    flat = {}
    for system in results.systems:
        prefix = f"bench/{system.name}"
        for column, estimate in system.scores.items():
            flat[f"{prefix}/{column}"] = estimate.value
        gain = system.swap[MEAN]
        flat |= {
            f"{prefix}/swap_gain": gain.value,
            f"{prefix}/swap_gain_low": gain.low,
            f"{prefix}/swap_gain_high": gain.high,
            f"{prefix}/failed": float(system.scores[MEAN].num_failed),
            f"{prefix}/asr_hit": system.asr_hit,
        }
    for pair in results.comparisons:
        for name in ("rel", "low", "high", "diff", "effect_size", "p_value", "min_detectable"):
            flat[f"bench/{pair.a}_vs_{pair.b}/{name}"] = getattr(pair, name)
    return flat


def with_interval(estimate: Estimate, *, signed: bool = False) -> str:
    """'3.92 [3.80, 4.03]', or 'n/a' where nothing was scored."""
    if math.isnan(estimate.value):
        return "n/a"
    sign = "+" if signed else ""
    return f"{estimate.value:{sign}.2f} [{estimate.low:{sign}.2f}, {estimate.high:{sign}.2f}]"


def percent(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{100 * value:.0f} %"


def _part_mean(system: SystemResult, names: Sequence[str]) -> str:
    """Mean of columns as printed in the paper's averages, which carry no interval here."""
    value = float(np.mean([system.scores[name].value for name in names]))
    return "n/a" if math.isnan(value) else f"{value:.2f}"


def layout(results: Results) -> list[tuple[str, Callable[[SystemResult], str]]]:
    """(heading, cell of a system) per column; real columns only where there are any."""

    def score(column: str) -> Callable[[SystemResult], str]:
        return lambda system: with_interval(system.scores[column])

    synthetic = [name for name in results.columns if name in SYNTHETIC]
    real = [name for name in results.columns if name in REAL]
    columns = [("System", lambda system: system.name)]
    for title, names in (("Synthetic", synthetic), ("Real", real)):
        columns += [(TITLES[name], score(name)) for name in names]
        if synthetic and real:
            columns.append((title, lambda system, names=names: _part_mean(system, names)))
    return [
        *columns,
        ("Overall", score(MEAN)),
        ("Swap gain", lambda system: with_interval(system.swap[MEAN], signed=True)),
        ("Failed", lambda system: _failed(system.scores[MEAN])),
        ("Heard", lambda system: percent(system.asr_hit)),
    ]


def style_sources(results: Results) -> str:
    """Where the judge had the queries' styles from, in words."""
    if results.judge.hears_styles:
        return "heard by the scorer itself"
    source = {"analyzer": "heard by the analyzers", "label": "TRUE LABELS given to the judge"}
    return ", ".join(source[name] for name in results.style_sources)


def card_lines(card: CardMark | None) -> list[str]:
    """What a table must say of the judge's card: nothing where there is none."""
    if card is None:
        return []
    if card.passed:
        return ["The judge passed its card."]
    return [
        f"THE JUDGE FAILED ITS CARD ({'; '.join(card.failed)}): scores were forced, trust none."
    ]


def _failed(estimate: Estimate) -> str:
    return f"{estimate.num_failed}/{estimate.num_failed + estimate.num_scored}"


def caption(results: Results) -> list[str]:
    """Who judged what and how, and the paired comparisons; one sentence per line."""
    hits = {system.name: 100 * system.asr_hit for system in results.systems}
    return notes(results) + [
        _comparison_line(pair, hits[pair.a] - hits[pair.b]) for pair in results.comparisons
    ]


def notes(results: Results) -> list[str]:
    """Who judged what and how; one sentence per line."""
    swap_failed = ", ".join(
        f"{system.name} {system.swap[MEAN].num_failed}"
        for system in results.systems
        if system.swap[MEAN].num_failed
    )
    return [
        f"Judge: {', '.join(results.judges)}; scorer {results.judge.words}; style of the query: "
        f"{style_sources(results)}.",
        *card_lines(results.judge.card),
        f"{results.num_queries} queries, scores 1 to 5 [95 % CI: {results.num_resamples} bootstrap "
        "resamples of sentences].",
        "Swap gain: score of an answer minus its score against the same words in the other style; "
        "0 = tone-deaf.",
        "Failed: verdicts without a score, left out of the means."
        + (f" Answers without a swap gain: {swap_failed}." if swap_failed else ""),
        f"Heard: answers whose own words an ear outside the training names ({results.ear}).",
    ]


def _comparison_line(pair: Comparison, heard: float) -> str:
    """heard: percentage points by which the ear hears a better than b, NaN if it cannot tell."""
    unpaired = f", {pair.num_unpaired} unpaired" if pair.num_unpaired else ""
    return (
        f"{pair.a} against {pair.b}, paired: {100 * pair.rel:+.1f} % "
        f"[{100 * pair.low:+.1f}, {100 * pair.high:+.1f}], {pair.diff:+.2f} points, effect size "
        f"{pair.effect_size:+.2f}, p = {pair.p_value:.2g} ({pair.num_queries} queries{unpaired}; "
        f"{pair.min_detectable:.2f} points would be found with probability {POWER})"
    ) + ("." if math.isnan(heard) else f"; heard {heard:+.1f} points.")


def to_markdown(results: Results) -> str:
    columns = layout(results)
    rows = [[title for title, _ in columns], ["---"] + ["---:"] * (len(columns) - 1)]
    rows += [[cell(system) for _, cell in columns] for system in results.systems]
    lines = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows]
    return "\n".join(lines + [""] + [f"- {line}" for line in caption(results)]) + "\n"


def to_rich(results: Results) -> rich.table.Table:
    """The table for a terminal: intervals below their values, which halves its width."""
    table = rich.table.Table(
        title="ParaS2SBench",
        caption="\n".join(caption(results)),
        caption_justify="left",
        box=rich.box.SIMPLE_HEAVY,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    columns = layout(results)
    for title, _ in columns:
        table.add_column(title, justify="left" if title == "System" else "right")
    for system in results.systems:
        table.add_row(*(_stacked(cell(system)) for _, cell in columns))
    return table


def _stacked(cell: str) -> rich.text.Text:
    """'3.92 [3.80, 4.03]' as '3.92' above '3.80…4.03'."""
    value, _, interval = cell.partition(" [")
    text = rich.text.Text(value)
    if interval:
        low, high = interval.rstrip("]").split(", ")
        text.append(f"\n{low}…{high.lstrip('+')}", style="dim")
    return text


def to_csv(results: Results) -> str:
    """One line per system, quantity and column, style or voice, unrounded, for programs."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [field.name for field in dataclasses.fields(Estimate)]
    writer.writerow(["system", "quantity", "column", *names])
    for system in results.systems:
        for quantity, estimates in (
            ("score", system.scores),
            ("swap_gain", system.swap),
            ("style_score", system.styles),
            ("voice_score", system.voices),
        ):
            for column, estimate in estimates.items():
                values = dataclasses.astuple(estimate)
                writer.writerow([system.name, quantity, column, *values])
    return out.getvalue()


def write_results(results: Results, folder: Path) -> None:
    """Writes results.json, table.md and table.csv, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(with_null(dataclasses.asdict(results)), indent=1, allow_nan=False)
    for name, content in (
        ("table.md", to_markdown(results)),
        ("table.csv", to_csv(results)),
        ("results.json", text + "\n"),
    ):
        write_text(folder / name, content)


def read_results(folder: Path) -> Results:
    """Reads results.json of a bench's folder; BenchError where there is none, or a broken one."""
    path = folder / "results.json"
    if not path.is_file():
        raise BenchError(f"{path}: no such file; run the bench first.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return _from_json(values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BenchError(
            f"{path} is not the results of a bench of this version ({error}); run the bench again, "
            "which keeps answers and verdicts."
        ) from error


def _from_json(values: dict) -> Results:
    """Raises ValueError, TypeError, KeyError or AttributeError where the values do not fit."""
    systems = []
    for row in values.pop("systems"):
        estimates = {
            key: {name: Estimate(**_with_nan(part)) for name, part in row[key].items()}
            for key in ("scores", "swap", "styles", "voices")
        }
        systems.append(SystemResult(**_with_nan(row | estimates)))
    if not systems:
        raise ValueError("it has no system")
    judge = values.pop("judge")
    card = judge.pop("card")
    card = card and CardMark(card["passed"], tuple(card["failed"]))
    return Results(
        systems=tuple(systems),
        comparisons=tuple(Comparison(**_with_nan(row)) for row in values.pop("comparisons")),
        judges=tuple(values.pop("judges")),
        style_sources=tuple(values.pop("style_sources")),
        judge=JudgeInfo(**judge, card=card),
        **values,
    )


def _with_nan(row: dict) -> dict:
    return {key: math.nan if part is None else part for key, part in row.items()}
