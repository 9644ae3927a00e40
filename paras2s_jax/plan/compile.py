"""`paras2s compile`: what a stage needs on a slice of chips, before any is rented.

Each phase's program is compiled for the slice in a process of its own; memory and bytes on the
links are read from what the compiler made, operations come from formulas (plan.counts).
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from paras2s_jax.plan import aot, counted, verdict, work
from paras2s_jax.plan.aot import COMPILED, DESCRIBED, Compiled
from paras2s_jax.plan.chart import memory_chart
from paras2s_jax.plan.hardware import GIB, PlanError, Topology, topology_of
from paras2s_jax.plan.sizes import sizes_of
from paras2s_jax.plan.verdict import PhasePlan
from paras2s_jax.stages.registry import Figures, finish, source_commit, write_json

PLAN, CHART = "plan.json", "memory.svg"
TOTALS = {
    "hbm_gib": "largest phase, GiB on a chip",
    "flops": "FLOP of a step",
    "floor_s": "floor of a step, s",
    "step_s": "expected of a step, s (floor / efficiency)",
    "steps": "steps",
    "hours": "hours",
    "chip_hours": "chip-hours",
    "judge_calls": "calls of the judge",
    "chips_cost": "price of the chips",
    "judge_cost": "price of the judge",
}


def run(
    config: ConfigDict,
    workdir: str,
    stage: str,
    phases: str = "",
    efficiency: float = 0.4,
    chip_hour_price: float = 0.0,
    judge_price: float = 0.0,
    reuse: bool = False,
    jobs: int = 1,
) -> Figures:
    """Plans a stage, writes WORKDIR/plan/STAGE/{plan.json, memory.svg, summary.json}, prints it.

    Raises:
        PlanError: it cannot be planned, or does not fit.
    """
    if not 0.0 < efficiency <= 1.0:
        raise PlanError(f"--efficiency is {efficiency}: give a share in (0, 1].")
    if jobs < 1:
        raise PlanError(f"--jobs is {jobs}: give how many phases to compile at one time.")
    commit, started = source_commit(), time.monotonic()
    topology = _topology(config)
    folder = Path(workdir) / "plan" / stage
    only = [name for name in phases.split(",") if name]
    plans = make(config, stage, topology, folder, only, reuse, jobs)
    totals = total(config, stage, topology, plans, efficiency, chip_hour_price, judge_price)
    title = f"{stage} on {topology.name}"
    print_plan(title, plans, totals)
    chart = memory_chart(f"{title}: GiB on a chip", plans)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CHART).write_text(chart, encoding="utf-8")
    write_json(
        folder / PLAN,
        {"topology": dataclasses.asdict(topology), "stage": stage, "totals": totals}
        | {"phases": [_as_json(plan) for plan in plans]},
    )
    figures = figures_of(stage, topology, plans, totals)
    finish(folder, "compile", config.to_dict(), commit, started, figures)
    if not verdict.fits(plans):
        raise PlanError(verdict.refusal(plans, stage))
    return figures


def _topology(config: ConfigDict) -> Topology:
    if "topology" not in config or not config.topology:
        raise PlanError(
            "the config names no topology: set --config.topology, or take a config that has one, "
            "for example --config=configs/kimi_audio_7b.py:v5p-4x4x4."
        )
    return topology_of(config.topology)


def make(
    config: ConfigDict,
    stage: str,
    topology: Topology,
    folder: Path,
    only: Sequence[str] = (),
    reuse: bool = False,
    jobs: int = 1,
) -> list[PhasePlan]:
    """Compiles, or for chips without a compiler counts, every phase of a stage's step.

    only: names of the phases to compile; the others are left out. reuse: whether phases that were
    compiled in this folder before, with the same config, are taken as they are. jobs: how many are
    compiled at one time, by a process each.

    Raises:
        PlanError: there is no compiler, no such phase, or a program does not compile.
    """
    aot.check_compiler(topology)
    reuse = aot.write_config(config, folder) and reuse
    job = {"stage": stage, "topology": topology.name, "num_devices": topology.num_chips}
    aot.run_worker(folder / "describe", job | {"phase": None})
    described = json.loads((folder / "describe" / DESCRIBED).read_text())
    found = [Compiled(**values) for values in described["phases"]]
    names = [phase.phase for phase in found]
    unknown = sorted(set(only) - set(names))
    if unknown:
        raise PlanError(f"stage {stage} has no phase {unknown[0]!r}; it has {', '.join(names)}.")
    sizes = sizes_of(config)
    shape = work.shape_of(config, stage, described["trained_params"])
    found = [phase for phase in found if not only or phase.phase in only]
    if topology.aot is not None:
        places = [folder / phase.phase for phase in found]
        missing = [place for place in places if not (reuse and (place / COMPILED).exists())]
        _compile(missing, job, jobs)
    plans = []
    for phase in found:
        if topology.aot is None:
            made = counted.count(stage, phase, sizes, shape, config.policy.logp_chunk)
        else:
            made = Compiled.load(folder / phase.phase / COMPILED)
        plans.append(PhasePlan(made, work.PHASES[stage][phase.phase](sizes, shape), topology))
    return plans


def _compile(places: Sequence[Path], job: dict[str, Any], jobs: int) -> None:
    """Compiles the phases that the folders are named after, `jobs` at a time.

    Raises:
        PlanError: one does not compile; those not begun are left.
    """
    title = f"{job['stage']} on {job['topology']}"
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(places), unit="phase") as bar:
        bar.set_description(f"{title}: compile")
        running = {
            pool.submit(aot.run_worker, place, job | {"phase": place.name}, dump=True): place.name
            for place in places
        }
        try:
            for future in as_completed(running):
                future.result()
                bar.set_description(f"{title}: {running[future]} compiled")
                bar.update()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def total(
    config: ConfigDict,
    stage: str,
    topology: Topology,
    plans: Sequence[PhasePlan],
    efficiency: float,
    chip_hour_price: float,
    judge_price: float,
) -> dict[str, float]:
    """Of a step and of the run: seconds, chip-hours and, where prices are given, their cost."""
    floor_s = sum(plan.floor_s for plan in plans)
    steps, calls = work.steps_of(config, stage), work.judge_calls(config, stage)
    step_s = floor_s / efficiency
    chip_hours = steps * step_s * topology.num_chips / 3600
    totals = {
        "hbm_gib": max(plan.hbm_bytes for plan in plans) / GIB,
        "flops": sum(plan.work.flops for plan in plans),
        "floor_s": floor_s,
        "step_s": step_s,
        "steps": steps,
        "hours": steps * step_s / 3600,
        "chip_hours": chip_hours,
        "judge_calls": calls,
    }
    if chip_hour_price:
        totals["chips_cost"] = chip_hours * chip_hour_price
    if judge_price and calls:
        totals["judge_cost"] = calls * judge_price / 1000
    return totals


def figures_of(
    stage: str, topology: Topology, plans: Sequence[PhasePlan], totals: dict[str, float]
) -> Figures:
    """The plan's entries in a summary; the policy's own stage, grpo, needs no name."""
    root = f"plan/{topology.name}" + ("" if stage == "grpo" else f"/{stage}")
    figures = {f"{root}/fits": float(verdict.fits(plans))}
    figures |= {f"{root}/{name}": totals[name] for name in ("hbm_gib", "floor_s", "chip_hours")}
    ratios = [plan.executed_ratio for plan in plans if plan.name == "update"]
    if ratios and ratios[0] is not None:
        figures[f"{root}/flops_ratio"] = ratios[0]
    figures[f"{root}/compile_s"] = max(plan.compiled.compile_s for plan in plans)
    figures[f"{root}/compile_rss_gb"] = max(plan.compiled.peak_rss_gb for plan in plans)
    return figures


def print_plan(title: str, plans: Sequence[PhasePlan], totals: dict[str, float]) -> None:
    """Two tables: the phases of a step, and the run."""
    chip = plans[0].topology.chip
    table = Table(title=f"{title}, one step", title_justify="left")
    for column in ("phase", f"HBM GiB of {chip.hbm_bytes / GIB:.0f}", "of it temporary", "PFLOP",
                   "done / needed", "flops s", "HBM s", "links s", "floor s", "bound", "GB sent",
                   "compile s", "RSS GB"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("phase", "bound") else "right")
    for plan in plans:
        mark = "[red]" if verdict.is_over(plan) else ""
        table.add_row(
            plan.name,
            f"{mark}{plan.hbm_bytes / GIB:.2f}",
            f"{plan.parts.get('temporaries', 0) / GIB:.2f}",
            f"{plan.work.flops / 1e15:.2f}",
            "" if plan.executed_ratio is None else f"{plan.executed_ratio:.2f}",
            *(f"{s:.3f}" for s in (plan.flops_s, plan.hbm_s, plan.wire_s, plan.floor_s)),
            plan.bound,
            f"{plan.wire_bytes / 1e9:.1f}",
            f"{plan.compiled.compile_s:.0f}",
            f"{plan.compiled.peak_rss_gb:.1f}",
        )
    run_table = Table(title="the run", title_justify="left")
    run_table.add_column("")
    run_table.add_column("", justify="right")
    for name, value in totals.items():
        run_table.add_row(TOTALS[name], f"{value:,.4g}")
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    console.print(run_table)


def _as_json(plan: PhasePlan) -> dict[str, Any]:
    return dataclasses.asdict(plan.compiled) | {
        "hbm_bytes": plan.hbm_bytes,
        "hbm_parts": plan.parts,
        "work": dataclasses.asdict(plan.work),
        "flops_s": plan.flops_s,
        "hbm_s": plan.hbm_s,
        "wire_s": plan.wire_s,
        "floor_s": plan.floor_s,
        "bound": plan.bound,
        "executed_ratio": plan.executed_ratio,
    }
