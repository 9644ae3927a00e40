"""The process that builds a stage's programs, or compiles one of them.

python -m paras2s_jax.plan.worker DIR, with DIR/job.json: stage, topology, num_devices, phase (none:
only describe all). Writes DIR/described.json or DIR/compiled.json.
"""

from __future__ import annotations

import dataclasses
import json
import re
import resource
import sys
import time
from pathlib import Path

import jax
from jax.experimental import topologies

from paras2s_jax.plan import hlo
from paras2s_jax.plan.aot import (
    COMPILED,
    DESCRIBED,
    JOB,
    Compiled,
    Memory,
    dumped,
    read_config,
)
from paras2s_jax.plan.hardware import topology_of
from paras2s_jax.plan.programs import Programs, build


def devices_of(topology: str):
    """Devices of a slice to compile for, or as many of this host's where there is no compiler."""
    found = topology_of(topology)
    if found.aot is None:
        return jax.devices()[: found.num_chips]
    return topologies.get_topology_desc(found.aot, "tpu").devices


def describe(programs: Programs) -> dict:
    """Every phase without compiling it."""
    phases = [
        Compiled(call.name, None, programs.arguments(call), programs.others(call))
        for call in programs.calls
    ]
    return {
        "trained_params": programs.trained_params,
        "phases": [dataclasses.asdict(phase) for phase in phases],
    }


def needed_bytes(message: str) -> int | None:
    """How much memory a program that does not fit would take, by the compiler's complaint.

    None if it complains of something else.
    """
    found = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    return found and round(float(found.group(1)) * 1024 ** ("KMGT".index(found.group(2)) + 1))


def compile_phase(programs: Programs, phase: str, folder: Path) -> Compiled:
    """Compiles one phase and reads what came of it."""
    call = programs.call(phase)
    given, others = programs.arguments(call), programs.others(call)
    started = time.monotonic()
    try:
        compiled = call.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if needed is None:
            raise
        # The compiler gives up: what it says it needs is all that is known.
        size = sum(given.values())
        return Compiled(phase, Memory(size, 0, 0, max(needed - size, 0), 0), given, others)
    seconds = time.monotonic() - started
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    found = compiled.memory_analysis()
    memory = Memory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes,
        alias=found.alias_size_in_bytes,
        temps=found.temp_size_in_bytes,
        code=found.generated_code_size_in_bytes,
    )
    program = hlo.Program.load(dumped(folder / "hlo"))
    wire: dict[str, float] = {}
    for collective in program.collectives():
        sent = collective.wire_bytes * collective.times
        wire[collective.opcode] = wire.get(collective.opcode, 0.0) + sent
    return Compiled(
        phase,
        memory,
        given,
        others,
        flops=program.flops(),
        wire=wire,
        compile_s=round(seconds, 1),
        peak_rss_gb=round(peak_gb, 3),
    )


def main(folder: Path) -> None:
    """Does the job that lies in the folder."""
    job = json.loads((folder / JOB).read_text())
    config = read_config(folder.parent)
    programs = build(config, job["stage"], devices_of(job["topology"]))
    if job["phase"] is None:
        (folder / DESCRIBED).write_text(json.dumps(describe(programs), indent=1))
        return
    made = compile_phase(programs, job["phase"], folder)
    (folder / COMPILED).write_text(json.dumps(dataclasses.asdict(made), indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
