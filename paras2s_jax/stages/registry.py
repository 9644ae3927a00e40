"""Runs stages: prerequisites first, finished ones skipped, each closing with a summary.json."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import ml_collections
from rich.console import Console
from rich.table import Table

Figures = dict[str, float]


class StageError(RuntimeError):
    """A stage cannot run as asked; the message is one sentence that names the remedy."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of the method.

    Attributes:
        name: subcommand and folder name under the workdir.
        help: one line for `paras2s --help`.
        run: `(config, workdir) -> figures`; writes its files under `workdir/name`.
        needs: names of the stages whose files it reads.
        sections: config keys whose values its results depend on.
    """

    name: str
    help: str
    run: Callable[[ml_collections.ConfigDict, Path], Figures]
    needs: tuple[str, ...] = ()
    sections: tuple[str, ...] = ()


def plain(value: object) -> object:
    """A config value as plain JSON data (tuples become lists)."""
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()
    return json.loads(json.dumps(value))


def _differences(old: object, new: object, path: str = "config") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        rows = []
        for key in sorted(set(old) | set(new)):
            rows += _differences(old.get(key), new.get(key), f"{path}.{key}")
        return rows
    return [] if old == new else [f"{path}: {old!r} then, {new!r} now"]


def _commit() -> str:
    """Commit of the source tree, or the installed version where there is no checkout."""
    from paras2s_jax import __version__

    here = Path(__file__).resolve().parent
    found = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() if found.returncode == 0 else f"v{__version__}"


def _peak_rss_gb() -> float:
    """Largest resident size of this process or of any finished child, in GB."""
    scale = 1.0 if sys.platform == "darwin" else 1024.0
    peak = max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return round(peak * scale / 1e9, 3)


def write_json(path: Path, value: object) -> None:
    """Writes JSON atomically, so that a killed stage never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)


def print_figures(title: str, figures: Figures, console: Console | None = None) -> None:
    """Prints figures as a two-column table."""
    if not figures:
        return
    table = Table(title=title, title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4g}")
    (console or Console()).print(table)


def _figures_for_json(figures: Figures) -> dict[str, float | None]:
    return {k: (None if math.isnan(v) else float(v)) for k, v in figures.items()}


def figures_of(folder: Path) -> Figures:
    """The figures that a finished stage left in its folder (NaN where it had none)."""
    figures = json.loads((folder / "summary.json").read_text())["figures"]
    return {name: math.nan if value is None else value for name, value in figures.items()}


class Runner:
    """Runs stages of one config in one workdir.

    Args:
        stages: every stage by name.
        config: the whole experiment.
        workdir: where each stage has its folder.
    """

    def __init__(self, stages: Mapping[str, Stage], config: ml_collections.ConfigDict, workdir):
        self.stages = stages
        self.config = config
        self.workdir = Path(workdir)

    def _relevant(self, stage: Stage) -> dict[str, object]:
        """The part of the config that the stage's results depend on, prerequisites included."""
        keys = set(stage.sections)
        for name in stage.needs:
            keys |= set(self._relevant(self.stages[name]))
        return {key: plain(self.config[key]) for key in sorted(keys)}

    def _finished(self, stage: Stage) -> Figures | None:
        path = self.workdir / stage.name / "summary.json"
        if not path.exists():
            return None
        summary = json.loads(path.read_text())
        changed = _differences(summary["config"], self._relevant(stage))
        if changed:
            raise StageError(
                f"{path.parent} was made with other settings ({'; '.join(changed[:3])}): "
                "give another --workdir, or delete that folder to make it anew."
            )
        return figures_of(path.parent)

    def run(self, name: str) -> Figures:
        """Runs a stage after what it needs; returns its figures.

        Raises:
            StageError: a finished stage in the workdir was made with other settings.
        """
        stage = self.stages[name]
        done = self._finished(stage)
        if done is not None:
            print(f"✓ {name}: already finished in {self.workdir / name}")
            return done
        for needed in stage.needs:
            self.run(needed)
        print(f"▶ {name}: {stage.help}", flush=True)
        started = time.monotonic()
        (self.workdir / name).mkdir(parents=True, exist_ok=True)
        figures = stage.run(self.config, self.workdir)
        summary = {
            "stage": name,
            "config": self._relevant(stage),
            "commit": _commit(),
            "device": _device(),
            "wall_s": round(time.monotonic() - started, 1),
            "peak_rss_gb": _peak_rss_gb(),
            "figures": _figures_for_json(figures),
        }
        write_json(self.workdir / name / "summary.json", summary)
        print_figures(f"{name} ({summary['wall_s']:.0f} s)", figures)
        return figures


@functools.cache
def _device() -> str:
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
