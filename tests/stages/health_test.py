"""What the judge says during GRPO, with a judge and models that only answer."""

import types

import numpy as np
import pytest

from paras2s_jax.align.health import Health
from paras2s_jax.data.records import Query, Response
from paras2s_jax.stages import health
from paras2s_jax.train.sharding import ONE_DEVICE_LAYOUTS


def query(number):
    labels = {"dimension": "emotion", "text": "", "style": "sad", "contrast": "", "topic": ""}
    return Query(
        id=f"q{number}",
        sentence_id=f"s{number}",
        split="train",
        voice="",
        wav="",
        dur_s=1.0,
        **labels,
    )


@pytest.fixture
def held_out(load_config, monkeypatch, tmp_path):
    """(the measurement of a config, what it asked for)."""
    config, asked = load_config("tiny"), []
    everything = [query(number) for number in range(200)]

    def sample(policy, variables, frontend, tokenizer, queries, *args, version, **kwargs):
        asked.append((version, [query.id for query in queries]))
        return [Response(query.id, "held_out", 0, "", "") for query in queries]

    def judge_samples(judge, queries, root, responses, folder):
        # The judge fails on the last answer, which then counts on neither side.
        scores = [2.0] * (len(responses) - 1) + [np.nan]
        return [types.SimpleNamespace(score=score) for score in scores]

    def predict(model, variables, batches, num_rows, layout):
        return np.full(num_rows, variables["score"], np.float32)

    monkeypatch.setattr(health, "queries_of", lambda root, split: everything)
    monkeypatch.setattr(
        health, "make_judge", lambda *args, **kwargs: types.SimpleNamespace(judge=0)
    )
    monkeypatch.setattr(health, "sample", sample)
    monkeypatch.setattr(health, "judge_samples", judge_samples)
    monkeypatch.setattr(health.distill, "predict", predict)
    monkeypatch.setattr(health, "Batches", lambda rows, **kwargs: rows)
    made = types.SimpleNamespace(
        policy=None, frontend=None, tokenizer=None, layouts=ONE_DEVICE_LAYOUTS
    )

    def make(**changes):
        config.grpo.health.update(changes)
        return health.make_held_out(config, tmp_path, tmp_path, made, None, {"score": 3.5})

    return make, asked


def test_the_gap_is_reward_minus_verdict_on_what_distillation_held_out(held_out):
    make, asked = held_out
    measure = make(gap_every=7, gap_queries=4)
    assert measure.every == 7
    assert measure.gap(0, {}) == pytest.approx(1.5)
    measure.gap(7, {})
    # Answers of another step are not taken for this one's; the queries stay the same.
    assert [version for version, _ in asked] == ["step 0", "step 7"]
    assert asked[0][1] == asked[1][1] and len(set(asked[0][1])) == 4
    kept, unseen = health.distill.hold_out([{"sentence_id": f"s{n}"} for n in range(200)], 0.15)
    assert kept and {name.replace("q", "s") for name in asked[0][1]} <= {
        row["sentence_id"] for row in unseen
    }


def test_without_a_judge_nothing_is_measured(held_out):
    make, _ = held_out
    assert make(gap_every=0) is None


@pytest.mark.parametrize("name", ["tiny", "kimi_audio_7b"])
def test_alarms_are_on_and_end_nothing(load_config, tmp_path, name):
    config = load_config(name)
    monitor = health.make_health(config, tmp_path)
    assert isinstance(monitor, Health)
    monitor.start(0, None)
    assert monitor.check(1, {"answer/silent": 1.0, "kl/audio": 9.0, "judge/gap": 3.0}) == {
        "alarms": 3.0
    }
