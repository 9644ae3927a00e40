"""The judge's notebook from top to bottom, on one sentence of each dimension."""

import re

from tests.colab.conftest import overrides

LEAST = overrides("bench.num_resamples=100 bench.num_probes=4 judge.batch_size=8")


def test_it_judges_compares_and_shows_made_up_systems(run, tmp_path):
    workdir = tmp_path / "judged"
    done = run("judge_your_model", WORKDIR=str(workdir), VOICES=1, SENTENCES=1, OVERRIDES=LEAST)
    table, board = done.shown("text/markdown")
    (row,) = re.findall(r"^\| tone_deaf \|.*$", table, re.MULTILINE)
    assert len(re.findall(r"\d\.\d\d \[\d\.\d\d, \d\.\d\d\]", row)) >= 5 and "0/8" in row
    assert "tone_deaf" in board and "topline" in board
    players, page = done.shown("text/html")
    assert players.count("<audio") == 4 * 2 * 2
    assert "<iframe" in page and "does tone_deaf listen?" in page
    assert "passed: " in done.printed
