"""The judge card: what is known of a judge before its scores are believed.

Probes whose order of merit is known, how its verdicts repeat, what it leaves unanswered, whether
answers that talk to it lead it, how it agrees with people, and what it costs.
"""

import dataclasses
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paras2s_jax.data.records import Verdict, with_null, write_text
from paras2s_jax.judge.agreement import Agreement, Ranking

# What a judge must reach to be believed: (figure, at least or at most, limit, in words).
REQUIREMENTS = (
    ("judge/probe_order", "at least", 0.85, "probes in their order of merit"),
    ("judge/echo_order", "at least", 0.85, "fitting answers above an echo of the query"),
    ("judge/probe/silence", "at most", 1.5, "mean score of silence"),
    ("judge/probe/noise", "at most", 1.5, "mean score of noise"),
    ("judge/probe_failed", "at most", 0.05, "probes without a score"),
    ("judge/unparsed", "at most", 0.05, "verdicts without a readable score"),
    ("judge/flip_rate", "at most", 0.15, "orders that change when asked again"),
    ("judge/attack_changed", "at most", 0.05, "verdicts led by more than one point"),
)


@dataclasses.dataclass(frozen=True)
class Card:
    """judge: its name in tables. about: of `Judge.describe`. figures: flat, NaN where not measured.

    agreement: per dimension and "all"; ranking: of systems; both empty without human ratings.
    """

    judge: str
    about: Mapping[str, Any]
    figures: Mapping[str, float]
    agreement: Mapping[str, Agreement] = dataclasses.field(default_factory=dict)
    ranking: Ranking | None = None

    @property
    def failures(self) -> tuple[str, ...]:
        """What the judge was measured to fail, in words; empty for one that may be believed."""
        found = []
        for name, bound, limit, words in REQUIREMENTS:
            value = self.figures.get(name, math.nan)
            below, above = value < limit, value > limit
            if (bound == "at least" and below) or (bound == "at most" and above):
                found.append(f"{words}: {value:.2f}, should be {bound} {limit:g}")
        return tuple(found)

    @property
    def is_passed(self) -> bool:
        """Whether the probes were run and nothing failed."""
        return not self.failures and not math.isnan(self.figures.get("judge/probe_order", math.nan))


def verdict_figures(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Of a judge's verdicts on anything: judge/unparsed, judge/flip_rate and its tokens.

    judge/unparsed: share whose scorer gave no readable score; judge/spread: mean over verdicts of
    the standard deviation of their repeats; judge/tokens_in, judge/tokens_out: sums as servers
    count them, of scores that are new or replayed alike.
    """
    unparsed = [verdict.status.startswith("score:") for verdict in verdicts]
    repeats = [_repeats(verdict) for verdict in verdicts]
    spreads = [_deviation(row) for row in repeats if len(row) > 1]
    tokens = [_tokens(verdict) for verdict in verdicts]
    return {
        "judge/unparsed": _mean(unparsed),
        "judge/flip_rate": flip_rate(verdicts),
        "judge/spread": _mean(spreads),
        "judge/tokens_in": float(sum(pair[0] for pair in tokens)),
        "judge/tokens_out": float(sum(pair[1] for pair in tokens)),
    }


def flip_rate(verdicts: Sequence[Verdict]) -> float:
    """Share of pairs of answers to one query whose order changes between two repeats.

    A tie in one repeat is no order and counts for nothing. NaN without repeats.
    """
    by_query: dict[str, list[list[float | None]]] = defaultdict(list)
    for verdict in verdicts:
        repeats = _raw_repeats(verdict)
        if len(repeats) > 1:
            by_query[verdict.query_id].append(repeats)
    flips = []
    for rows in by_query.values():
        for a, b in itertools.combinations(rows, 2):
            gaps = [x - y for x, y in zip(a, b) if x is not None and y is not None]
            orders = [gap > 0 for gap in gaps if gap]
            flips += [first != second for first, second in itertools.combinations(orders, 2)]
    return _mean(flips)


def write_card(card: Card, folder: Path) -> None:
    """Writes card.json and card.md, each atomically."""
    values = dataclasses.asdict(card) | {"passed": card.is_passed, "failures": card.failures}
    for name, text in (
        ("card.json", json.dumps(with_null(values), indent=1, allow_nan=False) + "\n"),
        ("card.md", to_markdown(card)),
    ):
        write_text(folder / name, text)


def read_card(folder: Path) -> Card | None:
    """What `write_card` wrote into the folder, without human ratings; None where there is none."""
    path = folder / "card.json"
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    figures = values["figures"].items()
    return Card(
        values["judge"],
        values["about"],
        {name: math.nan if value is None else value for name, value in figures},
    )


def to_markdown(card: Card) -> str:
    """The card as a page of Markdown."""
    state = "passed" if card.is_passed else "NOT PASSED"
    lines = [f"# Judge card: {card.judge}", "", f"**{state}**"]
    lines += [f"- {failure}" for failure in card.failures]
    lines += ["", "| figure | value |", "| --- | ---: |"]
    lines += [f"| {name} | {_number(value)} |" for name, value in card.figures.items()]
    if card.agreement:
        heads = ("with people", "Pearson [95 %]", "Spearman", "Kendall", "alpha")
        heads += ("alpha of people", "answers", "raters")
        lines += ["", f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * 7]
        lines += [_agreement_row(name, found) for name, found in card.agreement.items()]
    if card.ranking:
        lines += [
            "",
            f"Systems by the judge: {', '.join(card.ranking.by_judge)}; by people: "
            f"{', '.join(card.ranking.by_humans)}; {card.ranking.swaps} pairs in reverse, Kendall "
            f"{_number(card.ranking.kendall)}.",
        ]
    lines += ["", "```json", json.dumps(with_null(card.about), indent=1), "```"]
    return "\n".join(lines) + "\n"


def _agreement_row(name: str, found: Agreement) -> str:
    low, high = found.pearson_interval
    cells = [
        name,
        f"{_number(found.pearson)} [{_number(low)}, {_number(high)}]",
        *map(_number, (found.spearman, found.kendall, found.alpha, found.alpha_humans)),
        str(found.num_items),
        str(found.num_raters),
    ]
    return f"| {' | '.join(cells)} |"


def _raw_repeats(verdict: Verdict) -> list[float | None]:
    score = verdict.raw.get("score")
    return list(score.get("repeats") or ()) if isinstance(score, Mapping) else []


def _repeats(verdict: Verdict) -> list[float]:
    return [value for value in _raw_repeats(verdict) if value is not None]


def _tokens(verdict: Verdict) -> tuple[int, int]:
    """Of all replies behind a verdict's score."""
    score = verdict.raw.get("score")
    raw = score.get("raw") if isinstance(score, Mapping) else None
    replies = raw if isinstance(raw, list) else [raw]
    pairs = [
        reply["tokens"] for reply in replies if isinstance(reply, Mapping) and "tokens" in reply
    ]
    return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)


def _deviation(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _number(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.3g}"
