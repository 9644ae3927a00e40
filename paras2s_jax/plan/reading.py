"""Questions to compiled programs: what a decode step copies and exchanges, what an update holds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from paras2s_jax.models.kimi_layout import STACKS
from paras2s_jax.plan.hlo import COPIES, Collective, Instruction, Program

GATHERS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all")
# In training, models/vocab.py gathers the heads by itself.
_OF_HEAD = re.compile(r"(text|audio)_head|_logits|shard_map/all_gather$")


def within(program: Program, computation: str) -> set[str]:
    """A computation and all that it runs."""
    found, left = set(), [computation]
    while left:
        name = left.pop()
        if name not in found and name in program.computations:
            found.add(name)
            for instruction in program.computations[name].values():
                left.extend(instruction.called)
    return found


def buffers(program: Program, inside: set[str] | None = None) -> Iterator[Instruction]:
    """Instructions whose results exist in memory: not those inside of a fusion."""
    fused = {
        name
        for _, instruction, _ in program.instructions()
        if instruction.opcode == "fusion"
        for called in instruction.called
        for name in within(program, called)
    }
    for name, instruction, _ in program.instructions():
        if name not in fused and (inside is None or name in inside):
            yield instruction


def decode_body(program: Program, steps: int) -> str:
    """The body of the loop over the steps of an answer.

    Raises:
        ValueError: no loop of so many steps.
    """
    for name, instruction, _ in program.instructions():
        if instruction.opcode == "while" and program.trips(name, instruction) == steps:
            return instruction.attribute("body").lstrip("%")
    raise ValueError(f"the program has no loop of {steps} steps")


def cache_copies(program: Program, body: str, steps: int, cache_bytes: int) -> list[str]:
    """Copies of a whole cache of keys or values in every step.

    cache_bytes: of the smallest stack's keys or values; copies of weights into faster memory do not
    count, for they have no axis of `steps`.
    """
    return [
        instruction.name
        for instruction in buffers(program, within(program, body))
        if instruction.opcode in COPIES
        and any(
            steps in shape.dims and shape.num_bytes >= cache_bytes for shape in instruction.shapes
        )
    ]


def per_layer(
    program: Program, body: str, steps: int, layers: int, opcodes: Sequence[str]
) -> float:
    """Such collectives of a decode step per layer; one that two stacks share counts once."""
    inside = within(program, body)
    times = 0.0
    for name, instruction, runs in program.instructions():
        opcode = instruction.opcode.removesuffix("-start")
        in_layer = any(f"/{stack}/" in instruction.op_name for stack in STACKS)
        if name in inside and opcode in opcodes and in_layer:
            times += runs
    return times / steps / layers


def largest_logits(program: Program, vocab_sizes: Sequence[int], widths: Sequence[int]) -> int:
    """Most float32 rows of logits that exist at one time in one array.

    vocab_sizes: how many columns such an array may have. widths: rows of arrays that are weights
    or their gradients instead.
    """
    rows = 0
    for instruction in buffers(program):
        for shape in instruction.shapes:
            columns = next((size for size in vocab_sizes if size in shape.dims), None)
            if columns is None or shape.dtype != "f32":
                continue
            count = shape.size // columns
            if count not in widths:
                rows = max(rows, count)
    return rows


def heads_gathered(program: Program, head_bytes: int) -> list[Collective]:
    """Collectives that bring a whole head together.

    head_bytes: of a head as one device multiplies with it.
    """
    return [
        found
        for found in program.collectives()
        if _OF_HEAD.search(found.op_name)
        and found.opcode in ("all-gather", "all-reduce")
        and found.num_bytes >= head_bytes
    ]
