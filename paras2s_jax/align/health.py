"""Alarms of reinforcement: how collapse and reward hacking show in the metrics of a run."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Mapping

from paras2s_jax.train import distributed
from paras2s_jax.train.loop import TrainingError
from paras2s_jax.train.metrics import RowFile

ALARMS = "alarms.jsonl"


def _above(value: float, limit: float, start: float) -> bool:
    return value > limit


def _below_share(value: float, limit: float, start: float) -> bool:
    return value < limit * start


def _drifted(value: float, limit: float, start: float) -> bool:
    return value > start * limit or value < start / limit


# Alarm -> the metric that it watches and when it is raised, by (value, limit, value at the start).
# As long as the start is not known it is NaN, which raises nothing.
RULES: dict[str, tuple[str, Callable[[float, float, float], bool]]] = {
    "kl_text": ("kl/text", _above),
    "kl_audio": ("kl/audio", _above),
    "entropy_text": ("entropy/text", _below_share),
    "entropy_audio": ("entropy/audio", _below_share),
    "zero_spread": ("reward/zero_spread", _above),
    "wer": ("asr/wer", _above),
    "silent": ("answer/silent", _above),
    "clipped": ("answer/clipped", _above),
    "len_text": ("len/text", _drifted),
    "len_audio": ("len/audio", _drifted),
    "gap": ("judge/gap", _above),
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Where each alarm is raised; inf (of a share of the start, 0) never raises it.

    window: what is compared is the mean of that many last values, and the start that of the first.
    stop: alarms that end the run. kl_*: nats per token to the reference. entropy_*: share of the
    start. zero_spread: share of groups whose answers are all rewarded alike. wer: of spoken answers
    against their text stream. silent, clipped: share of answers. len_*: how many times longer or
    shorter than at the start. gap: points by which the reward model's mean exceeds the judge's.
    """

    window: int = 5
    stop: tuple[str, ...] = ()
    kl_text: float = math.inf
    kl_audio: float = math.inf
    entropy_text: float = 0.0
    entropy_audio: float = 0.0
    zero_spread: float = math.inf
    wer: float = math.inf
    silent: float = math.inf
    clipped: float = math.inf
    len_text: float = math.inf
    len_audio: float = math.inf
    gap: float = math.inf

    def __post_init__(self):
        unknown = sorted(set(self.stop) - set(RULES))
        if unknown:
            raise ValueError(f"stop names no alarm {unknown[0]!r}; there are {', '.join(RULES)}.")
        if self.window < 1:
            raise ValueError(f"window {self.window} must be at least 1.")


class Health:
    """A `train.loop.Monitor`: raises alarms, writes them to alarms.jsonl, may end the run.

    alarms.jsonl holds a row when an alarm is raised and one when it is over; the metric `alarms`
    counts those that are on. A metric that a row lacks (an audit is seldom) keeps its last values.
    """

    def __init__(self, limits: Limits, folder: str | os.PathLike):
        self._limits = limits
        self._file = RowFile(pathlib.Path(folder) / ALARMS) if distributed.is_main() else None
        self._last: dict[str, list[float]] = {}
        self._start: dict[str, float] = {}
        self._on: set[str] = set()

    def start(self, step: int, state: dict | None) -> None:
        state = state or {"last": {}, "start": {}, "on": []}
        self._last, self._start = dict(state["last"]), dict(state["start"])
        self._on = set(state["on"])
        if self._file:
            self._file.truncate(step)

    def state(self) -> dict:
        return {"last": self._last, "start": self._start, "on": sorted(self._on)}

    def check(self, step: int, row: Mapping[str, float]) -> dict[str, float]:
        """Raises TrainingError for an alarm among `stop`."""
        ending = None
        for alarm, (metric, is_raised) in RULES.items():
            value, limit = self._smoothed(metric, row), getattr(self._limits, alarm)
            if value is None:
                continue
            on = is_raised(value, limit, self._start.get(metric, math.nan))
            if on != (alarm in self._on):
                self._on ^= {alarm}
                self._tell(step, alarm, metric, value, limit)
            if on and alarm in self._limits.stop:
                ending = ending or (
                    f"step {step}: alarm {alarm} ends the run: {metric} is {value:.4g}, limit "
                    f"{limit:g}; change what drives it (learning rate, beta, reward), or raise "
                    f"the limit health.{alarm}"
                )
        if ending:
            raise TrainingError(ending)
        return {"alarms": float(len(self._on))}

    def _smoothed(self, metric: str, row: Mapping[str, float]) -> float | None:
        """Mean of the last values; None where the row brings no new one."""
        value = row.get(metric, math.nan)
        if not math.isfinite(value):
            return None
        last = self._last[metric] = [*self._last.get(metric, []), value][-self._limits.window :]
        mean = math.fsum(last) / len(last)
        if len(last) == self._limits.window:
            self._start.setdefault(metric, mean)
        return mean

    def _tell(self, step: int, alarm: str, metric: str, value: float, limit: float) -> None:
        if not self._file:
            return
        on = alarm in self._on
        row = {"step": step, "alarm": alarm, "on": on, "metric": metric}
        row |= {"value": value, "limit": limit if math.isfinite(limit) else None}
        start = self._start.get(metric)
        self._file.write(row | {"start": start})
        since = "" if start is None else f", {start:.4g} at the start"
        state = "raised" if on else "over"
        print(
            f"alarm {alarm} {state} at step {step}: {metric} is {value:.4g}, limit {limit:g}{since}"
        )
