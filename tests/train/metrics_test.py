import json
import math

from tensorboard.backend.event_processing import event_accumulator

from paras2s_jax.train import metrics


def events(directory):
    accumulator = event_accumulator.EventAccumulator(str(directory))
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def test_rows_and_events(tmp_path):
    writer = metrics.MetricWriter(tmp_path)
    writer.write(2, {"loss": 0.5, "flips": math.nan}, {"steps_per_s": 3.0})
    writer.write(4, {"loss": 0.25})
    assert metrics.read_metrics(writer.path) == [
        {"step": 2, "loss": 0.5, "flips": None},
        {"step": 4, "loss": 0.25},
    ]
    found = events(tmp_path)
    assert found["loss"] == [(2, 0.5), (4, 0.25)]
    assert found["steps_per_s"] == [(2, 3.0)]
    writer.close()


def test_truncation_forgets_later_rows_and_a_cut_line(tmp_path):
    first = metrics.MetricWriter(tmp_path)
    for step in (1, 2, 3, 4):
        first.write(step, {"loss": float(step)})
    with first.path.open("a") as file:
        file.write('{"step": 5, "lo')
    second = metrics.MetricWriter(tmp_path)
    second.truncate(2)
    assert [row["step"] for row in metrics.read_metrics(second.path)] == [1, 2]
    second.write(3, {"loss": 30.0})
    second.close()
    lines = second.path.read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [1.0, 2.0, 30.0]
    assert events(tmp_path)["loss"] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_truncating_nothing_is_harmless(tmp_path):
    writer = metrics.MetricWriter(tmp_path / "new")
    writer.truncate(0)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert len(metrics.read_metrics(writer.path)) == 1
    assert metrics.read_metrics(tmp_path / "absent.jsonl") == []


def test_line_for_people():
    assert metrics.metric_line({"loss": 0.123456, "grad_norm": 12.0}) == "loss 0.1235  grad_norm 12"
