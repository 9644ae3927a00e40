"""Phases of a step against a chip: memory that is needed, the least time, and what would help."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from paras2s_jax.plan.aot import Compiled
from paras2s_jax.plan.hardware import GIB, Topology
from paras2s_jax.plan.work import Phase

# The runtime and fragmentation want some of it.
USABLE_HBM = 0.95


@dataclasses.dataclass(frozen=True)
class PhasePlan:
    """One phase: what the compiler made of it, what it has to do, and on what."""

    compiled: Compiled
    work: Phase
    topology: Topology

    @property
    def name(self) -> str:
        return self.compiled.phase

    @property
    def parts(self) -> dict[str, int]:
        """Bytes on one device by what they are for; arguments and what else stays, by name."""
        parts = dict(self.compiled.others)
        for name, size in self.compiled.arguments.items():
            parts[name] = parts.get(name, 0) + size
        memory = self.compiled.memory
        if memory is not None:
            # Tiles are padded: the arguments are somewhat larger than their shapes.
            padding = memory.arguments - sum(self.compiled.arguments.values())
            parts["results"] = memory.outputs - memory.alias
            parts["temporaries"] = memory.temps + memory.code + max(padding, 0)
        return {name: size for name, size in parts.items() if size > 0}

    @property
    def hbm_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def flops_s(self) -> float:
        return self.work.flops / (self.topology.num_chips * self.topology.chip.peak_flops)

    @property
    def hbm_s(self) -> float:
        return self.work.hbm_bytes / self.topology.chip.hbm_bytes_s

    @property
    def wire_bytes(self) -> float:
        """What one device sends."""
        return sum((self.compiled.wire or {}).values())

    @property
    def wire_s(self) -> float:
        return self.wire_bytes / self.topology.chip.link_bytes_s

    @property
    def floor_s(self) -> float:
        """The least time: of computing, of memory or of links, whichever is longest."""
        return max(self.flops_s, self.hbm_s, self.wire_s)

    @property
    def bound(self) -> str:
        """Which of them it is."""
        times = {"flops": self.flops_s, "HBM": self.hbm_s, "links": self.wire_s}
        return max(times, key=times.get)

    @property
    def executed_ratio(self) -> float | None:
        """FLOP of the compiled program in units of the model's."""
        if self.compiled.flops is None or not self.work.flops:
            return None
        return self.compiled.flops * self.topology.num_chips / self.work.flops


def fits(plans: Sequence[PhasePlan]) -> bool:
    """Whether no phase needs more than a chip has."""
    return not any(is_over(plan) for plan in plans)


def is_over(plan: PhasePlan) -> bool:
    """Whether a phase needs more than a chip has."""
    return plan.hbm_bytes > USABLE_HBM * plan.topology.chip.hbm_bytes


# What helps against what a phase has most of, in the order to be tried.
KNOBS = {
    "temporaries": {
        "update": (
            "raise --config.{section}.accum_steps",
            "--config.{model}.remat=full keeps one array per layer only",
            "lower --config.policy.logp_chunk",
        ),
        "reference": ("raise --config.{section}.accum_steps, which splits this phase too",),
        "rollout": ("raise --config.decode_mesh.tensor", "lower --config.policy.max_steps"),
        "speak": ("spread answers over more devices: raise config.mesh.data or fsdp",),
    },
    "inputs": {"rollout": ("raise --config.decode_mesh.tensor: weights are split over it",)},
    "optimizer": {"": ("train adapters only (:TOPOLOGY,lora)", "raise --config.mesh.fsdp")},
    "policy": {"": ("train adapters only (:TOPOLOGY,lora)", "raise --config.mesh.fsdp")},
    "front end": {"": ("place it by rules: raise --config.mesh.fsdp",)},
}


def knobs(plan: PhasePlan, stage: str) -> list[str]:
    """What would make a phase smaller, by what it has most of."""
    section = stage if stage != "respond" else "distill"
    model = "distill.model" if stage == "distill" else "policy"
    found = []
    for name, _ in sorted(plan.parts.items(), key=lambda part: -part[1])[:2]:
        by_phase = KNOBS.get(name, {})
        for text in by_phase.get(plan.name, by_phase.get("", ())):
            found.append(text.format(section=section, model=model))
    return [*dict.fromkeys(found), "take a larger slice or chips with more memory"]


def refusal(plans: Sequence[PhasePlan], stage: str) -> str:
    """One sentence: which phase does not fit, by how much, what fills it, what helps."""
    worst = max(plans, key=lambda plan: plan.hbm_bytes)
    chip = worst.topology.chip
    parts = sorted(worst.parts.items(), key=lambda part: -part[1])[:3]
    filled = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts)
    return (
        f"the plan does not fit {worst.topology.name}: {worst.name} needs "
        f"{worst.hbm_bytes / GIB:.1f} GiB of a chip's {chip.hbm_bytes / GIB:.0f} (usable "
        f"{USABLE_HBM * chip.hbm_bytes / GIB:.1f}; {filled}); {'; or '.join(knobs(worst, stage))}."
    )
