"""Training of the reward model."""

import dataclasses
import math

import jax
import numpy as np
import optax
import pytest

from paras2s_jax.align import distill
from paras2s_jax.data.batches import Batches
from tests.align.conftest import make_verdict


def test_rows_leave_out_what_has_no_score_or_no_sound(spoken):
    queries, responses, folder = spoken
    verdicts = [
        make_verdict(query, response, math.nan if at == 0 else 3.0)
        for at, (query, response) in enumerate(zip(queries, responses, strict=True))
    ]
    given = [responses[0], dataclasses.replace(responses[1], dur_s=0.0), *responses[2:]]
    rows, root, left_out = distill.scored_rows(queries, folder, given, folder, verdicts)
    assert left_out == 2 and len(rows) == len(responses) - 2
    assert (root / rows[0]["answer"]).is_file() and rows[0]["score"] == 3.0


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
        make_verdict(query, response, 1.0 + 2.0 * (int(response.wav[0]) % 3))
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
