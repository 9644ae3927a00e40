import dataclasses
import io
import math
import os
from pathlib import Path

import numpy as np
import pytest
import rich.console
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.bench import run
from paras2s_jax.bench.systems import RecordedSystem
from paras2s_jax.data.records import Query, Response, Verdict

CHROMIUM = Path("/usr/bin/chromium")
CHROMIUM_ARGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
CONTRASTS = {"emotion": ("surprised", "sad"), "age": ("child", "adult")}


def make_query(sentence_id, style, *, dimension="emotion", voice="v1", topic="topic", dur_s=0.3):
    contrast = next(name for name in CONTRASTS[dimension] if name != style)
    query_id = f"{sentence_id}-{style}-{voice}"
    return Query(
        id=query_id,
        sentence_id=sentence_id,
        dimension=dimension,
        text=f"Words of {sentence_id}.",
        style=style,
        contrast=contrast,
        topic=topic,
        split="test",
        voice=voice,
        wav=f"queries/{query_id}.wav",
        dur_s=dur_s,
    )


def make_verdict(query_id, score, *, system="a", sample=0, **fields):
    verdict = Verdict(
        query_id=query_id,
        system=system,
        sample=sample,
        score=score,
        status="tone: too long" if math.isnan(score) else "ok",
        transcript_in="words",
        style_in="sad",
        style_source="analyzer",
        transcript_out="oh dear",
        tone_out="gentle",
        content=None,
        tone_fit=None,
        judge="rubric-1",
        raw={"score": {"reason": "fits"}},
    )
    return dataclasses.replace(verdict, **fields)


def tone(hz, dur_s=0.3):
    t = np.arange(round(dur_s * wave_lib.RATE_HZ)) / wave_lib.RATE_HZ
    return (0.1 * np.sin(2 * np.pi * hz * t)).astype(np.float32)


class StyleJudge:
    """Scores 4 where the answer's text names the query's style, else 2; NaN for 'broken'."""

    name = "rubric-1"

    def __init__(self):
        self.calls = []

    def describe(self):
        return {"score": {"model": self.name, "settings": {}}}

    def judge(self, pairs, *, use_labels=False):
        self.calls.append(len(pairs))
        verdicts = []
        for query, query_wav, response, wav in pairs:
            assert Path(query_wav).is_file() and Path(wav).is_file()
            score = (
                math.nan
                if response.text == "broken"
                else 2.0 + 2.0 * (query.style in response.text)
            )
            verdicts.append(
                make_verdict(
                    query.id,
                    score,
                    system=response.system,
                    sample=response.sample,
                    style_source="label" if use_labels else "analyzer",
                )
            )
        return verdicts


@pytest.fixture
def asked(tmp_path):
    """(queries, root): two sentences of two dimensions in both styles, with wavs."""
    queries = [
        make_query(f"{dimension}-{index}", style, dimension=dimension)
        for dimension, styles in CONTRASTS.items()
        for index in range(2)
        for style in styles
    ]
    for index, query in enumerate(queries):
        wave_lib.save(tmp_path / query.wav, tone(200 + 50 * index))
    return queries, tmp_path


@pytest.fixture
def recorded(asked):
    """Writes a responses.jsonl: recorded(name, text_of) -> its path."""
    queries, root = asked

    def write(name, text_of):
        from paras2s_jax.data.records import write_jsonl

        rows = []
        for query in queries:
            wav = f"{name}/{query.id}.wav"
            wave_lib.save(root / "made" / wav, tone(300))
            rows.append(Response(query.id, "writer", 0, text_of(query), wav))
        return write_jsonl(root / "made" / f"{name}.jsonl", rows)

    return write


@pytest.fixture
def make():
    """Factories for rows, as a namespace."""

    class Make:
        query = staticmethod(make_query)
        verdict = staticmethod(make_verdict)
        tone = staticmethod(tone)
        judge = StyleJudge

    return Make


@pytest.fixture
def bench_of(asked, recorded):
    """Runs a bench of recorded systems: bench_of(folder, {name: text_of}, judge) -> its folder."""

    def make_bench(folder, systems, judge, **fields):
        queries, root = asked
        made = [RecordedSystem(name, recorded(name, text_of)) for name, text_of in systems.items()]
        run.bench(
            made, fields.pop("queries", queries), root, root / folder, judge=judge, answers=(),
            num_resamples=50, console=rich.console.Console(file=io.StringIO()), **fields,
        )  # fmt: skip
        return root / folder

    return make_bench


@pytest.fixture(scope="module")
def chromium():
    """A browser of one module's tests: playwright's event loop must not outlive them."""
    if not CHROMIUM.is_file():
        reason = f"{CHROMIUM} is missing: apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """Opens a file: open_page(path, lacks_files=False, **context options) -> page.

    Afterwards the test fails if the page reported an error, opened a dialog, or asked for anything
    but its own files (`lacks_files`: which then may not be there).
    """
    contexts, complaints = [], []

    def complain(text, lacks_files=False):
        if not (lacks_files and "ERR_FILE_NOT_FOUND" in text):
            complaints.append(text)

    def visit(path, lacks_files=False, **options):
        context = chromium.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: complain(message.text, lacks_files))
        page.on("pageerror", lambda error: complain(str(error)))
        page.on("dialog", lambda dialog: complain(dialog.message))
        page.on(
            "request", lambda request: _is_local(request.url) or complain(f"asks for {request.url}")
        )
        page.goto(Path(path).resolve().as_uri())
        return page

    yield visit
    for context in contexts:
        context.close()
    assert complaints == []


def _is_local(url):
    return url.startswith(("file:", "data:", "blob:"))


@pytest.fixture
def serious_violations():
    """serious_violations(page) -> what axe finds serious or critical, as readable lines."""

    def find(page):
        found = Axe().run(page).response["violations"]
        return [
            f"{row['id']}: {row['help']}: {node['target']} {node['failureSummary']}"
            for row in found
            if row["impact"] in ("serious", "critical")
            for node in row["nodes"]
        ]

    return find


@pytest.fixture
def tab_to():
    """tab_to(page, selector): presses Tab until the focus is there; fails where it never is."""

    def press(page, selector, key="Tab", most=150):
        for _ in range(most):
            page.keyboard.press(key)
            if page.evaluate("s => document.activeElement.matches(s)", selector):
                return
        raise AssertionError(f"{selector} cannot be reached by keyboard")

    return press
