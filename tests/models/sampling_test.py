"""The draw of one id against the reference's sampler, and against shares known by hand."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paras2s_jax.models import sampling
from paras2s_jax.models.sampling import Sampling

GOLDENS = Path(__file__).parents[1] / "goldens" / "kimi_lm"


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("k5_t08", Sampling(0.8, 5)),
        ("k0_t12", Sampling(1.2, 0)),
        ("k5_t08_rp13_w4", Sampling(0.8, 5, 1.3, 4)),
        ("k5_t08_rp13_w9", Sampling(0.8, 5, 1.3, 9)),  # 9 tokens are not more than 9
    ],
)
def test_sampler_weights_equal_the_reference(case, settings):
    io = np.load(GOLDENS / "io.npz")
    logits = jnp.asarray(io["sampler/logits"][:, -1])
    recent = io["sampler/recent_tokens"]
    history = jnp.zeros((20, 1), jnp.int32).at[: len(recent), 0].set(recent)
    scores, ids = sampling.candidates(logits, history, jnp.int32(len(recent)), settings)
    want = io[f"sampler/{case}/weights"]  # not normalised
    np.testing.assert_allclose(jax.nn.softmax(scores), want / want.sum(), atol=1e-6)
    assert (ids is None) == (settings.top_k == 0)


def test_draws_follow_temperature_and_top_k():
    # Three ids with weights 2 : 1 : 1 at temperature 1; at 0.5 squared, 4 : 1 : 1; top-2 4 : 1.
    rows = 20_000
    logits = jnp.tile(jnp.log(jnp.array([2.0, 1.0, 0.999])), (rows, 1))
    history = jnp.zeros((1, rows), jnp.int32)
    for top_k, want in ((0, [4 / 6, 1 / 6, 1 / 6]), (2, [4 / 5, 1 / 5, 0])):
        settings = Sampling(0.5, top_k)
        drawn = sampling.draw(jax.random.key(0), logits, history, jnp.int32(0), settings)
        shares = np.bincount(drawn, minlength=3) / rows
        np.testing.assert_allclose(shares, want, atol=0.012)  # about 4 standard errors


def test_chosen_logp_by_hand():
    # Weights 1 : 3 at temperature 1, so 1 : 9 at 1/2: the second id has 3/4 and 9/10.
    logits = jnp.log(jnp.array([[1.0, 3.0]]))
    for temperature, want in ((1.0, 0.75), (0.5, 0.9)):
        got = sampling.chosen_logp(logits, jnp.array([1]), temperature)
        np.testing.assert_allclose(jnp.exp(got), [want], rtol=1e-6)
