import dataclasses
import io
import math

import pytest
import rich.console

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.bench import ear, run, tables
from paras2s_jax.bench.aggregate import BenchError
from paras2s_jax.bench.systems import RecordedSystem
from paras2s_jax.data.records import Verdict, read_jsonl
from paras2s_jax.judge.card import Card

ANSWERS = ("Sad words for you.", "Surprised words for you.")


def bench(systems, asked, judge, answers=ANSWERS, **fields):
    queries, root = asked
    return run.bench(
        systems,
        queries,
        root,
        root / "bench",
        judge=judge,
        answers=answers,
        num_resamples=200,
        num_workers=1,
        console=rich.console.Console(file=io.StringIO()),
        **fields,
    )


@pytest.fixture
def systems(recorded):
    # One answers in the style heard, one says the same to all, one breaks the judge once.
    def broken(query):
        return "broken" if query.id == "age-0-child-v1" else query.style

    texts = {"listens": lambda q: q.style, "deaf": lambda q: "fine", "breaks": broken}
    return [RecordedSystem(name, recorded(name, text_of)) for name, text_of in texts.items()]


def test_scores_gains_and_failures_by_hand(systems, asked, make):
    found = bench(systems, asked, make.judge(), comparisons=[("listens", "deaf")])
    flat = tables.figures(found)
    # The judge gives 4 for the right style, else 2: the listener has 4 and a gain of 2.
    assert flat["bench/listens/mean"] == flat["bench/listens/age"] == 4.0
    assert [flat[f"bench/listens/{n}"] for n in ("swap_gain", "swap_gain_low")] == [2.0, 2.0]
    assert [flat[f"bench/deaf/{n}"] for n in ("mean", "swap_gain", "failed")] == [2.0, 0.0, 0.0]
    assert [flat[f"bench/breaks/{n}"] for n in ("mean", "failed")] == [4.0, 1.0]
    assert [flat[f"bench/listens_vs_deaf/{n}"] for n in ("rel", "low", "high")] == [1.0] * 3
    # The waves are sine tones: the ear must not hear words in them.
    assert flat["bench/listens/asr_hit"] == 0.0


def test_the_results_say_who_judged_and_what_was_asked(systems, asked, make):
    queries, root = asked
    card = Card("rubric-1", {}, {"judge/probe_order": 0.5})
    found = bench(systems[:1], asked, make.judge(), card=card)
    assert found.judge.settings == make.judge().describe() and found.judge.scorer == "rubric-1"
    assert not found.judge.card.passed
    assert run.query_set_of(queries[::-1], root) == found.query_set
    wave_lib.save(root / queries[0].wav, make.tone(440))
    assert run.query_set_of(queries, root) != found.query_set


def test_styles_and_voices_have_their_own_means(systems, asked, make):
    (found,) = bench(systems[1:2], asked, make.judge()).systems
    assert sorted(found.styles) == ["age/adult", "age/child", "emotion/sad", "emotion/surprised"]
    assert {part.value for part in found.styles.values()} == {2.0}
    assert [(name, part.num_scored) for name, part in found.voices.items()] == [("v1", 8)]


def test_files_tell_what_was_swapped(systems, asked, make):
    bench(systems[:1], asked, make.judge())
    folder = asked[1] / "bench"
    own = read_jsonl(folder / "listens" / "verdicts.jsonl", Verdict)
    swapped = read_jsonl(folder / "listens" / "swapped.jsonl", Verdict)
    assert [row.query_id for row in swapped] == [row.query_id for row in own]
    assert swapped[0].query_id == "emotion-0-surprised-v1"
    assert swapped[0].raw["heard_query_id"] == "emotion-0-sad-v1"
    assert (folder / "table.md").read_text() == tables.to_markdown(tables.read_results(folder))
    assert (folder / "table.csv").is_file()


def test_rerun_hears_only_what_is_new(systems, asked, make, monkeypatch, recorded):
    first = bench(systems[:2], asked, make.judge())
    heard = []
    hear_files = ear.hear_files

    def spy(paths, *args, **kwargs):
        heard.extend(paths)
        return hear_files(paths, *args, **kwargs)

    monkeypatch.setattr(ear, "hear_files", spy)
    assert bench(systems[:2], asked, make.judge()) == first
    assert heard == []


def test_labels_reach_the_judge_and_the_table(systems, asked, make):
    found = bench(systems[:1], asked, make.judge(), use_labels=True)
    assert found.style_sources == ("label",)


def test_without_known_answers_nobody_listens(systems, asked, make):
    flat = tables.figures(bench(systems[:1], asked, make.judge(), answers=()))
    assert flat["bench/listens/mean"] == 4.0 and math.isnan(flat["bench/listens/asr_hit"])
    assert not list((asked[1] / "bench").rglob("heard.jsonl"))


def test_mistakes_stop_before_any_answer(systems, asked, make):
    judge = make.judge()
    with pytest.raises(BenchError, match="the card is of 'another', not of 'rubric-1'"):
        bench(systems, asked, judge, card=Card("another", {}, {}))
    with pytest.raises(BenchError, match="no system 'gone'"):
        bench(systems, asked, judge, comparisons=[("gone", "deaf")])
    with pytest.raises(BenchError, match="unique"):
        bench([systems[0], systems[0]], asked, judge)
    with pytest.raises(BenchError, match=r"system name '\.\./up'"):
        bench([RecordedSystem("../up", systems[0].jsonl)], asked, judge)
    queries, root = asked
    with pytest.raises(BenchError, match="no partner"):
        bench(systems, (queries[:1], root), judge)
    assert judge.calls == [] and not (root / "bench" / "listens").exists()


class Silent:
    """Answers in the right style, but not every query."""

    name = "silent"

    def __init__(self, recorded, lacking):
        self._system, self._lacking = RecordedSystem("silent", recorded), lacking

    def respond(self, queries, root, out_dir):
        found = self._system.respond(queries, root, out_dir)
        missing = {"wav": "", "error": "timeout: no reply"}
        return [
            dataclasses.replace(row, **missing) if row.query_id in self._lacking else row
            for row in found
        ]


def test_an_answer_that_was_not_given_fails_and_is_counted(asked, recorded, make):
    lacking = "emotion-0-sad-v1"
    system = Silent(recorded("silent", lambda query: query.style), [lacking])
    flat = tables.figures(bench([system], asked, make.judge()))
    assert (flat["bench/silent/mean"], flat["bench/silent/failed"]) == (4.0, 1.0)
    rows = read_jsonl(asked[1] / "bench" / "silent" / "verdicts.jsonl", Verdict)
    (failed,) = [row for row in rows if row.query_id == lacking]
    assert failed.status == "respond: timeout: no reply"


def test_without_answers_to_listen_for_the_ear_rests(asked, recorded, make):
    system = RecordedSystem("deaf", recorded("deaf", lambda query: "fine"))
    queries, root = asked
    found = run.bench(
        [system], queries, root, root / "bench", judge=make.judge(), answers=(),
        num_resamples=20, console=rich.console.Console(file=io.StringIO()),
    )  # fmt: skip
    assert math.isnan(tables.figures(found)["bench/deaf/asr_hit"])


def test_real_speech_has_scores_and_no_swap_gain(asked, recorded, make):
    queries, root = asked
    real = [dataclasses.replace(query, topic="meld") for query in queries[:1]]
    system = RecordedSystem("listens", recorded("listens", lambda query: query.style))
    for some, gain in ((real, math.nan), ([*real, *queries[4:]], 2.0)):
        found = run.bench(
            [system], some, root, root / f"bench{len(some)}", judge=make.judge(), answers=(),
            num_resamples=20, console=rich.console.Console(file=io.StringIO()),
        )  # fmt: skip
        flat = tables.figures(found)
        assert flat["bench/listens/meld"] == 4.0
        assert flat["bench/listens/swap_gain"] == pytest.approx(gain, nan_ok=True)
