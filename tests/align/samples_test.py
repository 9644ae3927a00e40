"""Sampling and judging of what the reward model learns from."""

import math
import os
import signal

import pytest

from paras2s_jax.align import samples
from paras2s_jax.audio import wave
from paras2s_jax.data import answers
from paras2s_jax.data.records import Verdict, read_jsonl
from paras2s_jax.train import preemption
from tests.align.conftest import make_verdict

GROUP = 2


def _sample(tiny, spoken, out_dir, queries=None, **kwargs):
    everything, _, folder = spoken
    settings = {
        "num_samples": GROUP,
        "batch_size": 2,
        "len_buckets_s": (0.4,),
        "seed": 5,
        "version": "first",
    }
    return samples.sample(
        tiny.policy,
        tiny.variables,
        tiny.frontend,
        tiny.tokenizer,
        queries or everything,
        folder,
        out_dir,
        **(settings | kwargs),
    )


def _judge(pairs):
    """Scores by length, and never by words; the very first answer cannot be scored."""
    return [
        make_verdict(query, response, math.nan if at == 0 else min(5.0, 1 + 4 * response.dur_s))
        for at, (query, query_wav, response, response_wav) in enumerate(pairs)
        if query_wav.is_file() and response_wav.is_file()
    ]


@pytest.fixture(scope="module")
def sampled(tiny, spoken, tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    return _sample(tiny, spoken, folder), folder


def test_every_query_gets_its_samples(spoken, sampled):
    responses, folder = sampled
    keys = sorted((row.query_id, row.sample) for row in responses)
    assert keys == [(query.id, g) for query in spoken[0] for g in range(GROUP)]
    assert read_jsonl(folder / "responses.jsonl", type(responses[0])) == responses
    for row in responses:
        length = len(wave.load(folder / row.wav)) / wave.RATE_HZ
        assert length == pytest.approx(row.dur_s if row.dur_s else answers.NO_ANSWER_S, abs=1e-4)
    assert len({row.text for row in responses}) > 6


def test_stopped_sampling_continues_to_the_same_answers(
    tiny, spoken, sampled, tmp_path, monkeypatch
):
    written = []

    def dying(path, rows):
        if written:
            os.kill(os.getpid(), signal.SIGTERM)
        written.append(path)
        return write(path, rows)

    write = samples.write_jsonl
    monkeypatch.setattr(samples, "write_jsonl", dying)
    # As the command line watches every stage: what is lost is the batch in flight.
    with pytest.raises(preemption.Preempted), preemption.watch():
        _sample(tiny, spoken, tmp_path)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.undo()
    first = tmp_path / "parts" / "000000.jsonl"
    assert first.is_file() and not (tmp_path / "responses.jsonl").exists()
    before = first.stat().st_mtime_ns
    wav = tmp_path / read_jsonl(first, type(sampled[0][0]))[0].wav
    wav_before = wav.stat().st_mtime_ns
    assert _sample(tiny, spoken, tmp_path) == sampled[0]
    assert wav.stat().st_mtime_ns == wav_before and before
    for row in sampled[0]:
        assert (tmp_path / row.wav).read_bytes() == (sampled[1] / row.wav).read_bytes()


def test_samples_of_another_policy_are_thrown_away(tiny, spoken, tmp_path):
    queries = spoken[0][:2]
    _sample(tiny, spoken, tmp_path, queries)
    stale = tmp_path / "wavs" / "stale.wav"
    stale.write_bytes(b"")
    _sample(tiny, spoken, tmp_path, queries)
    assert stale.exists()  # The same policy: nothing was made again.
    _sample(tiny, spoken, tmp_path, queries, version="second")
    assert not stale.exists()


def test_verdicts_are_kept_beside_the_answers(spoken, sampled):
    queries, _, folder = spoken
    verdicts = samples.judge_samples(_judge, queries, folder, *sampled)
    kept = read_jsonl(sampled[1] / "verdicts.jsonl", Verdict)
    assert len(kept) == len(verdicts) == len(sampled[0])
    assert math.isnan(kept[0].score) and kept[1:] == verdicts[1:]


def test_a_judge_that_loses_answers_is_refused(spoken, sampled):
    with pytest.raises(ValueError, match="verdicts"):
        samples.judge_samples(lambda pairs: [], spoken[0], spoken[2], *sampled)
