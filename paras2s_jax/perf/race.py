"""Speed of our code against a reference, in one process.

Both have the same weights and threads, give the same answers, and are called in turns.
"""

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from paras2s_jax.convert.rules import Rule, import_params


class RaceError(ValueError):
    """A race that would compare two different answers."""


@dataclass(frozen=True)
class Race:
    """Seconds of the timed calls, in pairs, in order; load: the machine's load before and after.

    ours_cpu_s, theirs_cpu_s: seconds of processor time of the same calls, which other work on the
    machine hardly changes. compiled: how many programs the timed calls and those with other
    lengths compiled (should be 0).
    """

    name: str
    ours_s: tuple[float, ...]
    theirs_s: tuple[float, ...]
    ours_cpu_s: tuple[float, ...]
    theirs_cpu_s: tuple[float, ...]
    load: tuple[float, float]
    compiled: int = 0
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Our speed in units of theirs: the median over pairs of calls that followed each other."""
        pairs = zip(self.theirs_s, self.ours_s, strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    @property
    def best_ratio(self) -> float:
        """The same by the fastest call of each."""
        return min(self.theirs_s) / min(self.ours_s)

    @property
    def cpu_ratio(self) -> float:
        """As best_ratio, in processor time; says nothing of work that waits or runs on a device."""
        return min(self.theirs_cpu_s) / min(self.ours_cpu_s)

    def figures(self) -> dict[str, float]:
        """The race's entries in a summary, by name."""
        return {
            f"{self.name}/ratio": self.ratio,
            f"{self.name}/best_ratio": self.best_ratio,
            f"{self.name}/cpu_ratio": self.cpu_ratio,
            f"{self.name}/ours_ms": 1e3 * min(self.ours_s),
            f"{self.name}/theirs_ms": 1e3 * min(self.theirs_s),
            f"{self.name}/load": max(self.load),
            f"{self.name}/recompilations": self.compiled,
        } | {f"{self.name}/{key}": value for key, value in self.extra.items()}


def race(
    name: str, ours: Callable[[], object], theirs: Callable[[], object], *, repeats: int, warmup=2
) -> Race:
    """Times both in turns. Each call's result is waited for; the first `warmup` calls are dropped.

    theirs must return when its work is done, as torch on a CPU does.
    """
    calls = (ours, theirs)
    wall, processor = ([], []), ([], [])
    before = os.getloadavg()[0]
    with compilations() as compiled:
        for turn in range(warmup + repeats):
            if turn == warmup:
                compiled.clear()
            for call, wall_s, cpu_s in zip(calls, wall, processor, strict=True):
                start, start_cpu = time.perf_counter(), time.process_time()
                jax.block_until_ready(call())
                wall_s.append(time.perf_counter() - start)
                cpu_s.append(time.process_time() - start_cpu)
    load = (before, os.getloadavg()[0])
    timed = [tuple(times[warmup:]) for times in (*wall, *processor)]
    return Race(name, *timed, load, len(compiled))


def with_lengths(result: Race, call: Callable, lengths: Iterable, extra: dict[str, float]) -> Race:
    """Adds figures, and the programs compiled by calls with other lengths of the same shape."""
    with compilations() as compiled:
        for length in lengths:
            jax.block_until_ready(call(length))
    return dataclasses.replace(result, compiled=result.compiled + len(compiled), extra=extra)


def shared_variables(
    model: nn.Module, reference, rules: Sequence[Rule], init: Callable[[], dict], dtype=None
) -> dict:
    """The weights of a torch module as variables of ours, in `dtype` (default: model's own)."""
    shapes = nn.meta.unbox(jax.eval_shape(init))["params"]
    state = {key: value.float().cpu().numpy() for key, value in reference.state_dict().items()}
    params = import_params(state, rules, shapes, dtype=dtype, name=type(model).__name__)
    return {"params": jax.tree.map(jnp.asarray, params)}


class Laps:
    """Seconds of named parts, one entry a call."""

    def __init__(self):
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, name: str, function: Callable, *args, **kwargs):
        """Calls, waits for the result, and notes how long it took."""
        start = time.perf_counter()
        result = jax.block_until_ready(function(*args, **kwargs))
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)
        return result

    def best_ms(self, side: str) -> dict[str, float]:
        """Fastest of each part."""
        return {f"{side}_{name}_ms": 1e3 * min(times) for name, times in self.seconds.items()}


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """A list that fills with one entry per program that is compiled inside the block."""
    compiled = []

    def note(event, *_, **__):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def check_equal(name: str, ours, theirs, atol: float) -> float:
    """Largest absolute difference of two arrays.

    Raises:
        RaceError: it exceeds atol, or the shapes differ.
    """
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    if ours.shape != theirs.shape:
        raise RaceError(f"{name}: shapes {ours.shape} and {theirs.shape} differ")
    difference = float(np.max(np.abs(ours.astype(np.float64) - theirs)))
    if not difference <= atol:
        raise RaceError(f"{name}: answers differ by {difference:.3g}, more than {atol:g}")
    return difference


def pin(num_threads: int) -> None:
    """Keeps this process, JAX's threads and torch's to the same `num_threads` cores.

    Call it before JAX starts its threads, which keep the cores of the thread that made them.
    """
    import torch

    if hasattr(os, "sched_setaffinity"):
        # From the end: other work, if it is pinned at all, tends to sit on the first core.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-num_threads:])
    torch.set_num_threads(num_threads)
