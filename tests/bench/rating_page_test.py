import base64
import dataclasses
import json
from collections import Counter

import pytest

from paras2s_jax.bench import rating_page
from paras2s_jax.bench.aggregate import BenchError
from paras2s_jax.bench.rows import read_benches
from paras2s_jax.data.records import Query, Response, read_jsonl, write_jsonl
from paras2s_jax.judge.agreement import SCALE, read_ratings

NAME = 'Zoë "Z", M.'


@pytest.fixture
def benched(asked, bench_of, make):
    """Answers of two systems with telling names to 8 queries."""
    systems = {"telltale": lambda query: query.style, "giveaway": lambda query: "fine"}
    bench_of("bench", systems, make.judge())
    return asked[1]


def write(root, num_pairs=6, seed=3, **fields):
    return rating_page.write_rating_page(
        [root / "bench"],
        root,
        root / "rate" / "index.html",
        num_pairs=num_pairs,
        seed=seed,
        **fields,
    )


def items_of(page):
    """(query id, system, sample) of the page's pairs."""
    text = page.read_text(encoding="utf-8")
    data = text.split('id="data">')[1].split("</script>")[0]
    return [tuple(json.loads(base64.b64decode(item["key"]))) for item in json.loads(data)["items"]]


def test_pairs_come_evenly_from_systems_and_columns(benched):
    items = items_of(write(benched, num_pairs=8))
    # 4 strata: 2 systems in 2 dimensions, 4 answers each.
    assert len(set(items)) == 8
    strata = Counter((system, query_id.split("-")[0]) for query_id, system, _ in items)
    assert set(strata.values()) == {2} and len(strata) == 4
    assert items_of(write(benched, num_pairs=8)) == items
    assert items_of(write(benched, num_pairs=8, seed=4)) != items


def test_for_comparisons_all_answers_to_a_query_are_drawn(benched):
    items = items_of(write(benched, num_pairs=7, together=True))
    # 4 queries of two systems each, 2 of each dimension.
    assert len(items) == 8 and set(Counter(query_id for query_id, *_ in items).values()) == {2}
    assert Counter(query_id.split("-")[0] for query_id, *_ in items) == {"emotion": 4, "age": 4}


def test_two_systems_of_one_name_are_told_apart_first(benched):
    with pytest.raises(BenchError, match="both have a system 'telltale': give each a name"):
        read_benches([benched / "bench", benched / "bench"])


@pytest.mark.parametrize("num_pairs", [0, 17])
def test_more_pairs_than_there_are_is_a_mistake(benched, num_pairs):
    with pytest.raises(BenchError, match="the bench has 16 answers; ask for 1 to 16"):
        write(benched, num_pairs=num_pairs)


def test_answers_that_were_not_given_are_not_rated(benched):
    path = benched / "bench" / "telltale" / "responses.jsonl"
    first, *others = read_jsonl(path, Response)
    others = [dataclasses.replace(row, error="timeout", wav="") for row in others]
    write_jsonl(path, [first, *others])
    items = items_of(write(benched, num_pairs=9))
    assert Counter(system for _, system, _ in items) == {"telltale": 1, "giveaway": 8}


@pytest.mark.parametrize("max_mb", [32.0, 0.0])
def test_nothing_tells_the_system(benched, max_mb):
    page = write(benched, num_pairs=16, max_mb=max_mb)
    text = page.read_text(encoding="utf-8")
    assert "telltale" not in text and "giveaway" not in text
    queries = read_jsonl(benched / "bench" / "queries.jsonl", Query)
    assert not any(query.id in text for query in queries)
    names = sorted(path.name for path in page.parent.rglob("*.wav"))
    # 8 queries, 16 answers.
    assert names == ([f"{n:05d}.wav" for n in range(24)] if max_mb == 0 else [])
    assert text.count("data:audio/flac") == (0 if max_mb == 0 else 24)


def start(view, name=NAME):
    view.fill("#rater", name)
    view.keyboard.press("Enter")


def hear(view):
    view.keyboard.press("Space")
    view.wait_for_selector("#play-answer.heard", timeout=20_000)


def shown(view):
    return tuple(view.evaluate("decoded(item().key)"))


@pytest.mark.parametrize(("max_mb", "scores"), [(32.0, (3, 5, 1, 4)), (0.0, (2, 5))])
def test_ratings_by_keyboard_alone_are_read_back(
    open_page, benched, tmp_path, tab_to, max_mb, scores
):
    page = write(benched, num_pairs=len(scores), max_mb=max_mb)
    view = open_page(page)
    tab_to(view, "#rater")
    view.keyboard.type(NAME)
    view.keyboard.press("Enter")
    given = {}
    for score in scores:
        hear(view)
        given[shown(view)] = score
        view.keyboard.press(str(score))
    assert view.inner_text("#rated") == f"{len(scores)} of {len(scores)} rated"
    assert f"All {len(scores)} pairs are rated" in view.inner_text("#message")
    # A change of mind.
    view.keyboard.press("ArrowLeft")
    given[shown(view)] = 2
    view.keyboard.press("2")
    tab_to(view, "#export")
    with view.expect_download() as download:
        view.keyboard.press("Enter")
    assert download.value.suggested_filename == "ratings-Zoë-Z-M-.csv"
    csv = tmp_path / "ratings.csv"
    download.value.save_as(csv)
    ratings = read_ratings(csv)
    assert {rating.item: rating.score for rating in ratings} == given
    assert {rating.rater for rating in ratings} == {NAME}
    assert [rating.item for rating in ratings] == items_of(page)


def test_a_pair_is_scored_after_it_was_heard(open_page, benched):
    view = open_page(write(benched))
    start(view)
    view.keyboard.press("4")
    view.click("[data-score='2']", force=True)  # Its aria-disabled would make playwright wait.
    assert "Listen to the query and to the answer first" in view.inner_text("#message")
    assert view.inner_text("#rated") == "0 of 6 rated"
    view.click("#play-query")
    view.wait_for_selector("#play-query.heard")
    assert view.get_attribute("[data-score='2']", "aria-disabled") == "true"
    view.click("#play-answer")
    view.wait_for_selector("#play-answer.heard")
    view.uncheck("#go-on")
    view.click("[data-score='2']")
    assert view.get_attribute("[data-score='2']", "aria-pressed") == "true"
    assert view.inner_text("#rated") == "1 of 6 rated"
    assert view.get_attribute("#progress", "aria-valuenow") == "1"
    view.uncheck("#shortcuts")
    view.evaluate("document.activeElement.blur()")
    view.keyboard.press("5")
    assert view.get_attribute("[data-score='2']", "aria-pressed") == "true"


def test_raters_go_on_after_a_reload_in_their_own_order(open_page, benched):
    view = open_page(write(benched, num_pairs=16))
    start(view)
    order = view.evaluate("order")
    for _ in range(2):
        hear(view)
        view.keyboard.press("3")
    third = shown(view)
    view.reload()
    assert view.input_value("#rater") == NAME
    assert view.inner_text("#begin") == "Continue"
    assert "has rated 2 of 16 pairs" in view.inner_text("#known")
    view.click("#begin")
    assert view.inner_text("#rated") == "2 of 16 rated"
    assert shown(view) == third and view.evaluate("order") == order
    view.click("#pause")
    start(view, "somebody else")
    assert view.inner_text("#rated") == "0 of 16 rated"
    other = view.evaluate("order")
    assert other != order and sorted(other) == sorted(order)
    view.keyboard.press("ArrowRight")
    assert view.inner_text("#pair") == "Pair 2 of 16"
    view.click("#export")
    assert view.inner_text("#message") == "There is nothing to export yet."


def test_page_is_accessible(open_page, benched, serious_violations):
    view = open_page(write(benched, num_pairs=16))
    for scheme, width in (("light", 1280), ("dark", 390)):
        view.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        view.set_viewport_size({"width": width, "height": 900})
        assert serious_violations(view) == []
        start(view)
        assert serious_violations(view) == []
        hear(view)
        assert serious_violations(view) == []
        assert view.evaluate("document.documentElement.scrollWidth") <= width
        view.click("#pause")


def test_the_levels_are_those_of_the_scale():
    assert len(rating_page.LEVELS) == len(SCALE)
