"""A plan's memory as a picture: one bar per phase, against the chip."""

from __future__ import annotations

import html
from collections.abc import Sequence

from paras2s_jax.bench.charts import Scale, ticks
from paras2s_jax.plan.hardware import GIB
from paras2s_jax.plan.verdict import PhasePlan

WIDTH, LEFT, RIGHT, TOP, ROW, BAR, BOTTOM, LEGEND = 720, 84, 64, 34, 30, 18, 30, 20
COLOURS = {
    "policy": "#4e79a7",
    "optimizer": "#a0cbe8",
    "reference": "#59a14f",
    "reward model": "#8cd17d",
    "front end": "#b6992d",
    "inputs": "#f1ce63",
    "results": "#d37295",
    "temporaries": "#e15759",
}


def memory_chart(title: str, plans: Sequence[PhasePlan]) -> str:
    """An SVG of GiB on one device by phase and by what they are for."""
    limit = plans[0].topology.chip.hbm_bytes / GIB
    marks = ticks(0.0, max([limit, *(plan.hbm_bytes / GIB for plan in plans)]))
    x = Scale(0.0, marks[-1], LEFT, WIDTH - RIGHT)
    bottom = TOP + ROW * len(plans)
    lines = [
        f'<text x="{LEFT}" y="18" font-size="14">{html.escape(title)}</text>',
        *(
            f'<path d="M{x(mark)} {TOP}V{bottom}" stroke="#ddd"/>'
            f'<text x="{x(mark)}" y="{bottom + 14}" text-anchor="middle">{mark:g}</text>'
            for mark in marks
        ),
    ]
    for row, plan in enumerate(plans):
        y, start = TOP + ROW * row + (ROW - BAR) / 2, 0.0
        lines.append(
            f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{html.escape(plan.name)}</text>'
        )
        for name, colour in COLOURS.items():
            size = plan.parts.get(name, 0) / GIB
            width = round(x(start + size) - x(start), 2)
            if width > 0:
                lines.append(
                    f'<rect x="{x(start)}" y="{y}" width="{width}" height="{BAR}" '
                    f'fill="{colour}"><title>{name}: {size:.2f} GiB</title></rect>'
                )
            start += size
        lines.append(f'<text x="{x(start) + 6}" y="{y + 13}">{start:.1f}</text>')
    lines.append(f'<path d="M{x(limit)} {TOP}V{bottom}" stroke="#000" stroke-dasharray="4 3"/>')
    step = (WIDTH - 20) / len(COLOURS)
    for at, (name, colour) in enumerate(COLOURS.items()):
        left, y = 10 + step * at, bottom + BOTTOM
        lines.append(
            f'<rect x="{left:.0f}" y="{y}" width="10" height="10" fill="{colour}"/>'
            f'<text x="{left + 14:.0f}" y="{y + 9}">{name}</text>'
        )
    height = bottom + BOTTOM + LEGEND
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="sans-serif" font-size="11">\n' + "\n".join(lines) + "\n</svg>\n"
    )
