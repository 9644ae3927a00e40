import json
import math

import pytest

from paras2s_jax.data.records import Verdict
from paras2s_jax.judge import card
from paras2s_jax.judge.agreement import Agreement, Ranking
from paras2s_jax.judge.card import Card

GOOD = {
    "judge/probe_order": 0.95,
    "judge/probe/silence": 1.0,
    "judge/probe/noise": 1.1,
    "judge/probe_failed": 0.0,
}


def verdict(query_id, repeats=(), *, system="a", status="ok", tokens=None):
    score = math.nan if status != "ok" else 3.0
    raw = {"repeats": list(repeats), "raw": tokens and {"reply": "x", "tokens": tokens}}
    return Verdict(
        query_id, system, 0, score, status, "", "sad", "label", "", "", None, None, "j",
        {"score": raw},
    )  # fmt: skip


def test_a_judge_passes_on_what_was_measured():
    assert Card("j", {}, GOOD).is_passed
    assert Card("j", {}, GOOD | {"judge/flip_rate": 0.1}).is_passed
    assert not Card("j", {}, {}).is_passed  # Nothing was probed.


@pytest.mark.parametrize(
    ("figure", "value", "words"),
    [
        ("judge/probe_order", 0.6, "probes in their order of merit: 0.60, should be at least 0.85"),
        ("judge/probe/silence", 2.0, "mean score of silence"),
        ("judge/unparsed", 0.2, "without a readable score"),
        ("judge/flip_rate", 0.4, "orders that change"),
        ("judge/attack_changed", 0.5, "led by more than one point"),
    ],
)
def test_each_failure_is_told(figure, value, words):
    found = Card("j", {}, GOOD | {figure: value})
    (failure,) = found.failures
    assert words in failure and not found.is_passed


def test_flip_rate_by_hand():
    # Three repeats, where a - b is +1, -1, +1: of three pairs of repeats two flip.
    rows = [verdict("q", (4, 3, 5), system="a"), verdict("q", (3, 4, 4), system="b")]
    assert card.flip_rate(rows) == pytest.approx(2 / 3)
    # A tie is no order; answers to different queries are not compared.
    rows = [verdict("q", (4, 3), system="a"), verdict("q", (3, 3), system="b")]
    assert math.isnan(card.flip_rate(rows))
    assert math.isnan(card.flip_rate([verdict("q", (4, 3)), verdict("p", (3, 4))]))
    # A repeat that failed is left out.
    rows = [verdict("q", (4, None, 5), system="a"), verdict("q", (3, 4, 4), system="b")]
    assert card.flip_rate(rows) == 0.0


def test_figures_of_verdicts_by_hand():
    rows = [
        verdict("q", (2, 4), tokens=[100, 10]),
        verdict("p", status="score: the reply is not the JSON asked for"),
        verdict("r", status="tone: too long"),
        verdict("s", tokens=[50, 5]),
    ]
    found = card.verdict_figures(rows)
    assert found["judge/unparsed"] == 0.25
    assert found["judge/spread"] == 1.0  # Of 2 and 4.
    assert (found["judge/tokens_in"], found["judge/tokens_out"]) == (150.0, 15.0)


def test_tokens_of_all_repeats_count():
    raw = {"repeats": [3.0, 3.0], "raw": [{"reply": "", "tokens": [7, 1]}, None]}
    row = Verdict(
        "q", "a", 0, 3.0, "ok", "", "sad", "label", "", "", None, None, "j", {"score": raw}
    )
    assert card.verdict_figures([row])["judge/tokens_in"] == 7.0


def test_card_is_written_and_read_back(tmp_path):
    agreement = {"all": Agreement(0.8, (0.7, math.nan), 0.7, 0.6, 0.5, math.nan, 40, 3)}
    made = Card(
        "gpt-x",
        {"score": {"model": "gpt-x"}},
        GOOD | {"judge/flip_rate": math.nan, "judge/probe_order": 0.5},
        agreement,
        Ranking(("a", "b"), ("b", "a"), -1.0, 1),
    )
    assert card.read_card(tmp_path) is None
    card.write_card(made, tmp_path)
    found = card.read_card(tmp_path)
    assert (found.judge, found.is_passed, len(found.failures)) == ("gpt-x", False, 1)
    assert found.about == made.about and math.isnan(found.figures["judge/flip_rate"])
    values = json.loads((tmp_path / "card.json").read_text())
    assert values["figures"]["judge/flip_rate"] is None
    text = (tmp_path / "card.md").read_text()
    assert "NOT PASSED" in text and "| all | 0.8 [0.7, n/a] |" in text
    assert "by people: b, a; 1 pairs in reverse" in text
