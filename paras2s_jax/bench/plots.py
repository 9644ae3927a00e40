"""Charts of a run as figures of matplotlib, for notebooks; the pages of a bench draw their own."""

import io
import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from paras2s_jax.bench.aggregate import MEAN, Estimate
from paras2s_jax.bench.charts import Chart
from paras2s_jax.bench.tables import Results
from paras2s_jax.train.metrics import read_metrics

PANEL_INCHES, COLUMNS = (4.5, 2.8), 2
DPI = 100


def curves(charts: Sequence[Chart]) -> Figure:
    """A panel per chart, two in a row.

    Raises:
        FileNotFoundError: a chart's metrics.jsonl has no row.
    """
    figure, panels = _panels(len(charts))
    for panel, chart in zip(panels, charts, strict=True):
        rows = read_metrics(chart.path)
        if not rows:
            raise FileNotFoundError(f"{chart.path} has no row yet; run the stage that writes it.")
        for label, name in chart.series.items():
            found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            panel.plot(*zip(*found) if found else ((), ()), label=label)
        panel.set_title(chart.title)
        panel.set_xlabel("step")
        panel.set_ylabel(chart.note)
        if chart.low is not None:
            panel.set_ylim(bottom=chart.low)
        if len(chart.series) > 1:
            panel.legend(frameon=False)
    return figure


def scores(results: Results) -> Figure:
    """Overall score and style-swap gain of each system, with 95 % intervals."""
    figure, panels = _panels(2)
    systems = {system.name: system for system in results.systems}
    _intervals(panels[0], {name: system.scores[MEAN] for name, system in systems.items()})
    _intervals(panels[1], {name: system.swap[MEAN] for name, system in systems.items()})
    panels[0].set_title("Overall score")
    panels[0].set_xlim(1, 5)
    panels[1].set_title("Style-swap gain")
    panels[1].axvline(0, color="grey", linewidth=0.8)
    return figure


def _intervals(panel, estimates: Mapping[str, Estimate]) -> None:
    for place, estimate in enumerate(estimates.values()):
        if not math.isnan(estimate.value):
            reach = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
            panel.errorbar(estimate.value, place, xerr=reach, fmt="o", capsize=3, color="C0")
    panel.set_yticks(range(len(estimates)), list(estimates))
    panel.set_ylim(len(estimates) - 0.5, -0.5)


def _panels(count: int) -> tuple[Figure, Sequence]:
    # No pyplot: nothing is kept between calls, and no screen is asked for.
    rows, (width, height) = -(-count // COLUMNS), PANEL_INCHES
    figure = Figure(figsize=(width * COLUMNS, height * rows), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for spare in panels[count:]:
        spare.set_axis_off()
    return figure, panels[:count]


def png(figure: Figure) -> bytes:
    """The figure as an image file."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI)
    return out.getvalue()
