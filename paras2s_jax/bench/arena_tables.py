"""What an arena found: a table for the terminal, Markdown, CSV and JSON, and every vote."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import rich.table

from paras2s_jax.bench.arena import ArenaResult, Vote
from paras2s_jax.data.records import with_null, write_jsonl, write_text


def write(
    result: ArenaResult, votes: Sequence[Vote], about: Mapping[str, object], folder: Path
) -> None:
    """Writes arena.md, arena.csv, arena.json and votes.jsonl. about: what the tables say beside."""
    write_text(folder / "arena.md", to_markdown(result, about))
    write_text(folder / "arena.csv", to_csv(result))
    values = dataclasses.asdict(result) | {
        "about": dict(about),
        "wins": [[a, b, share] for (a, b), share in result.wins.items()],
    }
    write_text(folder / "arena.json", json.dumps(with_null(values), indent=1) + "\n")
    write_jsonl(folder / "votes.jsonl", votes)


def figures(result: ArenaResult) -> dict[str, float]:
    """arena/<system>/rating, _low, _high; arena/votes, arena/flip_rate, arena/first_share."""
    found = {}
    for row in result.ratings:
        name = f"arena/{row.system}/rating"
        found |= {name: row.rating, f"{name}_low": row.low, f"{name}_high": row.high}
    return found | {
        "arena/votes": float(result.num_votes),
        "arena/flip_rate": result.flip_rate,
        "arena/first_share": result.first_share,
    }


def _rows(result: ArenaResult) -> tuple[list[str], list[list[str]]]:
    """(headings, cells): systems, best first, with the share that each wins against the others."""
    names = [row.system for row in result.ratings]
    headings = ["Rank", "System", "Rating [95 %]", "Games", *(f"against {name}" for name in names)]
    cells = [
        [
            str(rank),
            row.system,
            f"{row.rating:.0f} [{row.low:.0f}, {row.high:.0f}]",
            f"{row.games:.0f}",
            *(_share(result.wins.get((row.system, name))) for name in names),
        ]
        for rank, row in enumerate(result.ratings, start=1)
    ]
    return headings, cells


def _share(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def _notes(result: ArenaResult, about: Mapping[str, object]) -> list[str]:
    first = "n/a" if math.isnan(result.first_share) else f"{result.first_share:.0%}"
    flips = "n/a" if math.isnan(result.flip_rate) else f"{result.flip_rate:.0%}"
    return [
        *(f"{name}: {value}" for name, value in about.items()),
        f"votes: {result.num_votes}; decided for the answer heard first: {first}; pairs whose "
        f"winner changes with the order: {flips}",
        "400 points are odds of 10 to 1; the mean is 1000; a tie is half a win",
    ]


def to_rich(result: ArenaResult, about: Mapping[str, object]) -> rich.table.Table:
    """The table for a terminal."""
    headings, cells = _rows(result)
    table = rich.table.Table(title="Arena", title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "System" else "right")
    for row in cells:
        table.add_row(*row)
    table.caption = "\n".join(_notes(result, about))
    table.caption_justify = "left"
    return table


def to_markdown(result: ArenaResult, about: Mapping[str, object]) -> str:
    """The table, and what it rests on."""
    headings, cells = _rows(result)
    lines = ["# Arena", ""]
    lines += [f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *cells)]
    lines += ["", *(f"- {note}" for note in _notes(result, about))]
    return "\n".join(lines) + "\n"


def to_csv(result: ArenaResult) -> str:
    """One line per system, unrounded."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([field.name for field in dataclasses.fields(result.ratings[0])])
    writer.writerows(dataclasses.astuple(row) for row in result.ratings)
    return out.getvalue()
