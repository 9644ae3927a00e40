"""Compiles one program at a time for chips that are not there, each in a process of its own.

The process gives its memory back when it ends. The compiler for TPUs is libtpu, which needs a
topology's name but no TPU.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from paras2s_jax.plan.hardware import PlanError, Topology

CONFIG, JOB, LOG = "config.json", "job.json", "log.txt"
DESCRIBED, COMPILED = "described.json", "compiled.json"
# libtpu looks for a TPU's host and asks its metadata server, which is not there, and locks the
# machine's only TPU, which is not there either. Its complaints go to the log.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    # A program from the cache would not be dumped.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device while a program runs, as the compiler laid them out.

    alias: part of the outputs that reuse donated arguments.
    """

    arguments: int
    outputs: int
    alias: int
    temps: int
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.alias + self.temps + self.code


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of one phase.

    memory: None where it was counted, not compiled. others: bytes on one device of what stays
    while the program runs and is none of its arguments, by name. flops, wire: FLOP, and bytes sent,
    of one device in one call, wire by kind of collective.
    """

    phase: str
    memory: Memory | None
    arguments: dict[str, int]
    others: dict[str, int]
    flops: float | None = None
    wire: dict[str, float] | None = None
    compile_s: float = 0.0
    peak_rss_gb: float = 0.0

    @classmethod
    def load(cls, path: Path) -> Compiled:
        """Reads what a worker wrote."""
        values = json.loads(path.read_text())
        memory = values.pop("memory")
        return cls(memory=memory and Memory(**memory), **values)


def write_config(config: ConfigDict, folder: Path) -> bool:
    """Keeps a config for workers, its sequences as tuples. Returns: whether it lay there before."""
    folder.mkdir(parents=True, exist_ok=True)
    path, text = folder / CONFIG, json.dumps(config.to_dict(), indent=1)
    is_known = path.exists() and path.read_text() == text
    path.write_text(text)
    return is_known


def read_config(folder: Path) -> ConfigDict:
    """The config that `write_config` kept."""

    def frozen(value):
        if isinstance(value, dict):
            return {key: frozen(item) for key, item in value.items()}
        return tuple(frozen(item) for item in value) if isinstance(value, list) else value

    return ConfigDict(frozen(json.loads((folder / CONFIG).read_text())))


def check_compiler(topology: Topology) -> None:
    """Whether programs for the topology can be compiled here; keeps this process off all devices.

    Raises:
        PlanError: libtpu is not installed.
    """
    jax.config.update("jax_platforms", ENVIRONMENT["JAX_PLATFORMS"])
    if topology.aot is not None and importlib.util.find_spec("libtpu") is None:
        raise PlanError(
            f"compiling for {topology.name} needs the TPU compiler, which needs no TPU: "
            "pip install libtpu (or 'paras2s-jax[tpu]')."
        )


def run_worker(folder: Path, job: Mapping[str, Any], dump: bool = False) -> None:
    """One job of `plan.worker` in a process of its own; it writes into its folder.

    folder: of the job; the config lies above it. dump: whether the compiled text is kept there.

    Raises:
        PlanError: it failed; the message ends with the last line it said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JOB).write_text(json.dumps(job))
    environment = os.environ | ENVIRONMENT
    flags = [f"--xla_force_host_platform_device_count={job['num_devices']}"]
    if dump:
        flags += [f"--xla_dump_to={folder / 'hlo'}", "--xla_dump_hlo_as_text"]
    environment["XLA_FLAGS"] = " ".join(flags)
    command = [sys.executable, "-m", "paras2s_jax.plan.worker", str(folder)]
    with open(folder / LOG, "w") as log:
        done = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False)
    if done.returncode:
        lines = [line for line in (folder / LOG).read_text(errors="replace").splitlines() if line]
        told = [line for line in lines if "Error" in line] or lines or ["it said nothing"]
        phase = job.get("phase") or "the programs"
        raise PlanError(f"{phase} cannot be compiled: {told[-1].strip()} (log: {folder / LOG})")


def dumped(folder: Path) -> Path:
    """The text of the compiled program in a dump: as_text() fails on some of them.

    Small programs that run on the way are dumped too; the largest is the one asked for.
    """
    found = sorted(folder.glob("*.after_optimizations.txt"), key=lambda path: path.stat().st_size)
    if not found:
        raise FileNotFoundError(f"{folder} holds no compiled program")
    return found[-1]
