"""Losses against values worked out by hand, and exactness of accumulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paras2s_jax.align import losses


def _stream_case(seed=0, prompts=4, group=3, steps=5):
    """Random log-probabilities, ragged masks and advantages for both streams."""
    rng = np.random.default_rng(seed)
    shape = (prompts, group, steps)
    logp, old, ref, masks, entropy = {}, {}, {}, {}, {}
    for stream in losses.STREAMS:
        logp[stream] = jnp.asarray(-rng.uniform(0.1, 2.0, shape), jnp.float32)
        old[stream] = logp[stream] + jnp.asarray(rng.normal(0, 0.3, shape), jnp.float32)
        ref[stream] = logp[stream] + jnp.asarray(rng.normal(0, 0.3, shape), jnp.float32)
        entropy[stream] = jnp.asarray(rng.uniform(0.1, 2.0, shape), jnp.float32)
        length = rng.integers(0 if stream == "audio" else 1, steps + 1, shape[:2])
        masks[stream] = jnp.asarray(np.arange(steps) < length[..., None])
    advantages = jnp.asarray(rng.normal(size=shape[:2]), jnp.float32)
    return logp, old, ref, advantages, masks, entropy


def test_kl_estimators_by_hand():
    # pi gives the token 1/2, the reference 1/4: log(ref / pi) = -ln 2 = -0.6931472.
    logp, ref = jnp.log(jnp.array(0.5)), jnp.log(jnp.array(0.25))
    np.testing.assert_allclose(losses.kl_to_reference(logp, ref, "k1"), 0.6931472, rtol=1e-6)
    np.testing.assert_allclose(losses.kl_to_reference(logp, ref, "k2"), 0.2402265, rtol=1e-6)
    # 1/2 - 1 + 0.6931472
    np.testing.assert_allclose(losses.kl_to_reference(logp, ref, "k3"), 0.1931472, rtol=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimators_are_unbiased(estimator):
    # Exact expectation over three tokens equals sum_i p_i log(p_i / q_i).
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    estimates = losses.kl_to_reference(jnp.log(p), jnp.log(q), estimator)
    np.testing.assert_allclose((p * estimates).sum(), (p * np.log(p / q)).sum(), rtol=1e-5)


def test_clipped_surrogate_by_hand():
    # (ratio, A) -> value with low 0.2, high 0.3, and whether the bound is active:
    #  1.5, +2 -> 1.3 * 2 = 2.6 active     1.5, -2 -> 1.5 * -2 = -3 not active
    #  0.5, +2 -> 0.5 * 2 = 1.0 not active 0.5, -2 -> 0.8 * -2 = -1.6 active
    #  1.25, +1 -> 1.25: inside the larger upper bound
    ratio = jnp.array([1.5, 1.5, 0.5, 0.5, 1.25])
    advantages = jnp.array([2.0, -2.0, 2.0, -2.0, 1.0])
    value, clipped = losses.clipped_surrogate(
        jnp.log(ratio), jnp.zeros(5), advantages, clip_low=0.2, clip_high=0.3
    )
    np.testing.assert_allclose(value, [2.6, -3.0, 1.0, -1.6, 1.25], rtol=1e-6)
    np.testing.assert_array_equal(clipped, [True, False, False, True, False])
    slopes = jax.grad(
        lambda x: losses.clipped_surrogate(x, jnp.zeros(5), advantages, clip_high=0.3)[0].sum()
    )(jnp.log(ratio))
    # d(ratio * A)/d(logp) = ratio * A, and 0 where the bound is active.
    np.testing.assert_allclose(slopes, [0.0, -3.0, 1.0, 0.0, 1.25], rtol=1e-6)


# One prompt, two answers, A = +1 and -1, all ratios 1, beta 0: every token contributes -A.
# Answer 0: one text and one audio token; answer 1: two text and two audio tokens.
#   grpo:    answer means -1 and +1, their sum 0 over 2 answers.
#   dr_grpo: (-2 + 4) / 8 = 0.25 over 2 answers with max_tokens 8.
#   dapo:    -2 + 4 = 2 over 6 tokens.
@pytest.mark.parametrize(
    ("loss_type", "want_sum", "want_weight"),
    [("grpo", 0.0, 2.0), ("dr_grpo", 0.25, 2.0), ("dapo", 2.0, 6.0)],
)
def test_loss_types_by_hand(loss_type, want_sum, want_weight):
    mask = jnp.array([[[True, False], [True, True]]])
    logp = {s: jnp.full((1, 2, 2), -1.0) for s in losses.STREAMS}
    loss, weight, _ = losses.policy_loss(
        logp,
        logp,
        logp,
        jnp.array([[1.0, -1.0]]),
        dict.fromkeys(losses.STREAMS, mask),
        beta=0.0,
        loss_type=loss_type,
        max_tokens=8,
    )
    np.testing.assert_allclose(loss, want_sum, atol=1e-6)
    assert float(weight) == want_weight


def test_kl_and_metrics_by_hand():
    # One answer, one token per stream, A = 0, ratio 1: the loss is beta times the mean k3.
    # Text: log(ref / pi) = -ln 2, k3 0.1931472. Audio: reference equal, 0.
    # Mean over two tokens 0.0965736, times beta 0.2 = 0.0193147.
    mask = {s: jnp.ones((1, 1, 1), bool) for s in losses.STREAMS}
    logp = {s: jnp.full((1, 1, 1), jnp.log(0.5)) for s in losses.STREAMS}
    ref = {"text": jnp.full((1, 1, 1), jnp.log(0.25)), "audio": logp["audio"]}
    loss, weight, metrics = losses.policy_loss(
        logp, logp, ref, jnp.zeros((1, 1)), mask, entropy=logp, beta=0.2
    )
    np.testing.assert_allclose(loss / weight, 0.0193147, rtol=1e-5)
    np.testing.assert_allclose(metrics["kl/text"][0], 0.1931472, rtol=1e-5)
    assert float(metrics["kl/audio"][0]) == 0.0
    assert float(metrics["clip_share/text"][0]) == 0.0
    assert float(metrics["entropy/audio"][1]) == 1.0


def test_on_policy_gradient_is_the_policy_gradient():
    # Ratio 1, beta 0: d loss / d logp = -A * weight of the token, whatever the clip.
    logp, _, ref, advantages, masks, _ = _stream_case()

    def loss(logp):
        old = jax.tree.map(jax.lax.stop_gradient, logp)
        return losses.policy_loss(logp, old, ref, advantages, masks, beta=0.0)[0]

    grads = jax.grad(loss)(logp)
    weights, _ = losses.token_weights(masks, "grpo")
    for stream, mask in masks.items():
        want = np.where(mask, -advantages[..., None] * weights, 0.0)
        np.testing.assert_allclose(grads[stream], want, atol=1e-6)


@pytest.mark.parametrize("loss_type", losses.LOSS_TYPES)
def test_micro_batches_sum_to_the_whole(loss_type):
    case = _stream_case(seed=1)

    def sums(tree):
        logp, old, ref, advantages, masks, entropy = tree
        return losses.policy_loss(
            logp, old, ref, advantages, masks, entropy=entropy, loss_type=loss_type, max_tokens=10
        )

    whole = sums(case)
    for parts in (2, 4):
        split = jax.tree.map(lambda x, n=parts: x.reshape(n, 4 // n, *x.shape[1:]), case)
        pieces = jax.vmap(sums)(split)
        added = jax.tree.map(lambda x: x.sum(axis=0), pieces)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), added, whole)


@pytest.mark.parametrize("loss_type", losses.LOSS_TYPES)
def test_padding_changes_nothing_and_may_hold_anything(loss_type):
    logp, old, ref, advantages, masks, _ = _stream_case(seed=2)

    def pad(tree, value):
        return jax.tree.map(
            lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 3)), constant_values=value), tree
        )

    def run(logp, old, ref, masks):
        return losses.policy_loss(
            logp, old, ref, advantages, masks, loss_type=loss_type, max_tokens=10
        )[0]

    short, grads = jax.value_and_grad(run)(logp, old, ref, masks)
    long, long_grads = jax.value_and_grad(run)(
        pad(logp, 500.0), pad(old, -500.0), pad(ref, 9e9), pad(masks, False)
    )
    np.testing.assert_allclose(long, short, rtol=1e-6)
    for stream in losses.STREAMS:
        np.testing.assert_array_equal(long_grads[stream][..., 5:], 0.0)
        np.testing.assert_allclose(long_grads[stream][..., :5], grads[stream], rtol=1e-6)


def test_answer_without_tokens_has_no_weight():
    masks = {s: jnp.array([[[True, True], [False, False]]]) for s in losses.STREAMS}
    weights, total = losses.token_weights(masks, "grpo")
    np.testing.assert_allclose(weights[0, :, 0], [0.25, 0.0])
    assert float(total) == 1.0


def test_unknown_names_are_refused():
    masks = {"text": jnp.ones((1, 1, 1), bool)}
    with pytest.raises(ValueError, match="ppo"):
        losses.token_weights(masks, "ppo")
    with pytest.raises(ValueError, match="max_tokens"):
        losses.token_weights(masks, "dr_grpo")


def test_cross_entropy_by_hand():
    # Text: 1 + 2 over two tokens; audio: 4 over one; the rest is masked.
    logp = {"text": jnp.array([[-1.0, -2.0, -9.0]]), "audio": jnp.array([[-9.0, -9.0, -4.0]])}
    masks = {
        "text": jnp.array([[True, True, False]]),
        "audio": jnp.array([[False, False, True]]),
    }
    loss, weight, metrics = losses.stream_cross_entropy(logp, masks)
    assert float(loss) == 7.0
    assert float(weight) == 3.0
    assert float(metrics["nll/text"][0] / metrics["nll/text"][1]) == 1.5
    assert float(metrics["nll/audio"][0]) == 4.0
