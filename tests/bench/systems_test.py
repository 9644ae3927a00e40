import dataclasses

import jax
import numpy as np
import pytest
import soundfile

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.bench.aggregate import BenchError
from paras2s_jax.bench.systems import FolderSystem, PolicySystem, RecordedSystem
from paras2s_jax.data.records import Response, read_jsonl


class Echo:
    """Answers with the query's wave times a random gain; can stop at a given call."""

    def __init__(self, stop_at=None):
        self.shapes, self.stop_at = [], stop_at

    def __call__(self, waves, lens, rng):
        if len(self.shapes) == self.stop_at:
            raise KeyboardInterrupt
        self.shapes.append(waves.shape)
        gain = np.asarray(jax.random.uniform(rng, (len(waves), 1), minval=0.1, maxval=1.0))
        texts = [f"say {value:.4f}" for value in gain[:, 0]]
        return waves * gain, lens, texts, np.ones(len(waves), bool)


def policy(respond, **fields):
    return PolicySystem("p", respond, "v1", batch_size=3, len_buckets_s=(0.25, 0.5), **fields)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.wav"))}


def test_policy_answers_every_query_in_fixed_shapes(asked, tmp_path):
    queries, root = asked
    echo = Echo()
    found = policy(echo, num_samples=2).respond(queries, root, tmp_path / "p")
    assert [(row.query_id, row.sample) for row in found] == [
        (query.id, sample) for query in queries for sample in (0, 1)
    ]
    # 8 queries of 0.3 s, 2 samples each, in batches of 3: 6 of them, all in the bucket of 0.5 s.
    assert echo.shapes == [(3, 8000)] * 6
    assert len({row.text for row in found}) == 16
    assert sorted(read_jsonl(tmp_path / "p" / "responses.jsonl", Response), key=str) == sorted(
        found, key=str
    )
    for row in found:
        assert row.dur_s == 0.3
        assert len(wave_lib.load(tmp_path / "p" / row.wav)) == 4800


def test_answers_are_written_at_their_own_rate(asked, tmp_path):
    queries, root = asked
    found = policy(Echo(), rate_hz=24_000).respond(queries, root, tmp_path / "p")
    for row in found:
        # The 4800 samples of 0.3 s at 16 kHz come back, called 24 kHz.
        assert row.dur_s == 0.2
        assert soundfile.info(tmp_path / "p" / row.wav).samplerate == 24_000


def test_stopped_policy_continues_to_the_same_answers(asked, tmp_path):
    queries, root = asked
    whole = policy(Echo()).respond(queries, root, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        policy(Echo(stop_at=1)).respond(queries, root, tmp_path / "cut")
    # Also lose one wav of the finished batch, and half of the last line.
    rows = tmp_path / "cut" / "responses.jsonl"
    rows.write_bytes(rows.read_bytes()[:-9])
    (tmp_path / "cut" / whole[0].wav).unlink()
    echo = Echo()
    assert policy(echo).respond(queries, root, tmp_path / "cut") == whole
    assert len(echo.shapes) == 3
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert sorted(read_jsonl(rows, Response), key=str) == sorted(whole, key=str)
    again = Echo()
    assert policy(again).respond(queries, root, tmp_path / "cut") == whole
    assert again.shapes == []


def test_another_policy_does_not_inherit_answers(asked, tmp_path):
    queries, root = asked
    policy(Echo()).respond(queries, root, tmp_path / "p")
    echo = Echo()
    other = dataclasses.replace(policy(echo), version="v2", seed=1)
    found = other.respond(queries, root, tmp_path / "p")
    assert len(echo.shapes) == 3
    assert read_jsonl(tmp_path / "p" / "responses.jsonl", Response) == found


def test_silent_answer_becomes_audible_silence(asked, tmp_path):
    queries, root = asked

    def mute(waves, lens, rng):
        return waves, lens * 0, [""] * len(waves), np.zeros(len(waves), bool)

    row = policy(mute).respond(queries[:1], root, tmp_path / "p")[0]
    assert (row.dur_s, row.finished) == (0.0, False)
    np.testing.assert_array_equal(wave_lib.load(tmp_path / "p" / row.wav), np.zeros(1600))


def test_too_long_query_is_refused(asked, make, tmp_path):
    _, root = asked
    with pytest.raises(BenchError, match=r"lasts 9\.00 s, longer than the last bucket"):
        policy(Echo()).respond([make.query("e9", "sad", dur_s=9.0)], root, tmp_path / "p")


def test_recorded_answers_are_imported_under_the_new_name(asked, recorded, tmp_path):
    queries, root = asked
    system = RecordedSystem("topline", recorded("top", lambda query: query.style))
    found = system.respond(queries, root, tmp_path / "out")
    assert [(row.query_id, row.system, row.text) for row in found] == [
        (query.id, "topline", query.style) for query in queries
    ]
    assert (tmp_path / "out" / found[0].wav).is_file()
    with pytest.raises(BenchError, match="no answer for 1 of 1 queries, first 'other'"):
        system.respond([dataclasses.replace(queries[0], id="other")], root, tmp_path / "out")


def test_folder_answers_of_any_format_become_16_khz_mono(asked, tmp_path):
    queries, root = asked
    folder = tmp_path / "answers"
    folder.mkdir()
    stereo = np.zeros((12000, 2), np.float32)
    soundfile.write(folder / f"{queries[0].id}.flac", stereo, 24_000)
    found = FolderSystem("mine", folder).respond(queries[:1], root, tmp_path / "out")
    assert found[0].dur_s == 0.5 and found[0].text == ""
    with pytest.raises(BenchError, match="no answer for 7 of 8 queries"):
        FolderSystem("mine", folder).respond(queries, root, tmp_path / "out")
    (folder / f"{queries[1].id}.wav").write_bytes(b"not audio")
    with pytest.raises(wave_lib.AudioError, match=queries[1].id):
        FolderSystem("mine", folder).respond(queries[:2], root, tmp_path / "out")


def test_query_ids_cannot_leave_the_folder(asked, tmp_path):
    queries, root = asked
    nasty = dataclasses.replace(queries[0], id="../../escape")
    with pytest.raises(wave_lib.AudioError, match="outside"):
        FolderSystem("mine", tmp_path / "answers").respond([nasty], root, tmp_path / "out")
    row = policy(Echo()).respond([nasty], root, tmp_path / "deep" / "er")[0]
    assert (
        tmp_path / "deep" / "er" / row.wav
    ).resolve().parent == tmp_path / "deep" / "er" / "wavs"
