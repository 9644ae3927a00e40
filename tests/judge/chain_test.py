import math
import os
import struct

import numpy as np
import pytest

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.data.records import Query, Response, to_dict
from paras2s_jax.judge import chain
from paras2s_jax.judge.interfaces import Failure, Score, Transcript
from paras2s_jax.judge.ledger import Ledger

RATE = wave_lib.RATE_HZ


class FakeStage:
    """Hears a constant wave's level in hundredths; keeps count of the waves it was given."""

    max_dur_s = 2.0
    model_id = "fake-1"

    def __init__(self):
        self.settings = {"gate": 0.01}
        self.calls = []

    def levels(self, waves):
        self.calls.append(len(waves))
        return [round(float(np.abs(wave).max()) * 100) for wave in waves]


class FakeTranscriber(FakeStage):
    def transcribe(self, waves):
        return [
            Transcript(f"word{level}" if level else "", -0.5 * (level > 0))
            for level in self.levels(waves)
        ]


class FakeNamer(FakeStage):
    def __init__(self, *labels):
        super().__init__()
        self.labels = labels

    def name(self, waves):
        odd = [level % 2 for level in self.levels(waves)]
        return [self.labels[i] for i in odd], np.eye(2, dtype=np.float32)[odd]


class FakeScorer:
    name, version, settings_hash = "fake", "7", "cafe"

    def __init__(self):
        self.heard = []

    def score(self, heard, repeat=0):
        # Backwards, as replies from a server may come.
        for index, item in reversed(list(enumerate(heard))):
            self.heard.append(item)
            yield index, self.answer(item, repeat)

    def answer(self, item, repeat):
        if item.transcript_out == "word13":
            return Failure("reply has no number", raw="I think it is good")
        if item.transcript_out == "word17" and repeat == 1:
            return Failure("refused")
        base = 2.0 if item.transcript_out else 1.0
        return Score(base + repeat, 0.5, 0.25, "because")


class Bench:
    """A judge over fake stages, and the wavs that its pairs name."""

    def __init__(self, tmp_path, **kwargs):
        self.root = tmp_path
        self.asr, self.tone = FakeTranscriber(), FakeNamer("flat", "gentle")
        self.style = FakeNamer("surprised", "sad")
        self.scorer = FakeScorer()
        self.judge = chain.Judge(
            self.asr,
            {"emotion": self.style},
            self.tone,
            self.scorer,
            Ledger(tmp_path / "ledger.sqlite"),
            progress=False,
            **kwargs,
        )

    def wav(self, name, level, dur_s=0.1):
        path = self.root / name
        wave_lib.save(path, np.full(round(dur_s * RATE), level / 100, np.float32), RATE)
        return path

    def pair(self, query_wav, response_wav, sample=0, dimension="emotion"):
        style, contrast = ("neutral", "neutral") if dimension == "neutral" else ("sad", "surprised")
        query = Query(
            id="q0", sentence_id="s0", dimension=dimension, text="hello", style=style,
            contrast=contrast, topic="t", split="test", voice="v", wav="q.wav", dur_s=0.1,
        )  # fmt: skip
        response = Response(query_id="q0", system="sys", sample=sample, text="hi", wav="r.wav")
        return query, query_wav, response, response_wav


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def test_verdict_of_a_good_pair(bench):
    verdict = bench.judge.judge([bench.pair(bench.wav("q.wav", 21), bench.wav("r.wav", 30), 3)])[0]
    assert (verdict.query_id, verdict.system, verdict.sample) == ("q0", "sys", 3)
    assert (verdict.status, verdict.score) == ("ok", 2.0)
    assert (verdict.content, verdict.tone_fit) == (0.5, 0.25)
    assert (verdict.transcript_in, verdict.transcript_out) == ("word21", "word30")
    # 21 is odd: the second style; 30 is even: the first tone.
    assert (verdict.style_in, verdict.style_source, verdict.tone_out) == ("sad", "analyzer", "flat")
    assert verdict.raw["style"]["probs"] == {"surprised": 0.0, "sad": 1.0}
    assert verdict.raw["score"]["reason"] == "because"
    assert verdict.judge == bench.judge.name and verdict.judge.startswith("fake-7-")
    to_dict(verdict)  # Every field has the type that its record asks for.


def test_label_instead_of_analyzer(bench):
    pair = bench.pair(bench.wav("q.wav", 22), bench.wav("r.wav", 30))
    by_ear, by_label = (bench.judge.judge([pair], use_labels=flag)[0] for flag in (False, True))
    assert (by_ear.style_in, by_ear.style_source) == ("surprised", "analyzer")
    assert (by_label.style_in, by_label.style_source) == ("sad", "label")


def test_neutral_dimension_needs_no_analyzer_but_others_do(bench):
    paths = bench.wav("q.wav", 22), bench.wav("r.wav", 30)
    verdict = bench.judge.judge([bench.pair(*paths, dimension="neutral")])[0]
    assert (verdict.style_in, verdict.style_source) == ("neutral", "label")
    with pytest.raises(ValueError, match="dimension age"):
        bench.judge.judge([bench.pair(*paths, dimension="age")])


def test_silence_is_no_failure(bench):
    verdict = bench.judge.judge([bench.pair(bench.wav("q.wav", 21), bench.wav("r.wav", 0))])[0]
    assert (verdict.status, verdict.score, verdict.transcript_out) == ("ok", 1.0, "")


def test_each_stage_hears_each_wave_once(bench):
    query = bench.wav("q.wav", 21)
    answers = [bench.wav(f"r{i}.wav", 30 + i) for i in range(3)]
    pairs = [bench.pair(query, answer, i) for i, answer in enumerate(answers)]
    first = bench.judge.judge(pairs)
    # One batch per stage: 1 query + 3 answers; 1 query; 3 answers.
    assert (bench.asr.calls, bench.style.calls, bench.tone.calls) == ([4], [1], [3])
    assert bench.judge.judge(pairs) == first
    assert (bench.asr.calls, bench.style.calls, bench.tone.calls) == ([4], [1], [3])
    assert len(bench.scorer.heard) == 3
    # The same bytes under another name are the same sound.
    copy = bench.root / "copy.wav"
    copy.write_bytes(query.read_bytes())
    bench.judge.judge([bench.pair(copy, answers[0])])
    assert bench.asr.calls == [4]


def test_ledger_outlives_the_judge_and_follows_the_models(bench, tmp_path):
    pairs = [bench.pair(bench.wav("q.wav", 21), bench.wav("r.wav", 30))]
    first = bench.judge.judge(pairs)
    again = Bench(tmp_path)
    assert again.judge.judge(pairs) == first
    assert again.asr.calls == again.tone.calls == again.scorer.heard == []
    changed = Bench(tmp_path)
    changed.asr.settings = {"gate": 0.02}
    changed.tone.model_id = "fake-2"
    assert changed.judge.judge(pairs)[0].score == first[0].score
    assert (changed.asr.calls, changed.style.calls, changed.tone.calls) == ([2], [], [1])


def test_cut_off_run_keeps_its_finished_chunks(tmp_path):
    bench = Bench(tmp_path, waves_per_chunk=2)
    pairs = [
        bench.pair(bench.wav(f"q{i}.wav", 21 + i), bench.wav(f"r{i}.wav", 50 + i)) for i in range(3)
    ]
    transcribe = bench.asr.transcribe

    def stop_at_third_chunk(waves):
        if len(bench.asr.calls) == 2:
            raise KeyboardInterrupt
        return transcribe(waves)

    bench.asr.transcribe = stop_at_third_chunk
    with pytest.raises(KeyboardInterrupt):
        bench.judge.judge(pairs)
    again = Bench(tmp_path)
    assert [verdict.status for verdict in again.judge.judge(pairs)] == ["ok"] * 3
    assert again.asr.calls == [2]  # Six waves, of which four were stored.


def _not_finite(path):
    body = np.full(800, np.nan, "<f4").tobytes()
    header = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", 36 + len(body), b"WAVE", b"fmt ", 16, 3, 1,
                         RATE, RATE * 4, 4, 32)  # fmt: skip
    path.write_bytes(header + struct.pack("<4sI", b"data", len(body)) + body)


def test_bad_waves_fail_their_own_verdict_only(bench):
    query, good = bench.wav("q.wav", 21), bench.wav("good.wav", 30)
    text, empty, nan = (bench.root / f"{name}.wav" for name in ("text", "empty", "nan"))
    text.write_text("not audio")
    empty.write_bytes(b"")
    _not_finite(nan)
    bad = [
        (bench.root / "missing.wav", "missing.wav"),
        (text, "not readable as audio"),
        (empty, "empty"),
        (nan, "finite"),
        (bench.wav("long.wav", 30, dur_s=2.5), "too long: 2.5 s"),
    ]
    pairs = [bench.pair(query, path, i) for i, (path, _) in enumerate(bad)]
    verdicts = bench.judge.judge([*pairs, bench.pair(query, good, 9)])
    for verdict, (_, words) in zip(verdicts, bad):
        assert math.isnan(verdict.score)
        assert verdict.content is None and verdict.tone_fit is None
        assert verdict.status.startswith("transcribe answer: ") and words in verdict.status
        assert words in verdict.raw["transcribe answer"]["reason"]
        # What could be heard is kept.
        assert (verdict.transcript_in, verdict.style_in) == ("word21", "sad")
        assert (verdict.transcript_out, verdict.tone_out) == ("", "")
        to_dict(verdict)
    assert (verdicts[-1].status, verdicts[-1].score) == ("ok", 2.0)
    # No failed item reaches the scorer.
    assert len(bench.scorer.heard) == 1


def test_bad_query_fails_all_of_its_answers(bench):
    query = bench.root / "gone.wav"
    pairs = [bench.pair(query, bench.wav(f"r{i}.wav", 30 + i), i) for i in range(2)]
    for verdict in bench.judge.judge(pairs):
        assert math.isnan(verdict.score) and verdict.status.startswith("transcribe query: ")
        assert verdict.style_in == "" and verdict.transcript_out.startswith("word")


def test_repaired_file_is_judged_on_the_next_run(bench):
    pair = bench.pair(bench.wav("q.wav", 21), bench.root / "r.wav")
    assert math.isnan(bench.judge.judge([pair])[0].score)
    bench.wav("r.wav", 30)
    assert bench.judge.judge([pair])[0].score == 2.0


def test_unparsed_reply_is_nan_with_its_raw_text_and_is_asked_again(bench):
    pair = bench.pair(bench.wav("q.wav", 21), bench.wav("r.wav", 13))
    verdict = bench.judge.judge([pair])[0]
    assert math.isnan(verdict.score)
    assert verdict.status == "score: reply has no number"
    assert verdict.raw["score"]["raw"] == "I think it is good"
    assert verdict.transcript_out == "word13"
    bench.judge.judge([pair])
    assert len(bench.scorer.heard) == 2


def test_directory_in_place_of_a_wav_fails_too(bench):
    os.mkdir(bench.root / "dir.wav")
    pair = bench.pair(bench.wav("q.wav", 21), bench.root / "dir.wav")
    assert bench.judge.judge([pair])[0].status.startswith("transcribe answer: unreadable")


def test_no_pairs(bench):
    assert bench.judge.judge([]) == []


def test_repeats_give_their_mean_and_what_each_said(tmp_path):
    bench = Bench(tmp_path, num_repeats=3)
    pairs = [
        bench.pair(bench.wav("q.wav", 21), bench.wav(f"r{level}.wav", level))
        for level in (30, 17, 13)
    ]
    good, partly, failed = bench.judge.judge(pairs)
    # The fake scorer adds the number of the repeat: 2, 3, 4.
    assert (good.score, good.raw["score"]["repeats"]) == (3.0, (2.0, 3.0, 4.0))
    assert (partly.score, partly.raw["score"]["repeats"]) == (3.0, (2.0, None, 4.0))
    assert math.isnan(failed.score) and failed.status == "score: reply has no number"
    to_dict(partly)
    # Stored answers are not asked for again: only the failed ones are.
    bench.scorer.heard.clear()
    assert bench.judge.judge(pairs)[0] == good
    assert len(bench.scorer.heard) == 1 + 3
    assert bench.judge.name != Bench(tmp_path).judge.name


def test_answers_are_stored_as_they_come(tmp_path):
    bench = Bench(tmp_path)
    pairs = [
        bench.pair(bench.wav("q.wav", 21), bench.wav(f"r{level}.wav", level))
        for level in (30, 32, 34)
    ]
    answer = bench.scorer.answer

    def dies(item, repeat):
        if len(bench.scorer.heard) == 3:
            raise KeyboardInterrupt
        return answer(item, repeat)

    bench.scorer.answer = dies
    with pytest.raises(KeyboardInterrupt):
        bench.judge.judge(pairs)
    bench.scorer.answer, bench.scorer.heard = answer, []
    assert [verdict.score for verdict in bench.judge.judge(pairs)] == [2.0] * 3
    assert len(bench.scorer.heard) == 1  # Two of the three were paid for and kept.
