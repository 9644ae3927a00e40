"""Sampling, judging and training of the reward model."""

import dataclasses
import math
import os
import signal

import jax
import numpy as np
import optax
import pytest

from paras2s_jax.align import distill
from paras2s_jax.audio import wave
from paras2s_jax.data.batches import Batches
from paras2s_jax.data.records import Verdict, read_jsonl
from paras2s_jax.train import preemption

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
    return distill.sample(
        tiny.policy,
        tiny.variables,
        tiny.frontend,
        tiny.tokenizer,
        queries or everything,
        folder,
        out_dir,
        **(settings | kwargs),
    )


def _verdict(query, response, score):
    return Verdict(
        query_id=query.id,
        system=response.system,
        sample=response.sample,
        score=score,
        status="ok" if math.isfinite(score) else "tone: deaf",
        transcript_in="",
        style_in=query.style,
        style_source="label",
        transcript_out="",
        tone_out="",
        content=None,
        tone_fit=None,
        judge="by hand",
        raw={},
    )


def _judge(pairs):
    """Scores by length, and never by words; the very first answer cannot be scored."""
    return [
        _verdict(query, response, math.nan if at == 0 else min(5.0, 1 + 4 * response.dur_s))
        for at, (query, query_wav, response, response_wav) in enumerate(pairs)
        if query_wav.is_file() and response_wav.is_file()
    ]


@pytest.fixture(scope="module")
def samples(tiny, spoken, tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    return _sample(tiny, spoken, folder), folder


def test_every_query_gets_its_samples(spoken, samples):
    responses, folder = samples
    keys = sorted((row.query_id, row.sample) for row in responses)
    assert keys == [(query.id, g) for query in spoken[0] for g in range(GROUP)]
    assert read_jsonl(folder / "responses.jsonl", type(responses[0])) == responses
    for row in responses:
        length = len(wave.load(folder / row.wav)) / wave.RATE_HZ
        assert length == pytest.approx(row.dur_s if row.dur_s else distill.NO_ANSWER_S, abs=1e-4)
    assert len({row.text for row in responses}) > 6


def test_stopped_sampling_continues_to_the_same_answers(
    tiny, spoken, samples, tmp_path, monkeypatch
):
    written = []

    def dying(path, rows):
        if written:
            os.kill(os.getpid(), signal.SIGTERM)
        written.append(path)
        return write(path, rows)

    write = distill.write_jsonl
    monkeypatch.setattr(distill, "write_jsonl", dying)
    # As the command line watches every stage: what is lost is the batch in flight.
    with pytest.raises(preemption.Preempted), preemption.watch():
        _sample(tiny, spoken, tmp_path)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.undo()
    first = tmp_path / "parts" / "000000.jsonl"
    assert first.is_file() and not (tmp_path / "responses.jsonl").exists()
    before = first.stat().st_mtime_ns
    wav = tmp_path / read_jsonl(first, type(samples[0][0]))[0].wav
    wav_before = wav.stat().st_mtime_ns
    assert _sample(tiny, spoken, tmp_path) == samples[0]
    assert wav.stat().st_mtime_ns == wav_before and before
    for row in samples[0]:
        assert (tmp_path / row.wav).read_bytes() == (samples[1] / row.wav).read_bytes()


def test_samples_of_another_policy_are_thrown_away(tiny, spoken, tmp_path):
    queries = spoken[0][:2]
    _sample(tiny, spoken, tmp_path, queries)
    stale = tmp_path / "wavs" / "stale.wav"
    stale.write_bytes(b"")
    _sample(tiny, spoken, tmp_path, queries)
    assert stale.exists()  # The same policy: nothing was made again.
    _sample(tiny, spoken, tmp_path, queries, version="second")
    assert not stale.exists()


def test_rows_leave_out_what_has_no_score_or_no_sound(spoken, samples):
    queries, _, folder = spoken
    responses, responses_dir = samples
    verdicts = distill.judge_samples(_judge, queries, folder, responses, responses_dir)
    assert len(read_jsonl(responses_dir / "verdicts.jsonl", Verdict)) == len(responses)
    silent = [dataclasses.replace(responses[1], dur_s=0.0)]
    given = [responses[0], *silent, *responses[2:]]
    rows, root, left_out = distill.scored_rows(queries, folder, given, responses_dir, verdicts)
    lost = 2 + sum(row.dur_s == 0 for row in responses[2:])
    assert left_out == lost and len(rows) == len(responses) - lost
    assert (root / rows[0]["answer"]).is_file() and 1 <= rows[0]["score"] <= 5


def test_a_judge_that_loses_answers_is_refused(spoken, samples):
    with pytest.raises(ValueError, match="verdicts"):
        distill.judge_samples(lambda pairs: [], spoken[0], spoken[2], *samples)


def test_held_out_sentences_are_held_out_whole():
    rows = [{"sentence_id": f"s{i // 3}", "sample": i} for i in range(300)]
    train, held_out = distill.hold_out(rows, 0.2)
    assert len(train) + len(held_out) == 300 and 30 <= len(held_out) <= 90
    names = [{row["sentence_id"] for row in part} for part in (train, held_out)]
    assert not names[0] & names[1]
    # The choice does not depend on the other rows.
    assert distill.hold_out(rows[:150], 0.2)[1] == [row for row in held_out if row["sample"] < 150]


def test_agreement_by_hand():
    # Predicted 1 2 | 3 4 against judged 1 3 | 2 4: deviations -1.5 -0.5 0.5 1.5 and
    # -1.5 0.5 -0.5 1.5, products 2.25 - 0.25 - 0.25 + 2.25 = 4, over 5: 0.8.
    # Within queries: -0.5 0.5 | -0.5 0.5 against -1 1 | -1 1: exactly proportional.
    got = distill.agreement(
        np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 4.0]), ["a", "a", "b", "b"]
    )
    assert got["pearson"] == pytest.approx(0.8)
    assert got["pearson_within"] == pytest.approx(1.0)
    assert got["abs_error"] == pytest.approx(0.5)
    flat = distill.agreement(np.ones(2), np.array([1.0, 2.0]), ["a", "a"])
    assert math.isnan(flat["pearson"])


def test_reward_model_learns_scores(reward_model, spoken):
    queries, responses, folder = spoken
    # Long answers are good, short ones bad: clips of 2, 3 and 4 codes.
    verdicts = [
        _verdict(query, response, 1.0 + 2.0 * (int(response.wav[0]) % 3))
        for query, response in zip(queries, responses, strict=True)
    ]
    rows, root, _ = distill.scored_rows(queries, folder, responses, folder, verdicts)

    def batches(**kwargs):
        return Batches(
            rows,
            root=root,
            audio_keys=distill.AUDIO_KEYS,
            scalar_keys=distill.SCALAR_KEYS,
            len_buckets_s=(0.4,),
            **kwargs,
        )

    start = reward_model.init(jax.random.key(1))
    variables = distill.train(
        reward_model,
        start,
        batches(batch_size=6, repeat=True),
        optimizer=optax.adam(1e-2),
        num_steps=60,
        rng=jax.random.key(0),
        trainable="projector|language_model",
    )
    tower = variables["params"]["audio_tower"]
    jax.tree.map(np.testing.assert_array_equal, tower, start["params"]["audio_tower"])
    predicted = distill.predict(reward_model, variables, batches(batch_size=4), len(rows))
    judged = np.array([row["score"] for row in rows])
    got = distill.agreement(predicted, judged, [row["query_id"] for row in rows])
    assert got["pearson"] > 0.9 and got["abs_error"] < 0.5
