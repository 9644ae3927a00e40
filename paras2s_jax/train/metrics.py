"""Metrics of a run: metrics.jsonl (the record), TensorBoard events (the view), a line of text."""

import json
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from paras2s_jax.data.records import write_text


class RowFile:
    """A jsonl whose rows name a step: a resumed run cuts it back to where it goes on."""

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = None

    def write(self, row: Mapping[str, Any]) -> None:
        if self._file is None:
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json.dumps(dict(row)) + "\n")
        self._file.flush()

    def truncate(self, step: int) -> None:
        """Drops what was written after `step`, including a line that a crash cut short."""
        self.close()
        kept = [json.dumps(row) + "\n" for row in read_metrics(self.path) if row["step"] <= step]
        write_text(self.path, "".join(kept))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


class MetricWriter:
    """Appends rows {"step": …, name: value} to `metrics.jsonl` and to a TensorBoard event file.

    The jsonl holds nothing that depends on the clock, so that a resumed run leaves the same file
    as an unbroken one; what does (speed) goes to TensorBoard only. A value that is not finite
    is null in the jsonl.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = pathlib.Path(directory)
        self._rows = RowFile(self.directory / "metrics.jsonl")
        self.path = self._rows.path
        self._events = None

    def write(
        self, step: int, values: Mapping[str, float], timings: Mapping[str, float] | None = None
    ) -> None:
        """Adds one row; `timings` reach TensorBoard only."""
        row = {name: float(value) for name, value in values.items()}
        line = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self._rows.write({"step": int(step)} | line)
        scalars = [
            summary_pb2.Summary.Value(tag=name, simple_value=value)
            for name, value in (row | dict(timings or {})).items()
        ]
        self._event(step=int(step), summary=summary_pb2.Summary(value=scalars))

    def truncate(self, step: int) -> None:
        """Drops what was written after `step`, including a line that a crash cut short."""
        self.close()
        self._rows.truncate(step)
        # TensorBoard forgets events at and after the step of a session start.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._event(step=step + 1, session_log=start)

    def close(self) -> None:
        self._rows.close()
        if self._events is not None:
            self._events.close()
        self._events = None

    def _event(self, **fields) -> None:
        if self._events is None:
            # Viewers read event files in the order of their names.
            name = f"events.out.tfevents.{time.time_ns():020d}.{os.getpid()}"
            self._events = RecordWriter((self.directory / name).open("wb"))
            self._event(file_version="brain.Event:2")
        event = event_pb2.Event(wall_time=time.time(), **fields)
        self._events.write(event.SerializeToString())
        self._events.flush()


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """Rows of a metrics.jsonl, or another RowFile, up to a last line that a crash cut short."""
    path = pathlib.Path(path)
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    # Every whole line ends in a newline, so the part after the last one is empty or cut.
    return [json.loads(line) for line in lines[:-1]]


def metric_line(values: Mapping[str, float]) -> str:
    """One line for people: `loss 0.1234  grad_norm 1.02`."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())
