"""Runs stages: prerequisites first, finished ones skipped, each closing with a summary.json."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_collections
from rich.console import Console
from rich.table import Table

from paras2s_jax import __version__
from paras2s_jax.data.records import write_text

SUMMARY, SETTINGS = "summary.json", "settings.json"
# Keys of any section that change how fast a stage is or what is kept of it, not what it makes.
INERT_KEYS = frozenset(
    {"num_workers", "griffin_lim_rows", "save_every", "keep", "keep_every", "max_skipped", "health"}
    # How a computation is cut up, which is a matter of the devices.
    | {"accum_steps", "logp_chunk", "remat", "scan_unroll", "halvings", "rollout_options"}
)

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
        on_all: it runs on every process at a time (it trains on the mesh); the others run on
            process 0, while the rest wait.
    """

    name: str
    help: str
    run: Callable[[ml_collections.ConfigDict, Path], Figures]
    needs: tuple[str, ...] = ()
    sections: tuple[str, ...] = ()
    on_all: bool = False


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A function by its name, imported when it runs: `--help` need not wait for JAX."""

    module: str
    function: str

    def load(self) -> Callable[..., Any]:
        """Imports the function."""
        return getattr(importlib.import_module(self.module), self.function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.load()(*args, **kwargs)


def _settings(section: object) -> object:
    """A config value as plain JSON data (tuples become lists), without the inert keys."""
    if isinstance(section, ml_collections.ConfigDict):
        section = section.to_dict()

    def keep(values: dict) -> dict:
        return {key: value for key, value in values.items() if key not in INERT_KEYS}

    return json.loads(json.dumps(section), object_hook=keep)


def _differences(old: object, new: object, path: str = "config") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        rows = []
        for key in sorted(set(old) | set(new)):
            rows += _differences(old.get(key), new.get(key), f"{path}.{key}")
        return rows
    return [] if old == new else [f"{path}: {old!r} then, {new!r} now"]


@functools.cache
def source_commit() -> str:
    """Commit of the source tree, or the installed version where there is no checkout."""
    root = Path(__file__).resolve().parents[2]
    # Only this tree's own .git counts: an installed copy may lie inside somebody's repository.
    if (root / ".git").exists() and shutil.which("git"):
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=False,
        )
        if found.returncode == 0:
            return found.stdout.strip()
    return f"v{__version__}"


def _peak_rss_gb() -> float:
    """Largest resident size so far of this process or of any one finished child, in GB.

    The system keeps one peak for the whole life of a process: a stage that runs after others in
    the same process reports the largest of them all. A stage's own peak is that of a run that
    found everything before it finished.
    """
    scale = 1.0 if sys.platform == "darwin" else 1024.0
    peak = max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return round(peak * scale / 1e9, 3)


def write_json(path: Path, value: object) -> None:
    """Writes JSON atomically, so that a killed stage never leaves half a file."""
    write_text(path, json.dumps(value, indent=1) + "\n")


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
    return {k: (float(v) if math.isfinite(v) else None) for k, v in figures.items()}


def finish(
    folder: Path, name: str, config: object, commit: str, started: float, figures: Figures
) -> None:
    """Closes what a stage or a measure made with its summary.json, and prints its figures.

    config: all that the figures depend on, as JSON data. started: time.monotonic() of the start.
    """
    summary = {
        "stage": name,
        "config": config,
        "commit": commit,
        "device": device(),
        "wall_s": round(time.monotonic() - started, 1),
        "peak_rss_gb": _peak_rss_gb(),
        "figures": _figures_for_json(figures),
    }
    write_json(folder / SUMMARY, summary)
    print_figures(f"{name} ({summary['wall_s']:.0f} s)", figures)


def figures_of(folder: Path) -> Figures:
    """The figures that a finished stage left in its folder (NaN where it had none)."""
    figures = json.loads((folder / SUMMARY).read_text())["figures"]
    return {name: math.nan if value is None else value for name, value in figures.items()}


class Runner:
    """Runs stages of one config in one workdir.

    A stage's folder holds settings.json from its start and summary.json from its end: `{stage,
    config, commit, device, wall_s, peak_rss_gb, figures}`, where config is what the results depend
    on, wall_s is the time of the run that finished it, and a figure that is not finite is null.

    Args:
        stages: every stage by name.
        config: the whole experiment.
        workdir: where each stage has its folder.
    """

    def __init__(self, stages: Mapping[str, Stage], config: ml_collections.ConfigDict, workdir):
        self.stages = stages
        self.config = config
        self.workdir = Path(workdir)

    def run(self, name: str) -> Figures:
        """Runs a stage after what it needs, each once; returns its figures.

        Raises:
            StageError: a folder in the workdir was made with other settings, or cannot be made,
                or the config lacks a section.
        """
        distributed = _distributed()
        distributed.on_main(f"check {name}", lambda: self._check(self.stages[name]))
        return self._run(name, {})

    def _relevant(self, stage: Stage) -> dict[str, object]:
        """The part of the config that the stage's results depend on, prerequisites included."""
        missing = [key for key in stage.sections if key not in self.config]
        if missing:
            raise StageError(f"the config has no {missing[0]!r}, which stage {stage.name} reads.")
        keys = set(stage.sections)
        for name in stage.needs:
            keys |= set(self._relevant(self.stages[name]))
        return {key: _settings(self.config[key]) for key in sorted(keys)}

    def _is_finished(self, stage: Stage) -> bool:
        return (self.workdir / stage.name / SUMMARY).exists()

    def _made_with(self, stage: Stage) -> object | None:
        """The settings with which a stage was finished or begun; None where it made nothing yet."""
        folder = self.workdir / stage.name
        if self._is_finished(stage):
            return json.loads((folder / SUMMARY).read_text())["config"]
        begun = (folder / SETTINGS).exists() and len(list(folder.iterdir())) > 1
        return json.loads((folder / SETTINGS).read_text()) if begun else None

    def _check(self, stage: Stage) -> None:
        """Refuses other settings before any work, for a stage and what it needs.

        A begun stage counts too: its checkpoints would go on under settings they do not come from.
        """
        then, now = self._made_with(stage), self._relevant(stage)
        changed = [] if then is None else _differences(then, now)
        if changed:
            raise StageError(
                f"{self.workdir / stage.name} was made with other settings "
                f"({'; '.join(changed[:3])}): "
                "give another --workdir, or delete that folder to make it anew."
            )
        if not self._is_finished(stage):
            for needed in stage.needs:
                self._check(self.stages[needed])

    def _run(self, name: str, done: dict[str, Figures]) -> Figures:
        if name in done:
            return done[name]
        stage, distributed = self.stages[name], _distributed()
        # Asked once for all processes: another one may finish it while this one looks.
        if distributed.on_main(f"look at {name}", lambda: self._is_finished(stage)):
            if distributed.is_main():
                print(f"✓ {name}: already finished in {self.workdir / name}")
            done[name] = figures_of(self.workdir / name)
        else:
            for needed in stage.needs:
                self._run(needed, done)
            done[name] = self._work(stage)
        return done[name]

    def _work(self, stage: Stage) -> Figures:
        folder, config, distributed = (
            self.workdir / stage.name,
            self._relevant(stage),
            _distributed(),
        )
        # Asked for at the start: the sources may be edited while the stage runs.
        commit, started = source_commit(), time.monotonic()
        distributed.on_main(f"begin {stage.name}", lambda: self._begin(stage, folder, config))
        if stage.on_all:
            figures = stage.run(self.config, self.workdir)
        else:
            figures = distributed.on_main(
                f"stage {stage.name}", lambda: stage.run(self.config, self.workdir)
            )
        distributed.on_main(
            f"finish {stage.name}",
            lambda: finish(folder, stage.name, config, commit, started, figures),
        )
        return figures

    def _begin(self, stage: Stage, folder: Path, config: dict[str, object]) -> None:
        print(f"▶ {stage.name}: {stage.help}", flush=True)
        try:
            write_json(folder / SETTINGS, config)
        except OSError as error:
            raise StageError(
                f"cannot write in {folder} ({error.strerror}): give another --workdir."
            ) from error


def _distributed():
    # Imported here so that `--help` and a wrong flag are answered at once.
    from paras2s_jax.train import distributed

    return distributed


@functools.cache
def device() -> str:
    """What JAX computes on here, as in "8 x TPU v5 lite (tpu)"."""
    # Imported here so that `--help` and a wrong flag are answered at once.
    import jax

    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
