import jax
import numpy as np
import pytest
from jax import numpy as jnp

from paras2s_jax.train import optimizer


def test_schedule_by_hand():
    rate = optimizer.make_schedule(1.0, warmup_steps=4, total_steps=8)
    # Warm-up k/4; then (1 + cos(pi * t / 4)) / 2 for t = 0..4.
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 0.853553, 0.5, 0.146447, 0.0]
    np.testing.assert_allclose([rate(step) for step in range(9)], expected, atol=1e-6)


@pytest.mark.parametrize("warmup_steps, expected", [(0, [2, 2, 2]), (1, [2, 2, 2]), (2, [1, 2, 2])])
def test_constant_schedule(warmup_steps, expected):
    rate = optimizer.make_schedule(
        2.0, warmup_steps=warmup_steps, total_steps=100, schedule="constant"
    )
    np.testing.assert_allclose([rate(step) for step in range(3)], expected)


def test_impossible_schedules_are_errors():
    with pytest.raises(ValueError, match=r"'linear'.*cosine"):
        optimizer.make_schedule(1.0, warmup_steps=0, total_steps=1, schedule="linear")
    with pytest.raises(ValueError, match="warmup_steps 5"):
        optimizer.make_schedule(1.0, warmup_steps=5, total_steps=4)


def step(opt, params, grads):
    updates, _ = opt.update(grads, opt.init(params), params)
    return updates["params"]["dense"]


def test_only_kernels_decay():
    names = ("kernel", "bias", "scale", "embedding")
    params = {"params": {"dense": {name: jnp.full((2,), 3.0) for name in names}}}
    opt = optimizer.make_optimizer(0.1, total_steps=10, weight_decay=0.5, schedule="constant")
    updates = step(opt, params, jax.tree.map(jnp.zeros_like, params))
    # Without gradient only the decay is left: -lr * 0.5 * 3.
    for name, expected in zip(names, (-0.15, 0.0, 0.0, -0.15), strict=True):
        np.testing.assert_allclose(updates[name], expected, atol=1e-7)


def test_clipping_is_by_global_norm():
    params = {"params": {"dense": {"kernel": jnp.zeros(1), "bias": jnp.zeros(1)}}}
    grads = {"params": {"dense": {"kernel": jnp.array([3.0]), "bias": jnp.array([4.0])}}}
    for clip_norm, scale in ((1.0, 0.2), (None, 1.0)):
        opt = optimizer.make_optimizer(0.1, total_steps=10, clip_norm=clip_norm)
        _, opt_state = opt.update(grads, opt.init(params), params)
        first_moments = [x for x in jax.tree.leaves(opt_state) if x.shape == (1,)][:2]
        # Adam's first moment after one step is (1 - b1) * gradient = 0.1 * gradient.
        np.testing.assert_allclose(
            sorted(float(m[0]) for m in first_moments), [0.3 * scale, 0.4 * scale], rtol=1e-5
        )
