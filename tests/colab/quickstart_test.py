"""The quickstart from top to bottom, on next to no data."""

import re

from tests.colab.conftest import LEAST, overrides


def test_the_quickstart_trains_scores_draws_and_plays(run, tmp_path):
    done = run("quickstart", WORKDIR=str(tmp_path / "run"), OVERRIDES=overrides(LEAST))
    (table,) = done.shown("text/markdown")
    for system in ("sft", "grpo", "topline"):
        # Four dimensions, their mean and the swap gain, with intervals.
        (row,) = re.findall(rf"^\| {system} \|.*$", table, re.MULTILINE)
        assert len(re.findall(r"[-+]?\d\.\d\d \[[-+]?\d\.\d\d, [-+]?\d\.\d\d\]", row)) == 6
    assert "grpo against sft, paired:" in table
    assert len(done.shown("image/png")) == 2
    (players,) = done.shown("text/html")
    # A sentence of each dimension in two styles: the query and three answers.
    assert players.count("<audio") == 4 * 2 * 4
    assert (tmp_path / "run" / "report" / "index.html").is_file()
