"""Geometry of the report's charts: numbers → SVG coordinates; the templates draw them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from paras2s_jax.bench.aggregate import MEAN, Estimate
from paras2s_jax.bench.tables import SystemResult
from paras2s_jax.train.metrics import read_metrics

# A panel in SVG units; the page scales it. Text is about 12 units high.
WIDTH, HEIGHT = 440, 236
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 36
ROW_HEIGHT, VALUE_WIDTH, CHAR_WIDTH = 30, 48, 7.6
# Longer names of systems are cut where they label a row of dots.
MAX_LABEL_CHARS = 22

# With more points than this a line is drawn faint, under its running mean over a window of
# 1 / SMOOTHING of them.
MANY_POINTS, SMOOTHING = 40, 12


@dataclasses.dataclass(frozen=True)
class Chart:
    """Curves of metrics.jsonl to draw in one panel.

    `series`: label -> metric name. `low`: a value that the axis must include.
    """

    title: str
    path: Path
    series: Mapping[str, str]
    note: str = ""
    low: float | None = None


def grpo_charts(path: Path) -> list[Chart]:
    """The curves that show whether RL went well, from the metrics.jsonl of GRPO."""
    return [
        Chart("Reward", path, {"mean": "reward/mean"}, "mean over scored answers, 1 to 5"),
        Chart(
            "KL to the SFT policy",
            path,
            {"text": "kl/text", "audio": "kl/audio"},
            "k3 estimate per token",
            low=0.0,
        ),
        Chart(
            "Spread of rewards in a group",
            path,
            {"standard deviation": "reward/std"},
            "without spread there is nothing to learn",
            low=0.0,
        ),
        Chart(
            "Entropy",
            path,
            {"text": "entropy/text", "audio": "entropy/audio"},
            "nats per token",
            low=0.0,
        ),
    ]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) that cover low..high."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(part for part in (1, 2, 5, 10) if part * power >= raw * (1 - 1e-9))
    # The slack keeps 0.30000000000000004 / 0.1 from adding a step.
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def running_mean(values: Sequence[float | None], window: int) -> list[float | None]:
    """Centred mean over `window` neighbours without the missing; None where all are missing."""
    means = []
    for at in range(len(values)):
        part = values[max(0, at - window // 2) : at + window // 2 + 1]
        part = [value for value in part if value is not None]
        means.append(sum(part) / len(part) if part else None)
    return means


@dataclasses.dataclass(frozen=True)
class Scale:
    """Maps low..high to start..stop of the SVG."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.stop - self.start), 2)


def _path(xs: Sequence[float], ys: Sequence[float | None], x: Scale, y: Scale) -> str:
    """An SVG path through the points; a missing value leaves a gap."""
    parts, pen_up = [], True
    for at_x, at_y in zip(xs, ys, strict=True):
        if at_y is None:
            pen_up = True
            continue
        parts.append(f"{'M' if pen_up else 'L'}{x(at_x)} {y(at_y)}")
        pen_up = False
    return " ".join(parts)


def line_panel(chart: Chart) -> dict:
    """What the template draws for a chart; `missing` lists metrics that the file does not have."""
    rows = read_metrics(chart.path)
    present = {name for row in rows for name in row}
    series = {label: name for label, name in chart.series.items() if name in present}
    missing = [name for name in chart.series.values() if name not in present]
    panel = {"title": chart.title, "note": chart.note, "missing": missing, "series": []}
    steps = [row["step"] for row in rows]
    columns = {label: [row.get(name) for row in rows] for label, name in series.items()}
    values = [value for column in columns.values() for value in column if value is not None]
    if not values:
        return panel
    low = min(values) if chart.low is None else min(chart.low, *values)
    y_ticks, x_ticks = ticks(low, max(values)), ticks(min(steps), max(steps))
    # Steps are whole: ticks between them, or beyond the run, would say nothing.
    x_ticks = [tick for tick in x_ticks if tick == int(tick) and steps[0] <= tick <= steps[-1]]
    x = Scale(steps[0], max(steps[-1], steps[0] + 1), LEFT, WIDTH - RIGHT)
    y = Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    many = len(steps) > MANY_POINTS
    for label, column in columns.items():
        smooth = running_mean(column, len(steps) // SMOOTHING) if many else column
        panel["series"].append(
            {
                "label": label,
                "path": _path(steps, smooth, x, y),
                "raw": _path(steps, column, x, y) if many else "",
                "values": column,
                "first": next(value for value in column if value is not None),
                "last": next(value for value in reversed(column) if value is not None),
            }
        )
    panel |= {
        "steps": steps,
        "x": [{"at": x(tick), "text": f"{tick:g}"} for tick in x_ticks],
        "y": [{"at": y(tick), "text": f"{tick:g}"} for tick in y_ticks],
        "at": [x(step) for step in steps],
        "smoothed": many,
    }
    return panel


def dot_panels(systems: Mapping[str, SystemResult]) -> list[dict]:
    """Overall scores and swap gains by name; what no system has gets no panel."""
    scores = [(name, system.scores[MEAN]) for name, system in systems.items()]
    gains = [(name, system.swap[MEAN]) for name, system in systems.items()]
    return [
        dot_panel(part, swap=swap)
        for part, swap in ((scores, False), (gains, True))
        if not all(math.isnan(estimate.value) for _, estimate in part)
    ]


def dot_panel(estimates: Sequence[tuple[str, Estimate]], *, swap: bool) -> dict:
    """Overall score, or swap gain, of each named system as a dot with its interval.

    At least one of the estimates must have a value.
    """
    ends = [
        end for _, part in estimates for end in (part.low, part.high) if not math.isnan(part.value)
    ]
    fixed = [0.0] if swap else [1.0, 5.0]
    marks = ticks(min(ends + fixed), max(ends + fixed), 4)
    labels = [_cut(name) for name, _ in estimates]
    start = max(60.0, 16 + CHAR_WIDTH * max(map(len, labels)))
    x = Scale(marks[0], marks[-1], start, WIDTH - VALUE_WIDTH - RIGHT)
    rows = []
    for index, (name, part) in enumerate(estimates):
        row = {
            "name": name,
            "label": labels[index],
            "at": TOP + ROW_HEIGHT * index + ROW_HEIGHT / 2,
            "text": "n/a",
        }
        row["says"] = row["text"]
        if not math.isnan(part.value):
            row |= {
                "low": x(part.low),
                "high": x(part.high),
                "value": x(part.value),
                "text": f"{part.value:{'+' if swap else ''}.2f}",
                "says": f"{part.value:.2f}, 95 % CI {part.low:.2f} to {part.high:.2f}",
            }
        rows.append(row)
    bottom = TOP + ROW_HEIGHT * len(rows)
    return {
        "title": "Style-swap gain" if swap else "Overall score",
        "note": "how much better an answer fits its own query than the same words in the other "
        "style; 0 = tone-deaf"
        if swap
        else "mean of the columns, 1 to 5",
        "rows": rows,
        "ticks": [{"at": x(mark), "text": f"{mark:g}"} for mark in marks],
        "zero": x(0.0) if swap else None,
        "start": start,
        "bottom": bottom,
        "height": bottom + 24,
    }


def _cut(name: str) -> str:
    return name if len(name) <= MAX_LABEL_CHARS else f"{name[: MAX_LABEL_CHARS - 1]}…"


def interval_mark(estimate: Estimate | None) -> dict | None:
    """A mean with its interval on the scale of 1 to 5, for a cell; None where nothing is scored."""
    if estimate is None or math.isnan(estimate.value):
        return None
    x = Scale(1.0, 5.0, 0.0, 100.0)
    return {
        "value": round(estimate.value, 4),
        "text": f"{estimate.value:.2f}",
        "interval": f"{estimate.low:.2f}…{estimate.high:.2f}",
        "count": estimate.num_scored,
        "failed": estimate.num_failed,
        "at": x(estimate.value),
        "low": x(estimate.low),
        "width": round(x(estimate.high) - x(estimate.low), 2),
    }
