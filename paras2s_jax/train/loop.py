"""The training loop: feeds batches, logs, saves, resumes exactly."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
import tqdm

from paras2s_jax.train import checkpoint, metrics
from paras2s_jax.train import state as state_lib

# Metrics whose being NaN or infinite means that training has broken down. Others may be NaN
# when their weight is 0.
MUST_BE_FINITE = ("loss", "grad_norm")


class Source(Protocol):
    """Batches that know their position, such as `data.batches.Batches`."""

    def __iter__(self) -> Iterator[Mapping[str, Any]]: ...

    def state(self) -> dict: ...

    def restore(self, state: dict) -> None: ...


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and on which rows."""


class _Pending:
    """Metrics of steps since the last row: on the device until fetched, then floats."""

    def __init__(self, fetched: list):
        self._waiting: list[tuple[int, list[int], dict[str, jax.Array]]] = []
        self.fetched: list[list] = fetched  # [[step, {name: value}], …], plain JSON.

    def add(self, step: int, batch: Mapping[str, Any], values: dict[str, jax.Array]) -> None:
        rows = [int(row) for row in np.ravel(batch["row"])] if "row" in batch else []
        self._waiting.append((step, rows, values))

    def fetch(self) -> None:
        """Waits for the device; TrainingError if a step went wrong."""
        values = jax.device_get([values for _, _, values in self._waiting])
        for (step, rows, _), step_values in zip(self._waiting, values, strict=True):
            row = {name: float(value) for name, value in step_values.items()}
            broken = [n for n in MUST_BE_FINITE if n in row and not math.isfinite(row[n])]
            if broken:
                raise TrainingError(
                    f"step {step}: {broken[0]} is {row[broken[0]]} (rows {rows}); nothing was "
                    "saved since; lower the learning rate, or look at these rows"
                )
            self.fetched.append([step, row])
        self._waiting = []

    def take_means(self) -> dict[str, float]:
        """Means over the steps since the last row, leaving out NaN."""
        rows = [row for _, row in self.fetched]
        self.fetched = []
        names = sorted({name for row in rows for name in row})
        columns = {name: [row[name] for row in rows if name in row] for name in names}
        return {name: _mean(column) for name, column in columns.items()}


def fit(
    state: state_lib.TrainState,
    update: Callable[[state_lib.TrainState, Any], tuple[state_lib.TrainState, dict]],
    batches: Source,
    *,
    num_steps: int,
    checkpointer: checkpoint.Checkpointer | None = None,
    save_every: int = 100,
    writer: metrics.MetricWriter | None = None,
    log_every: int = 10,
    progress_label: str = "train",
    make_batch: Callable[[Mapping[str, Any]], Any] | None = None,
) -> state_lib.TrainState:
    """Trains until step `num_steps`, from the last checkpoint if there is one.

    A run that is killed and started again ends with the params and the metrics.jsonl of an unbroken
    one, bit for bit: position in the data, metrics not yet written and state are saved as one.

    update: `(state, batch) -> (state, metrics)`; a `train.step.Update` or any function of that
        form. Metrics may stay on the device: they are fetched every `log_every` steps, and the
        row written is their mean over these steps.
    make_batch: from the numpy batch to what `update` takes, e.g. `shard_batch`.
    """
    state, pending = _resume(state, batches, checkpointer)
    step = int(state.step)
    writer = writer if jax.process_index() == 0 else None
    if writer:
        writer.truncate(step)
    source = iter(batches)
    with _progress_bar(progress_label, step, num_steps) as bar:
        clock, clock_step = time.monotonic(), step
        while step < num_steps:
            batch = _next(source, step)
            state, values = update(state, make_batch(batch) if make_batch else batch)
            step += 1
            pending.add(step, batch, values)
            bar.update()
            logs = step % log_every == 0 or step == num_steps
            saves = checkpointer is not None and (step % save_every == 0 or step == num_steps)
            if logs or saves:
                pending.fetch()
            if logs:
                row, now = pending.take_means(), time.monotonic()
                if writer:
                    writer.write(step, row, {"steps_per_s": (step - clock_step) / (now - clock)})
                bar.set_postfix_str(metrics.metric_line(row), refresh=False)
                clock, clock_step = now, step
            if saves:
                extra = {"batches": batches.state(), "pending": pending.fetched}
                checkpointer.save(step, state, extra)
    return state


def _resume(
    state: state_lib.TrainState, batches: Source, checkpointer: checkpoint.Checkpointer | None
) -> tuple[state_lib.TrainState, _Pending]:
    """Puts state, data and metrics where the last checkpoint left them."""
    restored = checkpointer.restore_latest(state) if checkpointer else None
    if restored is None:
        return state, _Pending([])
    state, extra = restored
    batches.restore(extra["batches"])
    return state, _Pending(extra["pending"])


def _progress_bar(label: str, step: int, num_steps: int) -> tqdm.tqdm:
    return tqdm.tqdm(
        desc=label,
        total=num_steps,
        initial=step,
        # In a log file every update of the bar is a line.
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
        unit="step",
        disable=jax.process_index() != 0,
        dynamic_ncols=True,
    )


def _next(source: Iterator, step: int) -> Mapping[str, Any]:
    try:
        return next(source)
    except StopIteration:
        raise TrainingError(
            f"the data ended after step {step}; build the batches with repeat=True"
        ) from None


def _mean(values: list[float]) -> float:
    real = [value for value in values if not math.isnan(value)]
    return math.fsum(real) / len(real) if real else math.nan
