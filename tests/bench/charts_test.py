import json

import pytest

from paras2s_jax.bench import charts


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0, 0.3, [0, 0.1, 0.2, 0.3]),
        (1.2, 4.6, [1, 2, 3, 4, 5]),
        (-37.0, 12.0, [-40, -30, -20, -10, 0, 10, 20]),
        (2.0, 2.0, [1.4, 1.6, 1.8, 2.0, 2.2, 2.4, 2.6]),
    ],
)
def test_ticks_are_round_and_cover(low, high, expected):
    assert charts.ticks(low, high) == pytest.approx(expected)


def test_running_mean_skips_missing():
    # Windows of 3: (1, 2), (1, 2, -), (2, 6), (6,).
    assert charts.running_mean([1.0, 2.0, None, 6.0], 3) == [1.5, 1.5, 4.0, 6.0]
    assert charts.running_mean([None], 3) == [None]


def panel(tmp_path, rows, **fields):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return charts.line_panel(charts.Chart("Loss", path, {"a": "loss/a", "b": "loss/b"}, **fields))


def test_line_panel_leaves_gaps_and_names_what_is_missing(tmp_path):
    rows = [{"step": n, "loss/a": value} for n, value in enumerate([0.0, 1.0, None, 0.5, 1.0])]
    found = panel(tmp_path, rows)
    assert found["missing"] == ["loss/b"]
    (series,) = found["series"]
    # 5 steps over the width, 0..1 over the height, the pen lifted at the missing one.
    left, right = charts.LEFT, charts.WIDTH - charts.RIGHT
    xs = [left + n * (right - left) / 4 for n in range(5)]
    top, bottom = charts.TOP, charts.HEIGHT - charts.BOTTOM
    expected = f"M{xs[0]} {bottom} L{xs[1]} {top} M{xs[3]} {(top + bottom) / 2} L{xs[4]} {top}"
    assert [float(part.strip("ML")) for part in series["path"].split()] == pytest.approx(
        [float(part.strip("ML")) for part in expected.split()], abs=0.01
    )
    assert series["path"].count("M") == 2
    assert (series["first"], series["last"]) == (0.0, 1.0)


def test_line_panel_without_data(tmp_path):
    assert panel(tmp_path, [])["series"] == []
    assert panel(tmp_path, [{"step": 1, "loss/a": None}])["series"] == []
    one = panel(tmp_path, [{"step": 3, "loss/a": 2.0}])
    assert one["series"][0]["path"].startswith("M")


def test_long_curves_are_smoothed_over_the_raw_line(tmp_path):
    found = panel(tmp_path, [{"step": n, "loss/a": n % 2} for n in range(1, 101)])
    assert found["smoothed"] and found["series"][0]["raw"] != found["series"][0]["path"]
