"""Chips and slices that a run may be planned for, by published figures."""

from __future__ import annotations

import dataclasses
import difflib

GIB = 2**30


class PlanError(ValueError):
    """A plan that cannot be made, or does not fit; the message names the remedy."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one accelerator.

    peak_flops: bfloat16 FLOP/s. hbm_bytes, hbm_bytes_s: size and bandwidth of its memory.
    link_bytes_s: bytes/s that it can send to its neighbours, all links together, one way.
    hop_s: what a collective costs per hop at the least, however few its bytes.
    """

    name: str
    peak_flops: float
    hbm_bytes: int
    hbm_bytes_s: float
    link_bytes_s: float
    hop_s: float = 1e-6


# TPUs: "How to Scale Your Model" (jax-ml.github.io/scaling-book), tables of TPU specs, whose links
# are 45 GB/s (v5e) and 90 GB/s (v5p, v6e) each way, 4 or 6 to a chip; cloud.google.com/tpu/docs.
# H100 SXM: NVIDIA's datasheet, dense bfloat16; NVLink 4 has 450 GB/s each way.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 16 * GIB, 819e9, 4 * 45e9),
        Chip("v5p", 459e12, 95 * GIB, 2765e9, 6 * 90e9),
        Chip("v6e", 918e12, 32 * GIB, 1638e9, 4 * 90e9),
        Chip("h100", 989e12, 80 * GIB, 3350e9, 450e9),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of chips.

    aot: its name for `jax.experimental.topologies`; None where no compiler for it can be had
    without the chips, so that memory is counted instead of read.
    """

    name: str
    chip: Chip
    num_chips: int
    aot: str | None


def _tpu(chip: str, shape: str) -> Topology:
    count = 1
    for size in shape.split("x"):
        count *= int(size)
    return Topology(f"{chip}-{shape}", CHIPS[chip], count, f"{chip}:{shape}")


# A v5p-64 is 4x4x4: its names count cores.
TOPOLOGIES = {
    topology.name: topology
    for topology in (
        _tpu("v5e", "2x2"),
        _tpu("v5e", "4x4"),
        _tpu("v5e", "8x8"),
        _tpu("v5e", "16x16"),
        _tpu("v5p", "2x2x2"),
        _tpu("v5p", "4x4x4"),
        _tpu("v6e", "2x2"),
        _tpu("v6e", "8x8"),
        _tpu("v6e", "16x16"),
        Topology("h100-8", CHIPS["h100"], 8, None),
        Topology("h100-16", CHIPS["h100"], 16, None),
    )
}


def topology_of(name: str) -> Topology:
    """The slice of that name.

    Raises:
        PlanError: there is none.
    """
    if name not in TOPOLOGIES:
        near = difflib.get_close_matches(name, TOPOLOGIES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(TOPOLOGIES)}."
        raise PlanError(f"there is no topology {name!r}; {hint}")
    return TOPOLOGIES[name]
