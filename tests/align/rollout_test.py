"""Metrics of answers, and chunked evaluation."""

import jax.numpy as jnp
import numpy as np
import pytest

from paras2s_jax.align import rollout
from paras2s_jax.align.policy import Answers


def test_answer_metrics_by_hand():
    # Two answers: a constant 0.1 for all 4 samples (power 0.01 = -20 dB), and no sound at all
    # (power 0 counts as 1e-10 = -100 dB): mean level -60, half silent, half finished.
    # Neither is clipped, as long as no sample is at full scale.
    waves = jnp.array([[[0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0]]])
    answers = Answers(
        codes=jnp.zeros((1, 2, 1), jnp.int32),
        len_codes=jnp.array([[1, 0]]),
        waves=waves,
        lens=jnp.array([[4, 0]]),
    )
    masks = {
        "text": jnp.array([[[True, True, False], [True, False, False]]]),
        "audio": jnp.array([[[False, True, True], [False, False, False]]]),
    }
    sums = rollout.answer_metrics(masks, jnp.array([[True, False]]), answers)
    got = {name: float(total / weight) for name, (total, weight) in sums.items()}
    assert got["len/text"] == 1.5
    assert got["len/audio"] == 1.0
    assert got["answer/finished"] == 0.5
    assert got["answer/silent"] == 0.5
    assert got["answer/level_db"] == pytest.approx(-60.0, abs=1e-3)
    assert got["answer/clipped"] == 0.0


@pytest.mark.parametrize(("at_full_scale", "clipped"), [(2, 0.0), (3, 1.0)])
def test_clipping_is_more_than_a_peak_now_and_then(at_full_scale, clipped):
    # 2 of 2000 samples are one in a thousand; 3 are more. What lies past the answer is silent.
    waves = np.full((1, 1, 3000), 0.5, np.float32)
    waves[..., 2000:] = 0.0
    waves[..., :at_full_scale] = (1.0, -1.0, 1.2)[:at_full_scale]
    answers = Answers(
        codes=jnp.zeros((1, 1, 1), jnp.int32),
        len_codes=jnp.array([[1]]),
        waves=jnp.array(waves),
        lens=jnp.array([[2000]]),
    )
    total, weight = rollout.answer_metrics({}, jnp.array([[True]]), answers)["answer/clipped"]
    assert (float(total), float(weight)) == (clipped, 1.0)


def test_word_error_rate_by_hand():
    # Six words written; "calm" misheard and "now" lost: 2 / 6. The wordless answer is left out.
    written = ["Stay calm!", "I am here now", "..."]
    heard = ["stay palm", "i am here", "noise"]
    assert rollout.word_error_rate(written, heard) == pytest.approx(2 / 6)
    assert np.isnan(rollout.word_error_rate(["", "?"], ["a", "b"]))


def test_chunks_are_put_back_in_order():
    x = jnp.arange(12.0).reshape(6, 2)
    for num_chunks in (1, 2, 3):
        got = rollout._in_chunks(lambda t: t["x"] * 2, {"x": x}, num_chunks)
        np.testing.assert_array_equal(got, x * 2)
