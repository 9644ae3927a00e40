import base64
import dataclasses
import html.parser
import io
import json
import math
import re

import pytest
import rich.console
import soundfile

from paras2s_jax.bench import charts, report, run
from paras2s_jax.bench.systems import RecordedSystem

EVIL = "<script>alert('x')</script> \" onload=alert(1)"
VOID = {"meta", "input", "link", "br", "line", "circle", "path"}


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
def benched(asked, recorded, make):
    queries, root = asked
    queries = [dataclasses.replace(query, text=f"Words {EVIL}") for query in queries]

    class EvilJudge(make.judge):
        def judge(self, pairs, **kwargs):
            # The verdict on each system's first answer fails.
            rows = super().judge(pairs, **kwargs)
            evil = {"transcript_out": EVIL, "tone_out": EVIL, "raw": {"score": {"reason": EVIL}}}
            rows = [dataclasses.replace(row, **evil) for row in rows]
            return [dataclasses.replace(rows[0], score=math.nan), *rows[1:]]

    systems = [RecordedSystem(name, recorded(name, lambda q: EVIL)) for name in ("sft", "grpo")]
    run.bench(
        systems, queries, root, root / "bench", judge=EvilJudge(), answers=["So sorry."],
        comparisons=[("grpo", "sft")], num_resamples=50, num_workers=1,
        console=rich.console.Console(file=io.StringIO()),
    )  # fmt: skip
    rows = [{"step": n, "reward/mean": 2 + n / 9, "kl/text": n / 50} for n in range(9)]
    (root / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def page(root, **fields):
    fields = {"curves": charts.grpo_charts(root / "metrics.jsonl")} | fields
    out = report.write_report(root / "bench", root, root / "report" / "index.html", **fields)
    return out.read_text(encoding="utf-8")


def test_page_is_self_contained_and_well_formed(benched):
    text = page(benched, about={"config": EVIL}, title=EVIL)
    parsed = Page(text)
    assert not parsed.all("link") and not parsed.all("img")
    assert all(attrs["src"].startswith("data:audio/") for attrs in parsed.all("audio"))
    assert all("src" not in attrs for attrs in parsed.all("script"))
    assert "http://" not in text and "https://" not in text and "@import" not in text


def test_untrusted_text_is_escaped(benched):
    text = page(benched, about={"config": EVIL}, title=EVIL)
    parsed = Page(text)
    assert len(parsed.all("script")) == 1
    assert "<script>alert" not in text
    assert not any(name.startswith("on") for _, attrs in parsed.tags for name in attrs)
    # It is shown, as text: sentence, stream, transcript, tone, reason, title and fact.
    assert text.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") > 20


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
    values = [attrs["value"] for attrs in parsed.all("input")]
    assert values == ["", "age", "emotion"]
    assert {attrs["data-column"] for attrs in parsed.all("article")} == {"age", "emotion"}
    assert "not scored" in text and "score 2.0 of 5" in text
    assert re.search(r"KL to the SFT policy by step: text from 0 to 0\.16", text)
    assert "Not recorded: kl/audio." in text
    assert "Training curves" not in page(benched, curves=())


def test_page_stays_within_its_size(benched):
    whole = page(benched)
    assert "shown (4 of 4)" in whole
    one = sum(len(attrs["src"]) for attrs in Page(whole).all("audio")) / 4
    small = page(benched, max_mb=1.5 * one / 1e6)
    assert len(small) < len(whole) and "shown (1 of 4)" in small
    assert "shown (2 of 4)" in page(benched, sentences_per_column=1)


def test_sentences_are_picked_by_place_columns_in_turn(make):
    queries = [make.query(f"e{n}", "sad") for n in range(9)]
    queries += [make.query(f"a{n}", "child", dimension="age") for n in range(2)]
    assert report.select_sentences(queries, 3) == ["a0", "e0", "a1", "e4", "e8"]
