"""Reads a compiled program's text (HLO): how often each instruction runs, and what it costs.

A compiler's own summary counts the body of a loop once. Here every computation is weighed by the
trip counts of the loops around it, so that FLOP and bytes on the links are those of a whole call.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path

ITEM_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8, "token": 0}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
COPIES = ("copy", "copy-start")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9](?:fn)?)?)\[([0-9,]*)\]")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(")
_NAMES = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|body|condition|to_apply|branch_computations)=\{?(%[^},\s]+(?:, %[^},]+)*)"
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: element type and dimensions, as one device holds it."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        bits = ITEM_BITS.get(self.dtype) or int(re.sub(r"\D", "", self.dtype) or 8)
        return self.size * bits // 8 if self.dtype != "token" else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation. shapes: of its result, the parts of a tuple one by one."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    argument: str

    @property
    def num_bytes(self) -> int:
        return sum(shape.num_bytes for shape in self.shapes)

    def attribute(self, name: str) -> str | None:
        """The value of name=… up to the next comma outside of braces, or None."""
        match = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
        return match.group(1) if match else None

    @property
    def op_name(self) -> str:
        """Where in the traced function it comes from."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match.group(1) if match else ""

    @property
    def called(self) -> tuple[str, ...]:
        """Computations that it runs; those that reduce two numbers to one as well."""
        return tuple(n for group in _CALLED.findall(self.attributes) for n in _NAMES.findall(group))


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    raise ValueError(f"unbalanced brackets in HLO: {text[:120]}")


def _instruction(line: str) -> Instruction | None:
    name, equals, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    if not equals or not name.startswith("%"):
        return None
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    match = _OPCODE.match(rest, end)
    if match is None:
        return None
    close = _closing(rest, match.end() - 1)
    argument = rest[match.end() : close]
    dims = ((kind, sizes.split(",") if sizes else ()) for kind, sizes in _SHAPE.findall(rest[:end]))
    shapes = tuple(Shape(kind, tuple(map(int, sizes))) for kind, sizes in dims)
    return Instruction(
        name[1:],
        match.group(1),
        shapes,
        tuple(_NAMES.findall(argument)),
        rest[close + 1 :],
        argument,
    )


class Program:
    """A parsed module.

    computations: {name: {instruction's name: Instruction}}, in order. entry: name of the main one.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] | None = None
        for line in text.splitlines():
            if line.startswith("}"):
                current = None
            elif current is not None:
                found = _instruction(line)
                if found is not None:
                    current[found.name] = found
            elif line.endswith("{") and (head := _HEAD.match(line)):
                current = self.computations.setdefault(head.group(2), {})
                self.entry = head.group(2) if head.group(1) else self.entry
        if not self.entry:
            raise ValueError("the text is not that of a compiled program: it has no ENTRY")

    @classmethod
    def load(cls, path: str | Path) -> Program:
        """Reads a dump of XLA."""
        return cls(Path(path).read_text(encoding="utf-8", errors="replace"))

    @functools.cached_property
    def runs(self) -> dict[str, float]:
        """How often each computation runs in one call of the program."""
        runs: dict[str, float] = dict.fromkeys(self.computations, 0.0)

        def visit(name: str, times: float) -> None:
            runs[name] += times
            for instruction in self.computations[name].values():
                is_loop = instruction.opcode == "while"
                trips = self.trips(name, instruction) if is_loop else 1
                for called in instruction.called:
                    if called in runs and not instruction.opcode.startswith("reduce"):
                        visit(called, times * trips)

        visit(self.entry, 1.0)
        return runs

    def trips(self, computation: str, loop: Instruction) -> int:
        """How often the body of a while runs at the most, by its counter's start, step and bound.

        One that may stop sooner (a rollout whose answers have all ended) is taken to go on.

        Raises:
            ValueError: the bound is not a constant.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known.group(1))
        condition = self.computations[loop.attribute("condition").lstrip("%")]
        turns = []
        for test in condition.values():
            # A fusion in a condition holds the comparison.
            if test.attribute("direction") not in ("LT", "GT") and test.opcode != "fusion":
                continue
            steps = {name: self._step(condition, name, loop) for name in test.operands}
            values = {n: self._constant(condition, n, computation, loop) for n in test.operands}
            step = max(steps.values()) or 1
            start = max((values[name] or 0 for name in steps if steps[name]), default=0)
            bounds = (values[name] or 0 for name in steps if not steps[name])
            turns += [-(-(bound - start) // step) for bound in bounds if bound > 0]
        if not turns:
            raise ValueError(f"the loop {loop.name} has no constant bound")
        return max(turns)

    def _step(self, condition, name: str, loop: Instruction) -> int:
        """What the body adds to an element of the state that the condition reads; 0 if unclear.

        XLA unrolls the loops in which it overlaps a gather with a product: they count by twos.
        """
        read = condition.get(name)
        if read is None or read.opcode != "get-tuple-element":
            return 0
        body = self.computations[loop.attribute("body").lstrip("%")]
        state = next(reversed(body.values()))
        index = int(read.attribute("index"))
        if state.opcode != "tuple" or index >= len(state.operands):
            return 0
        added = body.get(state.operands[index])
        if added is None or added.opcode != "add":
            return 0
        terms = (body[term] for term in added.operands if term in body)
        found = [term.argument for term in terms if term.opcode == "constant"]
        return max([int(text) for text in found if text.isdigit()], default=0)

    def _constant(self, inside, name: str, outside: str, loop: Instruction) -> int | None:
        """The integer that an instruction of a condition stands for, or its most, if it has one."""
        found = inside.get(name)
        if found is None:
            return None
        if found.opcode == "constant":
            number = re.fullmatch(r"\{?(-?\d+)\}?", found.argument)  # {9}: of shape [1]
            return int(number.group(1)) if number else None
        if found.opcode in ("copy", "bitcast", "convert") and found.operands:
            return self._constant(inside, found.operands[0], outside, loop)
        if found.opcode == "minimum":
            known = (self._constant(inside, name, outside, loop) for name in found.operands)
            return min((value for value in known if value is not None), default=None)
        index = found.attribute("index")
        if found.opcode == "get-tuple-element" and inside is not self.computations[outside]:
            around = self.computations[outside]
            given = around.get(loop.operands[0])
            if given is not None and given.opcode == "tuple" and int(index) < len(given.operands):
                return self._constant(around, given.operands[int(index)], outside, loop)
        return None

    def instructions(self) -> Iterator[tuple[str, Instruction, float]]:
        """All that runs: (computation, instruction, how often)."""
        for name, times in self.runs.items():
            if times:
                for instruction in self.computations[name].values():
                    yield name, instruction, times

    def flops(self) -> float:
        """FLOP of all matrix products and convolutions on one device; custom calls not."""
        return sum(
            times * product_flops(instruction, self.computations[name])
            for name, instruction, times in self.instructions()
            if instruction.opcode in ("dot", "convolution")
        )

    def collectives(self) -> list[Collective]:
        """Every collective that runs.

        One that XLA:TPU cuts in pieces to hide it behind other work is written down in every
        fusion that advances it, loops included, under one channel: it runs as often as the rarest.
        """
        found: list[Collective] = []
        hidden: dict[tuple[str, str | None], Collective] = {}
        for name, instruction, times in self.instructions():
            opcode = instruction.opcode.removesuffix("-start")
            if opcode not in COLLECTIVES:
                continue
            made = _collective(instruction, opcode, times, self.computations[name])
            channel = (opcode, instruction.attribute("channel_id"))
            if name not in self.fused:
                found.append(made)
            elif channel not in hidden or made.times < hidden[channel].times:
                hidden[channel] = made
        return found + list(hidden.values())

    @functools.cached_property
    def fused(self) -> frozenset[str]:
        """Computations that a fusion consists of."""
        return frozenset(
            called
            for computation in self.computations.values()
            for instruction in computation.values()
            if instruction.opcode == "fusion"
            for called in instruction.called
        )

    def loop_bodies(self, name: str) -> list[str]:
        """Bodies of the loops whose op_name ends with `name`, outermost first."""
        loops = [
            (self.runs[computation], instruction)
            for computation, instruction, _ in self.instructions()
            if instruction.opcode == "while" and instruction.op_name.endswith(name)
        ]
        loops.sort(key=lambda pair: pair[0])
        return [loop.attribute("body").lstrip("%") for _, loop in loops]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective. ways: devices that take part; times: how often it runs in a call.

    wire_bytes: what one device sends each time, if the devices form a ring.
    """

    opcode: str
    num_bytes: int
    ways: int
    wire_bytes: float
    times: float
    op_name: str


def _collective(found: Instruction, opcode: str, times: float, around) -> Collective:
    ways = group_size(found)
    given = sum(around[name].num_bytes for name in found.operands if name in around)
    # What a -start returns holds its operands too; the larger side is the whole.
    largest = max((shape.num_bytes for shape in found.shapes), default=0)
    whole = max(largest, given) if opcode == "all-gather" else given or largest
    share = (ways - 1) / ways if ways else 0.0
    wire = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(opcode, share) * whole
    return Collective(opcode, whole, ways, wire, times, found.op_name)


def group_size(collective: Instruction) -> int:
    """How many devices take part in one group; 2 for a permutation."""
    if collective.opcode.startswith("collective-permute"):
        return 2
    text = collective.attributes
    by_axes = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", text)
    if by_axes:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", by_axes.group(1)))
        return math.prod(int(sizes[name]) for name in re.findall(r"'([^']+)'", by_axes.group(2)))
    tiled = re.search(r"replica_groups=\[(\d+),(\d+)\]", text)
    if tiled:
        return int(tiled.group(2))
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    if listed:
        return len(listed.group(1).split(","))
    raise ValueError(f"{collective.name}: no replica groups in {text[:200]!r}")


def product_flops(product: Instruction, around: dict[str, Instruction]) -> float:
    """2 FLOP for each multiply-add of a dot or a convolution that meets no padding."""
    left, right = (around[name].shapes[0] for name in product.operands[:2])
    if product.opcode == "dot":
        contracted = product.attribute("lhs_contracting_dims") or "{}"
        sizes = [left.dims[int(i)] for i in re.findall(r"\d+", contracted)]
        return 2.0 * product.shapes[0].size * math.prod(sizes)
    of_left, of_right, of_out = re.split(r"_|->", product.attribute("dim_labels"))
    out = product.shapes[0].dims
    total = 2.0 * out[of_out.index("b")] * out[of_out.index("f")] * right.dims[of_right.index("i")]
    window = product.attributes.partition("window={")[2].partition("}")[0]
    fields = dict(part.split("=") for part in window.split())
    for label in sorted(set(of_right) - {"i", "o"}):
        at = int(label)
        total *= _meetings(
            left.dims[of_left.index(label)],
            right.dims[of_right.index(label)],
            out[of_out.index(label)],
            **{name: value.split("x")[at] for name, value in fields.items() if name != "size"},
        )
    return total


@functools.lru_cache(maxsize=4096)
def _meetings(
    size: int, taps: int, out: int, stride="1", pad="0_0", lhs_dilate="1", rhs_dilate="1", **_
) -> int:
    """Pairs of output and tap, along one axis, that meet an element of the input."""
    before = int(pad.split("_")[0])
    stride, spread, reach = int(stride), int(lhs_dilate), int(rhs_dilate)
    count = 0
    for tap in range(taps):
        for at in range(out):
            place = at * stride + tap * reach - before
            count += place % spread == 0 and 0 <= place // spread < size
    return count
