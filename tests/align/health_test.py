import dataclasses
import json

import numpy as np
import pytest

from paras2s_jax.align import health
from paras2s_jax.align.health import Health, Limits
from paras2s_jax.train.loop import TrainingError

# A raised alarm for every rule: (values of its metric, at window 2 and the limit below).
CASES = {
    "kl_text": [0.1, 0.2, 0.6],  # mean of the last two 0.4
    "kl_audio": [0.1, 0.2, 0.6],
    "entropy_text": [1.0, 1.0, 0.3, 0.3],  # 0.3 of the start
    "entropy_audio": [1.0, 1.0, 0.3, 0.3],
    "zero_spread": [0.3, 0.5],  # 0.4
    "wer": [0.3, 0.5],
    "silent": [0.3, 0.5],
    "clipped": [0.3, 0.5],
    "len_text": [10.0, 12.0, 40.0, 36.0],  # 11 at the start, 38 at the end
    "len_audio": [30.0, 30.0, 8.0, 6.0],  # 30, then 7
    "gap": [0.3, 0.5],
}
LIMITS = {"kl_text": 0.35, "kl_audio": 0.35} | dict.fromkeys(
    ("zero_spread", "wer", "silent", "clipped", "gap"), 0.35
)
LIMITS |= {"entropy_text": 0.5, "entropy_audio": 0.5, "len_text": 3.0, "len_audio": 3.0}


def limits(**changes):
    return Limits(**({"window": 2} | LIMITS | changes))


def rows_of(alarm):
    return [{health.RULES[alarm][0]: value} for value in CASES[alarm]]


def feed(monitor, rows, first=1):
    return [monitor.check(step, row)["alarms"] for step, row in enumerate(rows, first)]


def written(folder):
    return [json.loads(line) for line in (folder / "alarms.jsonl").read_text().splitlines()]


def started(folder, **changes):
    monitor = Health(limits(**changes), folder)
    monitor.start(0, None)
    return monitor


@pytest.mark.parametrize("alarm", health.RULES)
def test_every_alarm_is_raised_once_and_said(tmp_path, capsys, alarm):
    rows = rows_of(alarm)
    counts = feed(started(tmp_path), [*rows, rows[-1]])
    # Not before the last of the case's values; it stays on.
    assert counts == [0.0] * (len(rows) - 1) + [1.0, 1.0]
    (row,) = written(tmp_path)
    metric = health.RULES[alarm][0]
    assert (row["step"], row["alarm"], row["on"]) == (len(rows), alarm, True)
    assert row["value"] == pytest.approx(np.mean(CASES[alarm][-2:]))
    assert row["limit"] == LIMITS[alarm]
    assert f"alarm {alarm} raised at step {len(rows)}: {metric} is" in capsys.readouterr().out


@pytest.mark.parametrize("alarm", health.RULES)
def test_a_stop_rule_ends_the_run(tmp_path, alarm):
    monitor, rows = started(tmp_path, stop=(alarm,)), rows_of(alarm)
    feed(monitor, rows[:-1])
    value = np.mean(CASES[alarm][-2:])
    message = f"alarm {alarm} ends the run: .* is {value:.4g}, limit {LIMITS[alarm]:g};"
    with pytest.raises(TrainingError, match=message):
        monitor.check(len(rows), rows[-1])


@pytest.mark.parametrize("alarm", health.RULES)
def test_by_default_nothing_is_raised(tmp_path, alarm):
    monitor = Health(Limits(window=2, stop=(alarm,)), tmp_path)
    monitor.start(0, None)
    assert set(feed(monitor, rows_of(alarm))) == {0.0}


def test_an_alarm_ends_and_comes_again(tmp_path):
    values = [0.0, 0.0, 0.8, 0.8, 0.0, 0.0, 0.8]
    counts = feed(started(tmp_path), [{"asr/wer": value} for value in values])
    assert counts == [0, 0, 1, 1, 1, 0, 1]
    assert [(row["step"], row["on"]) for row in written(tmp_path)] == [
        (3, True),
        (6, False),
        (7, True),
    ]


def test_rows_without_the_metric_change_nothing(tmp_path):
    rows = [{"asr/wer": 0.8}, {"asr/wer": 0.8}, {}, {"asr/wer": float("nan")}, {"asr/wer": 0.0}]
    assert feed(started(tmp_path), [*rows, {"asr/wer": 0.0}]) == [1, 1, 1, 1, 1, 0]


def test_a_resumed_run_raises_what_an_unbroken_one_does(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {"kl/text": rng.uniform(0, 0.7), "len/audio": 20 * 4 ** rng.normal(), "entropy/text": 0.1}
        for _ in range(40)
    ]
    whole = started(tmp_path / "whole")
    expected = feed(whole, rows)
    assert len(set(expected)) > 1
    broken = started(tmp_path / "broken")
    feed(broken, rows[:20])
    state = json.loads(json.dumps(broken.state()))
    feed(broken, rows[20:30], first=21)  # lost: no checkpoint holds it
    again = Health(limits(), tmp_path / "broken")
    again.start(20, state)
    assert feed(again, rows[20:], first=21) == expected[20:]
    assert written(tmp_path / "broken") == written(tmp_path / "whole")
    assert again.state() == whole.state()


def test_a_fresh_start_forgets_what_an_earlier_one_wrote(tmp_path):
    feed(started(tmp_path), rows_of("wer"))
    assert written(tmp_path)
    started(tmp_path)
    assert written(tmp_path) == []


def test_impossible_limits_are_refused():
    with pytest.raises(ValueError, match=r"no alarm 'kl'; there are kl_text, kl_audio"):
        Limits(stop=("wer", "kl"))
    with pytest.raises(ValueError, match="window 0"):
        Limits(window=0)
    assert {field.name for field in dataclasses.fields(Limits)} == {"window", "stop", *health.RULES}
