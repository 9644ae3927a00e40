import base64
import dataclasses
import html.parser
import io
import json
import math
import re

import pytest
import soundfile

from paras2s_jax.bench import cards, charts, report, tables
from paras2s_jax.bench.aggregate import BenchError
from paras2s_jax.bench.ear import Hearing
from paras2s_jax.data.records import Response, read_jsonl, write_jsonl

EVIL = "<script>alert('x')</script> \" onload=alert(1) </script>"
VOID = {"meta", "input", "link", "br", "line", "circle", "path", "rect"}


class Page(html.parser.HTMLParser):
    """Tags in order, attributes, and a check that every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def benched(asked, bench_of, make):
    """Two systems whose every word is evil; the verdict on each system's first answer fails."""
    queries, root = asked
    queries = [dataclasses.replace(query, text=f"Words {EVIL}") for query in queries]

    class EvilJudge(make.judge):
        def judge(self, pairs, **kwargs):
            rows = super().judge(pairs, **kwargs)
            raw = {"score": {"reason": EVIL, "raw": [{"reply": EVIL}], "repeats": [4.0, None, 2.0]}}
            evil = {"transcript_out": EVIL, "tone_out": EVIL, "raw": raw}
            rows = [dataclasses.replace(row, **evil) for row in rows]
            return [dataclasses.replace(rows[0], score=math.nan), *rows[1:]]

    systems = {"sft": lambda query: EVIL, "grpo": lambda query: f"{query.style} {EVIL}"}
    bench_of("bench", systems, EvilJudge(), queries=queries, comparisons=[("grpo", "sft")])
    rows = [{"step": n, "reward/mean": 2 + n / 9, "kl/text": n / 50} for n in range(9)]
    (root / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def write(root, **fields):
    fields = {"curves": charts.grpo_charts(root / "metrics.jsonl")} | fields
    return report.write_report(root / "bench", root, root / "report" / "index.html", **fields)


def page(root, **fields):
    return write(root, **fields).read_text(encoding="utf-8")


def test_page_is_self_contained_and_well_formed(benched):
    text = page(benched, about={"config": EVIL}, title=EVIL)
    parsed = Page(text)
    assert not parsed.all("img")
    assert [attrs["href"] for attrs in parsed.all("link")] == ["data:,"]
    assert all(attrs["src"].startswith("data:audio/") for attrs in parsed.all("audio"))
    assert all("src" not in attrs for attrs in parsed.all("script"))
    assert "http://" not in text and "https://" not in text and "@import" not in text


def test_untrusted_text_is_escaped(benched):
    text = page(benched, about={"config": EVIL}, title=EVIL)
    parsed = Page(text)
    # The page's own script, and three blocks of data.
    assert [attrs.get("type") for attrs in parsed.all("script")] == ["application/json"] * 3 + [
        None
    ]
    assert "<script>alert" not in text
    assert not any(name.startswith("on") for _, attrs in parsed.tags for name in attrs)
    # It is shown, as text: sentence, stream, transcript, tone, reason, title and fact.
    assert text.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") > 20


def test_policy_names_only_the_own_script(benched):
    text = page(benched)
    (policy,) = [
        attrs["content"]
        for attrs in Page(text).all("meta")
        if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert len(re.findall(r"script-src 'sha256-[^']{44}'", policy)) == 1
    assert not any("style" in attrs for _, attrs in Page(text).tags)


def test_every_answer_has_a_labelled_player(benched):
    parsed = Page(page(benched))
    players = parsed.all("audio")
    # 4 sentences in 2 styles: a query and 2 answers each.
    assert len(players) == 4 * 2 * 3
    assert all(attrs["aria-label"] and "controls" in attrs for attrs in players)
    assert any(attrs["aria-label"].startswith("Answer of grpo to the sad") for attrs in players)
    data = base64.b64decode(players[0]["src"].split(",")[1])
    wave, rate_hz = soundfile.read(io.BytesIO(data))
    assert rate_hz == 16_000 and 0.25 < len(wave) / rate_hz < 0.5 and abs(wave).max() > 0.05


def test_filters_scores_and_curves_are_there(benched):
    text = page(benched)
    parsed = Page(text)
    values = [attrs["value"] for attrs in parsed.all("input") if attrs.get("type") == "radio"]
    assert values == ["", "age", "emotion"]
    assert {attrs["data-column"] for attrs in parsed.all("article")} == {"age", "emotion"}
    assert "not scored" in text and '<span class="score s2">' in text
    assert re.search(r"KL to the SFT policy by step: text from 0 to 0\.16", text)
    assert "Not recorded: kl/audio." in text
    assert "Training curves" not in page(benched, curves=())


def test_page_stays_within_its_size(benched):
    whole = page(benched)
    assert "shown (4 of 4)" in whole and "not inside this page" not in whole
    one = sum(len(attrs["src"]) for attrs in Page(whole).all("audio")) / 4
    small = page(benched, max_mb=1.5 * one / 1e6)
    assert len(small) < len(whole) and "shown (1 of 4)" in small
    assert "../bench/sft/wavs/" in small and "../queries/" in small
    assert "shown (2 of 4)" in page(benched, sentences_per_column=1)


def test_what_the_judge_was_is_told(benched):
    assert "The judge passed its card" not in page(benched)
    results = tables.read_results(benched / "bench")
    card = tables.CardMark(False, (f"silence {EVIL}",))
    judge = dataclasses.replace(results.judge, card=card)
    tables.write_results(dataclasses.replace(results, judge=judge), benched / "bench")
    assert "The judge failed its card: silence &lt;script&gt;" in page(benched)


def test_a_bench_with_holes_is_refused(benched):
    path = benched / "bench" / "sft" / "swapped.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    with pytest.raises(BenchError, match="is a folder"):
        report.write_report(benched / "bench", benched, benched)
    path.write_text("".join(lines[1:]))
    with pytest.raises(BenchError, match=r"swapped\.jsonl lacks"):
        page(benched)


def test_answers_of_earlier_benches_are_left_out(benched):
    path = benched / "bench" / "sft" / "responses.jsonl"
    first, *others = read_jsonl(path, Response)
    write_jsonl(path, [dataclasses.replace(first, query_id="asked before"), first, *others])
    assert "asked before" not in page(benched)


def test_real_speech_has_no_other_style(asked, bench_of, make, open_page):
    queries, root = asked
    real = [dataclasses.replace(query, topic="meld") for query in queries[:2]]
    bench_of("bench", {"deaf": lambda query: "fine"}, make.judge(), queries=real)
    view = open_page(write(root, curves=()))
    assert "Style-swap gain" not in view.inner_text("#scores")
    assert rows_of(view).first.locator("td").last.inner_text() == "n/a"
    rows_of(view).first.locator("button").click()
    assert "swap gain" not in view.inner_text(".detail")


def test_a_system_that_scores_nowhere_is_shown(asked, bench_of, make, open_page):
    bench_of("bench", {"broken": lambda query: "broken"}, make.judge())
    view = open_page(write(asked[1], curves=()))
    assert view.inner_text("#answer-count") == "8 answers, 8 not scored, mean score n/a"
    assert view.locator("#scores .panel").count() == 0
    assert "n/a" in view.inner_text("#breakdowns tbody tr >> nth=0")


def test_sentences_are_picked_by_place_columns_in_turn(make):
    queries = [make.query(f"e{n}", "sad") for n in range(9)]
    queries += [make.query(f"a{n}", "child", dimension="age") for n in range(2)]
    assert cards.select_sentences(queries, 3) == ["a0", "e0", "a1", "e4", "e8"]


@pytest.mark.parametrize(
    ("cell", "value"),
    [("3.92 [3.80, 4.03]", "3.92"), ("+0.10 [-0.1, 0.2]", "0.1"), ("3/23", "3"), ("95 %", "95"),
     ("n/a", ""), ("–", "")],
)  # fmt: skip
def test_cells_sort_by_their_numbers(cell, value):
    assert report.sort_value(cell) == value


def rows_of(view):
    return view.locator("#answer-table .answer-row")


def test_answers_are_filtered(open_page, benched):
    view = open_page(write(benched))
    status = view.locator("#answer-count")
    # 2 systems, 8 queries; of each system one verdict failed. sft has 2, grpo 4 in every other.
    assert status.inner_text() == "16 answers, 2 not scored, mean score 3.00"
    view.select_option("[name=system]", "grpo")
    assert status.inner_text() == "8 answers, 1 not scored, mean score 4.00"
    view.select_option("[name=dimension]", "Age")
    view.select_option("[name=style]", "child")
    assert rows_of(view).count() == 2
    view.click("text=Reset")
    view.select_option("[name=verdict]", "failed")
    assert status.inner_text() == "2 answers, 2 not scored, mean score n/a"
    view.select_option("[name=verdict]", "")
    view.fill("[name=low]", "3")
    assert status.inner_text() == "7 answers, 0 not scored, mean score 4.00"
    view.fill("[name=words]", "surprised <script>")
    assert rows_of(view).count() == 1
    view.select_option("[name=voice]", "v1")
    view.fill("[name=words]", "nobody said this")
    assert status.inner_text() == "0 answers, 0 not scored, mean score n/a"


def test_answers_are_sorted_and_paged(open_page, benched):
    view = open_page(write(benched))
    heading = view.locator("#answer-table th", has_text="Score")
    scores = view.locator("#answer-table .answer-row .score")
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    # The failed come last in both directions.
    assert scores.all_inner_texts() == ["4.0"] * 7 + ["2.0"] * 7 + ["not scored"] * 2
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert scores.all_inner_texts() == ["2.0"] * 7 + ["4.0"] * 7 + ["not scored"] * 2
    view.locator("#answer-table th button", has_text="System").first.click()
    assert heading.get_attribute("aria-sort") is None
    assert rows_of(view).first.locator("button").inner_text() == "grpo"
    # No more rows than a page are ever drawn.
    view.evaluate("document.querySelector('#answer-rows').options[0].text = '5'")
    view.select_option("#answer-rows", index=0)
    assert rows_of(view).count() == 5
    assert view.inner_text("#answer-page") == "1 to 5 of 16"
    view.click("[data-go=last]")
    assert view.inner_text("#answer-page") == "16 to 16 of 16" and rows_of(view).count() == 1
    assert view.get_attribute("[data-go=next]", "aria-disabled") == "true"
    view.click("[data-go=previous]")
    assert view.inner_text("#answer-page") == "11 to 15 of 16"


def test_tables_of_systems_are_sorted(open_page, benched):
    view = open_page(write(benched))
    table = view.locator("#scores table")
    assert table.locator("tbody th").all_inner_texts() == ["sft", "grpo"]
    table.locator("thead button", has_text="Overall").click()
    assert table.locator("tbody th").all_inner_texts() == ["grpo", "sft"]
    assert table.locator("[aria-sort=descending]").inner_text().startswith("Overall")
    assert view.locator("#breakdowns tbody tr").count() == 4 + 1


def test_text_of_models_stays_text(open_page, benched):
    view = open_page(write(benched, title=EVIL))
    rows_of(view).nth(1).locator("button").click()
    view.click(".detail .raw summary")
    for text in (view.inner_text(".detail"), view.inner_text("h1"), view.title()):
        assert "<script>alert('x')</script>" in text
    assert "<script>alert" in view.inner_text(".detail .raw pre")
    assert "4.0, failed, 2.0" in view.inner_text(".detail")
    assert view.evaluate("document.scripts.length") == 4


def test_what_the_ear_heard_is_shown(open_page, benched):
    path = benched / "bench" / "grpo" / "responses.jsonl"
    rows = [
        Hearing(row.query_id, row.sample, f"heard {EVIL}", None, False, "")
        for row in read_jsonl(path, Response)
    ]
    write_jsonl(path.with_name("heard.jsonl"), rows)
    view = open_page(write(benched))
    view.select_option("[name=system]", "grpo")
    rows_of(view).first.locator("button").click()
    assert f"heard {EVIL}" in view.inner_text(".detail .facts >> nth=1")


@pytest.mark.parametrize("max_mb", [12.0, 0.0])
def test_players_play_from_the_page_and_from_files(open_page, benched, max_mb):
    view = open_page(write(benched, max_mb=max_mb))
    rows_of(view).first.locator("button").click()
    for player in view.locator(".detail audio").all():
        embedded = player.get_attribute("src").startswith("data:audio/")
        assert embedded == (max_mb > 0)
        player.evaluate("audio => { audio.preload = 'auto'; audio.load(); }")
        view.wait_for_function("audio => audio.readyState >= 3", arg=player.element_handle())
    assert len(view.locator(".detail audio").all()) == 2


def test_a_missing_recording_is_reported(open_page, benched):
    view = open_page(write(benched, max_mb=0.0), lacks_files=True)
    for wav in (benched / "bench" / "sft" / "wavs").iterdir():
        wav.unlink()
    rows_of(view).first.locator("button").click()
    view.locator(".answer audio").evaluate("audio => { audio.preload = 'auto'; audio.load(); }")
    assert "The recording is not at ../bench/sft/wavs/" in view.inner_text(
        ".answer .wrong >> nth=0"
    )


def test_everything_works_by_keyboard(open_page, benched, tab_to):
    view = open_page(write(benched))
    view.keyboard.press("Tab")
    assert view.evaluate("document.activeElement.matches('.skip')")
    tab_to(view, "#scores thead button")
    view.keyboard.press("Enter")
    assert view.locator("#scores [aria-sort=ascending]").count() == 1
    tab_to(view, ".chart svg")
    view.keyboard.press("ArrowLeft")
    assert view.locator(".chart output").first.inner_text() == "step 7"
    tab_to(view, "[name=column]")
    view.keyboard.press("ArrowDown")
    assert view.inner_text("#count") == "2 sentences"
    tab_to(view, "[name=system]", most=400)
    view.keyboard.type("sft")
    tab_to(view, "[name=words]")
    view.keyboard.type("words")
    assert view.inner_text("#answer-count").startswith("8 answers")
    tab_to(view, "#answer-table thead button")
    view.keyboard.press("Space")
    assert view.locator("#answer-table [aria-sort]").count() == 1
    tab_to(view, ".answer-row button")
    view.keyboard.press("ArrowDown")
    view.keyboard.press("Enter")
    assert rows_of(view).nth(1).locator("[aria-expanded=true]").count() == 1
    tab_to(view, ".detail audio")
    tab_to(view, ".detail .raw summary")
    view.keyboard.press("Enter")
    assert '"reply"' in view.inner_text(".detail .raw pre")
    outline = view.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline not in ("none", "")
    tab_to(view, "#answer-rows")


def test_page_is_accessible(open_page, benched, serious_violations):
    view = open_page(write(benched))
    rows_of(view).nth(1).locator("button").click()
    for summary in view.locator(".raw summary").all():
        summary.click()
    for scheme, width in (("light", 1280), ("dark", 390)):
        view.emulate_media(color_scheme=scheme)
        view.set_viewport_size({"width": width, "height": 900})
        assert serious_violations(view) == []
        # Nothing but the tables scrolls sideways.
        assert view.evaluate("document.documentElement.scrollWidth") <= width
