"""The training loop: feeds batches, logs, saves, resumes exactly, stops when it is told to."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
import tqdm

from paras2s_jax.train import checkpoint, distributed, metrics, preemption
from paras2s_jax.train import state as state_lib

# Metrics whose being NaN or infinite means that an update was skipped. Others may be NaN when their
# weight is 0.
MUST_BE_FINITE = ("loss", "grad_norm")


class Source(Protocol):
    """Batches that know their position, such as `data.batches.Batches`."""

    def __iter__(self) -> Iterator[Mapping[str, Any]]: ...

    def state(self) -> dict: ...

    def restore(self, state: dict) -> None: ...


class Monitor(Protocol):
    """What watches the rows of metrics, such as `align.health.Health`."""

    def start(self, step: int, state: dict | None) -> None:
        """Goes on behind a step with what `state` gave there; with None at the beginning."""
        ...

    def check(self, step: int, row: Mapping[str, float]) -> dict[str, float]:
        """Metrics to add to a row before it is written; TrainingError ends the run."""
        ...

    def state(self) -> dict:
        """What `start` needs, as plain JSON."""
        ...


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, why, and where it can be resumed."""


class _Log:
    """Metrics on their way from the device to the record, and what they say about the run."""

    def __init__(
        self,
        writer: metrics.MetricWriter | None,
        monitor: Monitor | None,
        *,
        log_every: int,
        num_steps: int,
        max_skipped: int,
    ):
        self._writer = writer if distributed.is_main() else None
        self._monitor = monitor
        self._log_every, self._num_steps = log_every, num_steps
        self._max_skipped = max_skipped
        self._waiting: list[tuple[int, list[int], dict[str, jax.Array]]] = []  # On the device.
        self._fetched: list[list] = []  # [[step, {name: value}], …] since the last row.
        self._skipped = 0  # In a row, up to now.
        self._clock, self._clock_step = time.monotonic(), 0

    def start(self, step: int, state: dict | None) -> None:
        """Goes on behind a step: the record forgets what came later."""
        if state is not None:
            self._fetched, self._skipped = state["fetched"], state["skipped"]
        if self._writer:
            self._writer.truncate(step)
        if self._monitor:
            self._monitor.start(step, state and state["monitor"])
        self._clock, self._clock_step = time.monotonic(), step

    def state(self) -> dict:
        """The position after `settle` of the same step; plain JSON."""
        monitor = self._monitor.state() if self._monitor else {}
        return {"fetched": self._fetched, "skipped": self._skipped, "monitor": monitor}

    def add(self, step: int, batch: Mapping[str, Any], values: dict[str, jax.Array]) -> None:
        rows = [int(row) for row in np.ravel(batch["row"])] if "row" in batch else []
        self._waiting.append((step, rows, values))

    def has_row(self, step: int) -> bool:
        return step % self._log_every == 0 or step == self._num_steps

    def settle(self, step: int) -> str | None:
        """Waits for the metrics up to a step and writes the rows that they complete.

        Returns: the last of these rows as a line for people.
        """
        due = [item for item in self._waiting if item[0] <= step]
        self._waiting = self._waiting[len(due) :]
        fetched = jax.device_get([values for *_, values in due])
        line = None
        for (at, rows, _), values in zip(due, fetched, strict=True):
            found = {name: float(value) for name, value in values.items()}
            self._count_skipped(at, rows, found)
            self._fetched.append([at, found])
            if self.has_row(at):
                line = self._write(at)
        return line

    def _write(self, step: int) -> str:
        row, now = _means([row for _, row in self._fetched]), time.monotonic()
        self._fetched = []
        if self._monitor:
            row |= self._monitor.check(step, row)
        if self._writer:
            steps_per_s = (step - self._clock_step) / (now - self._clock)
            self._writer.write(step, row, {"steps_per_s": steps_per_s})
        self._clock, self._clock_step = now, step
        return metrics.metric_line(row)

    def _count_skipped(self, step: int, rows: list[int], found: Mapping[str, float]) -> None:
        broken = [n for n in MUST_BE_FINITE if not math.isfinite(found.get(n, 0.0))]
        self._skipped = self._skipped + 1 if broken else 0
        if not broken:
            return
        what = f"step {step}: {broken[0]} is {found[broken[0]]} (rows {rows})"
        if self._skipped >= self._max_skipped:
            raise TrainingError(
                f"{what}, {self._skipped} steps in a row; lower the learning rate, or look at "
                "these rows"
            )
        if distributed.is_main():
            tqdm.tqdm.write(f"{what}: skipped", file=sys.stderr)


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
    max_skipped: int = 5,
    monitor: Monitor | None = None,
) -> state_lib.TrainState:
    """Trains until step `num_steps`, from the last whole checkpoint if there is one.

    A run that is killed and started again ends with the params and the metrics.jsonl of an unbroken
    one, bit for bit: position in the data, metrics not yet written and state are saved as one. Told
    to stop (SIGTERM, Ctrl-C), it ends the step, saves, and raises Preempted or KeyboardInterrupt.

    update: `(state, batch) -> (state, metrics)`; a `train.step.Update` or any function of that
        form, which leaves the state as it is where the loss or a gradient is not finite. Metrics
        may stay on the device: they are fetched every `log_every` steps, and the row written is
        their mean over these steps.
    make_batch: from the numpy batch to what `update` takes, e.g. `shard_batch`.
    max_skipped: as many updates skipped in a row end the run.
    monitor: looks at every row, and may end the run.

    Raises:
        TrainingError: too many skipped updates, the monitor's verdict, or the data ended; nothing
            is saved any more.
        CheckpointError: a checkpoint cannot be read or written.
    """
    log = _Log(writer, monitor, log_every=log_every, num_steps=num_steps, max_skipped=max_skipped)
    state = _resume(state, batches, checkpointer, log)

    def step_on(state, batch):
        return update(state, make_batch(batch) if make_batch else batch)

    def save(state, step):
        if checkpointer:
            checkpointer.save(step, state, {"batches": batches.state(), "log": log.state()})

    try:
        bar = _progress_bar(progress_label, int(state.step), num_steps)
        with bar, preemption.Deferred() as signals:
            try:
                state = _steps(state, step_on, iter(batches), log, bar, signals, save, save_every)
            finally:
                # What is being written is finished, whatever ended the steps.
                if checkpointer:
                    checkpointer.wait()
            if signals.asked(last=True):
                signals.stop()
    except TrainingError as error:
        raise TrainingError(f"{error}; {_where_to_resume(checkpointer)}") from error
    return state


def _steps(
    state: state_lib.TrainState,
    update: Callable,
    source: Iterator,
    log: _Log,
    bar: tqdm.tqdm,
    signals: preemption.Deferred,
    save: Callable[[state_lib.TrainState, int], None],
    save_every: int,
) -> state_lib.TrainState:
    """Steps up to `bar.total`, or until somebody asks to stop; the last one is saved."""
    step, stops = bar.n, False
    while step < bar.total and not stops:
        batch = _next(source, step)
        state, values = update(state, batch)
        step += 1
        log.add(step, batch, values)
        bar.update()
        stops = signals.asked()
        saves = stops or step == bar.total or step % save_every == 0
        # Where nothing has to wait for this step, the device works on it while the one before is
        # looked at.
        settled = step if saves else step - 1
        if saves or log.has_row(settled):
            line = log.settle(settled)
            if line:
                bar.set_postfix_str(line, refresh=False)
        if saves:
            save(state, step)
    return state


def _resume(
    state: state_lib.TrainState,
    batches: Source,
    checkpointer: checkpoint.Checkpointer | None,
    log: _Log,
) -> state_lib.TrainState:
    """Puts state, data and metrics where the last checkpoint left them."""
    restored = checkpointer.restore_latest(state) if checkpointer else None
    if restored is None:
        log.start(int(state.step), None)
        return state
    state, extra = restored
    batches.restore(extra["batches"])
    log.start(int(state.step), extra["log"])
    return state


def _where_to_resume(checkpointer: checkpoint.Checkpointer | None) -> str:
    last = checkpointer.latest_step() if checkpointer else None
    if last is None:
        return "there is no checkpoint"
    return f"the last good checkpoint is that of step {last} in {checkpointer.directory}"


def _progress_bar(label: str, step: int, num_steps: int) -> tqdm.tqdm:
    return tqdm.tqdm(
        desc=label,
        total=num_steps,
        initial=step,
        # In a log file every update of the bar is a line.
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
        unit="step",
        disable=not distributed.is_main(),
        dynamic_ncols=True,
    )


def _next(source: Iterator, step: int) -> Mapping[str, Any]:
    try:
        return next(source)
    except StopIteration:
        raise TrainingError(
            f"the data ended after step {step}; build the batches with repeat=True"
        ) from None


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of every metric over the rows where it is finite; NaN where it never is."""
    found = {}
    for name in sorted({name for row in rows for name in row}):
        real = [row[name] for row in rows if name in row and math.isfinite(row[name])]
        found[name] = math.fsum(real) / len(real) if real else math.nan
    return found
