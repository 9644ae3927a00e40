"""Advantages against values worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from paras2s_jax.align import advantages

NAN = float("nan")


def test_group_of_four_by_hand():
    # Rewards 1, 2, 3, 6: mean 3, deviations -2 -1 0 3, squares 4 + 1 + 0 + 9 = 14.
    # ddof 1: variance 14 / 3, std 2.1602469; divisor 2.1603469.
    rewards = jnp.array([[1.0, 2.0, 3.0, 6.0]])
    got = advantages.group_advantages(rewards)
    np.testing.assert_allclose(got, [[-0.9257773, -0.4628886, 0.0, 1.3886659]], rtol=1e-5)
    centred = advantages.group_advantages(rewards, scale_by_std=False)
    np.testing.assert_allclose(centred, [[-2.0, -1.0, 0.0, 3.0]], atol=1e-6)


def test_unscorable_answer_is_left_out_of_the_moments():
    # Without the NaN: 1 and 3, mean 2, std sqrt(2 / 1) = 1.4142136.
    rewards = jnp.array([[1.0, NAN, 3.0]])
    got = advantages.group_advantages(rewards)
    value = 1.0 / (1.4142136 + 1e-4)
    np.testing.assert_allclose(got, [[-value, 0.0, value]], rtol=1e-5)
    moments = advantages.group_moments(rewards)
    assert int(moments["count"][0]) == 2
    np.testing.assert_allclose(moments["mean"], [2.0])
    np.testing.assert_allclose(moments["std"], [1.4142136], rtol=1e-6)


def test_groups_without_spread_are_exactly_zero():
    # 0.1 has no exact float: the mean of seven of them need not be 0.1.
    rewards = jnp.array([[0.1] * 7, [NAN] * 7, [4.0] + [NAN] * 6])
    assert (np.asarray(advantages.group_advantages(rewards)) == 0.0).all()
    assert not np.asarray(advantages.group_moments(rewards)["spread"]).any()


def test_groups_do_not_see_each_other():
    rewards = jnp.array([[1.0, 2.0, 4.0], [10.0, 50.0, 20.0]])
    both = advantages.group_advantages(rewards)
    alone = jnp.concatenate([advantages.group_advantages(row[None]) for row in rewards])
    np.testing.assert_array_equal(both, alone)


def test_no_gradient_flows_through_advantages():
    rewards = jnp.array([[1.0, NAN, 4.0]])
    grads = jax.grad(lambda r: advantages.group_advantages(r)[0, 2])(rewards)
    assert (np.asarray(grads) == 0.0).all()


def test_reward_metrics_by_hand():
    # Group one: std sqrt(2); group two has no spread; one answer of four is unscorable.
    rewards = jnp.array([[1.0, 3.0], [5.0, NAN]])
    metrics = advantages.reward_metrics(rewards)
    got = {name: float(total / weight) for name, (total, weight) in metrics.items()}
    assert got["reward/mean"] == 3.0  # (1 + 3 + 5) / 3
    np.testing.assert_allclose(got["reward/std"], np.sqrt(2.0) / 2, rtol=1e-6)
    assert got["reward/zero_spread"] == 0.5
    assert got["reward/unscorable"] == 1.0
