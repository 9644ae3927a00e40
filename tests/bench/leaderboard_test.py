import csv
import dataclasses
import io
import json
import shutil

import pytest

from paras2s_jax.bench import leaderboard, tables
from paras2s_jax.bench.aggregate import BenchError

EVIL = "<script>alert('x')</script>"


@pytest.fixture
def benches(bench_of, make):
    """benches(**edits): folders of benches of the same judge and queries, their results edited.

    The first holds `listens` (4.0) and `deaf` (2.0), the others `deaf` only.
    """

    def build(**edits):
        first = bench_of(
            "first", {"listens": lambda q: q.style, "deaf": lambda q: "fine"}, make.judge()
        )
        second = bench_of("second", {"deaf": lambda q: "fine"}, make.judge())
        folders = [first]
        for name, edit in edits.items():
            folder = first.parent / name
            shutil.copytree(second, folder)
            results = tables.read_results(folder)
            tables.write_results(edit(results), folder)
            folders.append(folder)
        return folders

    return build


def same(results):
    return results


def judged_by(**fields):
    def edit(results):
        judge = dataclasses.replace(results.judge, **fields)
        return dataclasses.replace(results, judge=judge)

    return edit


def test_systems_of_one_measure_are_ranked_together(benches, tmp_path):
    out = tmp_path / "board"
    page = leaderboard.write_leaderboard(benches(again=same), out)
    assert page == out / "index.html" and page.is_file()
    (section,) = leaderboard.sections([page.parents[1] / name for name in ("first", "again")])
    assert [(row.rank, row.system.name, row.bench) for row in section.rows] == [
        (1, "listens", "first"), (2, "deaf", "again"), (3, "deaf", "first"),
    ]  # fmt: skip
    # All 4 sentences differ by 2 points: of 2**4 flips of signs, 2 are as extreme.
    assert section.rows[1].behind.diff == -2.0 and section.rows[0].behind is None
    assert leaderboard.standing(section.rows[0]) == "first"
    assert leaderboard.standing(section.rows[1]).startswith("-2.00 [-2.00, -2.00] p = 0.")
    assert "not told apart" in leaderboard.standing(section.rows[1])
    rows = list(csv.DictReader(io.StringIO((out / "leaderboard.csv").read_text())))
    assert [row["mean"] for row in rows] == ["4.0", "2.0", "2.0"]
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    assert rows[0]["judge"] == "rubric-1" and rows[0]["card"] == "none"
    markdown = (out / "leaderboard.md").read_text()
    assert "| 1 | listens | first | 4.00 [4.00, 4.00] | first |" in markdown
    assert "Not ranked" not in markdown


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (
            judged_by(scorer="gpt-prompt2", prompt="2"),
            "another scorer (gpt-prompt2, prompt version 2 instead of rubric-1)",
        ),
        (
            judged_by(settings={"score": {"model": "rubric-1", "settings": {"t": 1}}}),
            "another score stage, in its settings",
        ),
        (
            judged_by(
                settings={
                    "score": {"model": "rubric-1", "settings": {}},
                    "transcribe": {"model": "big", "settings": {}},
                }
            ),
            "another transcribe stage (big instead of none)",
        ),
        (
            lambda results: dataclasses.replace(results, judges=("rubric-2",)),
            "another judge (rubric-2 instead of rubric-1)",
        ),
        (
            lambda results: dataclasses.replace(results, style_sources=("label",)),
            "another source of the styles (TRUE LABELS given to the judge instead of heard by the "
            "analyzers)",
        ),
        (
            lambda results: dataclasses.replace(results, query_set="0123"),
            "other queries (8 in set 0123 instead of 8 in set ",
        ),
    ],
)
def test_other_measures_stand_apart_and_say_why(benches, edit, why):
    first, second = leaderboard.sections(benches(other=edit))
    assert first.why == () and len(first.rows) == 2
    assert len(second.why) == 1 and second.why[0].startswith(why)
    assert [(row.rank, row.behind) for row in second.rows] == [(1, None)]


def test_a_failed_card_is_told(benches, tmp_path):
    failed = judged_by(card=tables.CardMark(False, ("silence scores 4.1",)))
    page = leaderboard.write_leaderboard(benches(other=failed), tmp_path / "board")
    assert "The judge failed its card (other: silence scores 4.1)" in page.read_text()
    assert "**The judge failed its card** (other: silence" in (
        tmp_path / "board" / "leaderboard.md"
    ).read_text(encoding="utf-8")


def test_folders_that_are_no_benches_are_refused(benches, tmp_path):
    first, second = benches(other=same)
    for folders, message in (
        ([tmp_path / "nowhere"], "no such file; run the bench first"),
        ([first, first], "given twice"),
        ([], "at least one bench"),
    ):
        with pytest.raises(BenchError, match=message):
            leaderboard.write_leaderboard(folders, tmp_path / "board")
    (tmp_path / "run").mkdir()
    shutil.copytree(first, tmp_path / "run" / "bench")
    with pytest.raises(BenchError, match=r"did you mean .*run/bench\?"):
        leaderboard.write_leaderboard([second, tmp_path / "run"], tmp_path / "board")
    (second / "results.json").write_text(json.dumps({"systems": []}))
    with pytest.raises(BenchError, match="not the results of a bench"):
        leaderboard.write_leaderboard([first, second], tmp_path / "board")


def test_labels_are_the_parts_that_differ(tmp_path):
    paths = [tmp_path / "runs" / name / "bench" for name in ("a", "b")]
    assert leaderboard._labels(paths) == ["a", "b"]
    assert leaderboard._labels(paths[:1]) == ["bench"]
    assert leaderboard._labels([tmp_path / "x", tmp_path / "x" / "y"]) == ["x", "x/y"]


def test_systems_without_a_score_have_no_rank(bench_of, make):
    folder = bench_of(
        "bench", {"broken": lambda q: "broken", "deaf": lambda q: "fine"}, make.judge()
    )
    (section,) = leaderboard.sections([folder])
    assert [(row.rank, row.system.name) for row in section.rows] == [(1, "deaf"), (None, "broken")]
    assert leaderboard.standing(section.rows[1]) == "nothing scored"


def test_page_sorts_escapes_and_is_accessible(
    benches, tmp_path, open_page, serious_violations, tab_to
):
    other = judged_by(scorer=EVIL, settings={"score": {"model": EVIL, "settings": {}}})
    page = leaderboard.write_leaderboard(
        benches(again=same, other=other), tmp_path / "board", title=EVIL
    )
    view = open_page(page)
    assert EVIL in view.inner_text("h1") and EVIL in view.inner_text("section:nth-of-type(2)")
    assert view.evaluate("document.scripts.length") == 1
    view.locator("section:nth-of-type(2) details summary").click()
    assert json.loads(view.inner_text("section:nth-of-type(2) pre"))["score"]["model"] == EVIL
    systems = view.locator("section:nth-of-type(1) tbody th")
    assert systems.all_inner_texts() == ["listens", "deaf", "deaf"]
    tab_to(view, "thead button")
    view.keyboard.press("Enter")
    assert systems.all_inner_texts() == ["deaf", "deaf", "listens"]
    assert view.locator("[aria-sort=descending]").inner_text().startswith("Rank")
    for scheme, width in (("light", 1280), ("dark", 390)):
        view.emulate_media(color_scheme=scheme)
        view.set_viewport_size({"width": width, "height": 900})
        assert serious_violations(view) == []
        assert view.evaluate("document.documentElement.scrollWidth") <= width
