import json
import math

import numpy as np
import pytest

from paras2s_jax.bench import plots
from paras2s_jax.bench.aggregate import MEAN, Estimate
from paras2s_jax.bench.charts import Chart
from paras2s_jax.bench.tables import JudgeInfo, Results, SystemResult

NONE = Estimate(math.nan, math.nan, math.nan, 0, 3, 1)


def chart(tmp_path, rows, **fields):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Chart("KL", path, {"text": "kl/text", "audio": "kl/audio"}, "per token", **fields)


def test_curves_draw_what_the_metrics_say(tmp_path):
    rows = [{"step": 1, "kl/text": 0.5}, {"step": 2, "kl/text": None}, {"step": 3, "kl/text": 0.25}]
    figure = plots.curves([chart(tmp_path, rows, low=0.0)] * 3)
    drawn, *_, spare = figure.axes
    text, audio = drawn.get_lines()
    # A missing value, and a metric that is not there, leave no point.
    np.testing.assert_array_equal(text.get_xydata(), [[1, 0.5], [3, 0.25]])
    assert not len(audio.get_xydata())
    assert (drawn.get_title(), drawn.get_ylabel(), drawn.get_ylim()[0]) == ("KL", "per token", 0.0)
    assert [label.get_text() for label in drawn.get_legend().get_texts()] == ["text", "audio"]
    # Two in a row: the fourth place stays empty.
    assert len(figure.axes) == 4 and not spare.axison
    assert plots.png(figure).startswith(b"\x89PNG")


def test_a_run_without_steps_has_no_curve(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no row yet"):
        plots.curves([chart(tmp_path, [])])


def test_scores_have_their_intervals():
    estimates = {"sft": Estimate(3.0, 2.5, 3.25, 4, 0, 2), "broken": NONE}
    systems = [
        SystemResult(name, {MEAN: found}, {MEAN: found}, math.nan, 0, {}, {})
        for name, found in estimates.items()
    ]
    judge = JudgeInfo("rubric", "", {})
    results = Results(tuple(systems), (), (), (), judge, "set", "ear", 4, 100)
    for panel in plots.scores(results).axes:
        assert [label.get_text() for label in panel.get_yticklabels()] == list(estimates)
        # One dot with its bar; what has no score has none.
        (dot,) = panel.containers
        assert dot.lines[0].get_xydata().tolist() == [[3.0, 0.0]]
        assert dot.lines[2][0].get_segments()[0][:, 0].tolist() == [2.5, 3.25]
