import csv
import dataclasses
import io
import math

import pytest
import rich.console

from paras2s_jax.bench import tables
from paras2s_jax.bench.aggregate import BenchError, Estimate
from paras2s_jax.bench.comparison import Comparison
from paras2s_jax.judge.card import Card

JUDGE = tables.JudgeInfo.of({"score": {"model": "rubric-1", "settings": {}}})


def estimate(value, failed=0):
    return Estimate(value, value - 0.1, value + 0.1, 20, failed, 10)


def results(columns=("age", "emotion"), **fields):
    def system(name, value, hit):
        scores = {column: estimate(value + n) for n, column in enumerate(columns)}
        scores["mean"] = estimate(value + 0.5, failed=3)
        swap = {column: estimate(value - 3) for column in (*columns, "mean")}
        styles = {"emotion/sad": estimate(value)}
        return tables.SystemResult(name, scores, swap, hit, 20, styles, {"v1": estimate(value)})

    values = {
        "systems": (system("sft", 3.0, 0.95), system("grpo", 3.5, math.nan)),
        "comparisons": (
            Comparison(
                "grpo", "sft", 0.1, 0.05, 0.15, 0.35, 0.2, 0.5, 0.8, 0.004, 0.25, 3.85, 3.5, 18, 2
            ),
        ),
        "judges": ("rubric-1-abc",),
        "style_sources": ("analyzer",),
        "judge": JUDGE,
        "query_set": "c0ffee",
        "ear": "PocketSphinx 5",
        "num_queries": 20,
        "num_resamples": 2000,
    }
    return tables.Results(**(values | fields))


def test_figures_have_the_agreed_names():
    flat = tables.figures(results())
    assert set(flat) == {
        f"bench/{system}/{name}"
        for system in ("sft", "grpo")
        for name in (
            "mean", "age", "emotion", "swap_gain", "swap_gain_low", "swap_gain_high", "failed",
            "asr_hit",
        )
    } | {
            f"bench/grpo_vs_sft/{name}"
            for name in (
                "rel", "low", "high", "diff", "effect_size", "p_value", "min_detectable",
            )
        }  # fmt: skip
    assert flat["bench/sft/mean"] == 3.5 and flat["bench/sft/failed"] == 3.0
    assert flat["bench/grpo/swap_gain_low"] == pytest.approx(0.4)
    assert flat["bench/grpo_vs_sft/rel"] == 0.1


def test_markdown_row_and_caption():
    text = tables.to_markdown(results())
    assert text.splitlines()[0] == (
        "| System | Age | Emotion | Overall | Swap gain | Failed | Heard |"
    )
    assert (
        "| sft | 3.00 [2.90, 3.10] | 4.00 [3.90, 4.10] | 3.50 [3.40, 3.60] "
        "| +0.00 [-0.10, +0.10] | 3/23 | 95 % |" in text
    )
    assert "| n/a |" in text  # grpo was not heard.
    assert (
        "Judge: rubric-1-abc; scorer rubric-1; style of the query: heard by the analyzers." in text
    )
    assert "card" not in text
    assert (
        "grpo against sft, paired: +10.0 % [+5.0, +15.0], +0.35 points, effect size +0.80, p = "
        "0.004 (18 queries, 2 unpaired; 0.25 points would be found with probability 0.8)." in text
    )


def test_labels_are_announced():
    assert "TRUE LABELS" in tables.to_markdown(results(style_sources=("label",)))
    waves = tables.JudgeInfo.of({"score": {"model": "reward-1", "settings": {}, "wants": "waves"}})
    said = tables.to_markdown(results(style_sources=("label",), judge=waves))
    assert "style of the query: heard by the scorer itself" in said and "LABELS" not in said


def test_the_table_says_how_the_judge_did_on_its_card():
    def said(card):
        return tables.to_markdown(results(judge=dataclasses.replace(JUDGE, card=card)))

    assert "The judge passed its card." in said(tables.CardMark(True))
    failed = said(tables.CardMark(False, ("silence scores 4.1", "order 61 %")))
    assert "THE JUDGE FAILED ITS CARD (silence scores 4.1; order 61 %)" in failed


@pytest.mark.parametrize(
    ("model", "prompt", "words"),
    [
        ("rubric-1", "", "rubric-1"),
        ("gpt-5-mini-prompt1", "1", "gpt-5-mini-prompt1, prompt version 1"),
        ("qwen-prompt12-0c9e", "12", "qwen-prompt12-0c9e, prompt version 12"),
    ],
)
def test_the_version_of_a_prompt_is_told(model, prompt, words):
    info = tables.JudgeInfo.of({"score": {"model": model, "settings": {}}})
    assert (info.prompt, info.words) == (prompt, words)


def test_a_card_is_passed_when_probes_were_run_and_none_failed():
    def mark(figures):
        return tables.CardMark.of(Card("rubric-1", {}, figures))

    assert mark({"judge/probe_order": 0.9}) == tables.CardMark(True)
    assert mark({}) == tables.CardMark(False, ("not probed",))
    failed = mark({"judge/probe_order": 0.5})
    assert not failed.passed and failed.failed == (
        "probes in their order of merit: 0.50, should be at least 0.85",
    )


def test_real_columns_and_averages_only_where_present():
    headings = [title for title, _ in tables.layout(results(("age", "gender", "meld", "iemocap")))]
    assert headings[:8] == [
        "System", "Age", "Gender", "Synthetic", "IEMOCAP", "MELD", "Real", "Overall",
    ]  # fmt: skip
    rows = tables.to_markdown(results(("age", "gender", "iemocap", "meld"))).splitlines()
    # Columns are 3, 4, 5 and 6: the averages are 3.5 and 5.5.
    assert [cell.strip() for cell in rows[2].split("|")][4:8:3] == ["3.50", "5.50"]


def test_csv_is_unrounded_and_complete():
    rows = list(csv.DictReader(io.StringIO(tables.to_csv(results()))))
    # 2 systems: scores and gains of 3 columns, 1 style, 1 voice.
    assert len(rows) == 2 * (2 * 3 + 2)
    assert rows[0] | {"low": None, "high": None} == {
        "system": "sft", "quantity": "score", "column": "age", "value": "3.0", "low": None,
        "high": None, "num_scored": "20", "num_failed": "0", "num_sentences": "10",
    }  # fmt: skip


def test_terminal_table_shows_intervals():
    console = rich.console.Console(width=110, file=io.StringIO())
    console.print(tables.to_rich(results()))
    text = console.file.getvalue()
    assert "2.90…3.10" in text and "-0.10…0.10" in text and "bootstrap" in text


@pytest.mark.parametrize("card", [None, tables.CardMark(False, ("silence scores 4.1",))])
def test_results_survive_their_file(tmp_path, card):
    whole = results(judge=dataclasses.replace(JUDGE, card=card))
    tables.write_results(whole, tmp_path)
    back = tables.read_results(tmp_path)
    assert math.isnan(back.systems[1].asr_hit)
    assert dataclasses.replace(back, systems=()) == dataclasses.replace(whole, systems=())
    assert back.systems[0] == whole.systems[0]
    assert "NaN" not in (tmp_path / "results.json").read_text()


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"systems": []}', '{"systems": [{"name": "a"}], "comparisons": []}']
)
def test_other_files_are_no_results(tmp_path, text):
    with pytest.raises(BenchError, match="run the bench first"):
        tables.read_results(tmp_path)
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(BenchError, match="not the results of a bench of this version"):
        tables.read_results(tmp_path)
