"""The clipped objective of GRPO over both token streams. Pure array functions.

Every loss is returned as a sum and a weight that is known from the masks alone, so that the
sums of micro-batches, divided once by their total weight, are the loss of the whole batch.
"""

import jax
import jax.numpy as jnp

LOSS_TYPES = ("grpo", "dr_grpo", "dapo")
STREAMS = ("text", "audio")


def _k1(log_ref_ratio):
    return -log_ref_ratio


def _k2(log_ref_ratio):
    return 0.5 * log_ref_ratio**2


def _k3(log_ref_ratio):
    return jnp.expm1(log_ref_ratio) - log_ref_ratio


# Schulman, "Approximating KL divergence" (2020); k3 is eq. 4 of GRPO (arXiv 2402.03300). The mean
# over answers of k1 and of k3 is KL(pi || ref). As a term of the loss, k1 has a gradient of mean
# zero (it only adds noise), k2 the gradient of KL(pi || ref), k3 that of KL(ref || pi).
KL_ESTIMATORS = {"k1": _k1, "k2": _k2, "k3": _k3}


def kl_to_reference(logp, ref_logp, estimator="k3"):
    """Estimate of KL(pi || ref) at each sampled token.

    logp, ref_logp: float32[...], log-probabilities of the token that was sampled.
    estimator: a key of `KL_ESTIMATORS`.
    Returns: float32[...].
    """
    return KL_ESTIMATORS[estimator](ref_logp - logp)


def clipped_surrogate(logp, old_logp, advantages, *, clip_low=0.2, clip_high=0.2):
    """min(rho * A, clip(rho, 1 - low, 1 + high) * A), PPO (arXiv 1707.06347) eq. 7.

    logp, old_logp, advantages: float32[...], broadcast against each other.
    clip_low, clip_high: DAPO (arXiv 2503.14476, section 3.1) sets the upper one larger.
    Returns: (surrogate float32[...], clipped bool[...]: the bound is active, no gradient flows).
    """
    ratio = jnp.exp(logp - old_logp)
    bounded = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    clipped = ((ratio < 1.0 - clip_low) & (advantages < 0)) | (
        (ratio > 1.0 + clip_high) & (advantages > 0)
    )
    return jnp.minimum(ratio * advantages, bounded * advantages), clipped


def token_weights(masks, loss_type, max_tokens=None):
    """Weight of each token in the loss, and what the weighted sum is divided by.

    masks: dict stream -> bool[P, G, R], True where the policy chose the token.
    loss_type:
      "grpo": mean over each answer's tokens of both streams, then over answers
        (paper.md section 3); tokens weigh 1 / (answer's tokens), the divisor counts answers.
      "dr_grpo": sum over tokens / `max_tokens` (arXiv 2503.20783), mean over answers: a token
        weighs the same in a short answer and in a long one.
      "dapo": mean over all tokens of the batch (arXiv 2503.14476, section 3.3).
    max_tokens: int, most tokens an answer can have in both streams; for "dr_grpo" only.
    Returns: (weights float32[P, G, 1] for all streams, total float32[]).
    """
    len_tokens = sum(mask.sum(axis=-1) for mask in masks.values())
    answered = (len_tokens > 0).astype(jnp.float32)
    if loss_type == "grpo":
        weights, total = answered / jnp.maximum(len_tokens, 1), answered.sum()
    elif loss_type == "dr_grpo":
        if not max_tokens:
            raise ValueError("loss_type 'dr_grpo' needs max_tokens, its constant divisor.")
        weights, total = answered / max_tokens, answered.sum()
    elif loss_type == "dapo":
        weights, total = answered, len_tokens.sum().astype(jnp.float32)
    else:
        raise ValueError(f"loss_type {loss_type!r} is unknown; choose one of {LOSS_TYPES}.")
    return weights[..., None], total


def policy_loss(
    logp,
    old_logp,
    ref_logp,
    advantages,
    masks,
    *,
    entropy=None,
    beta=0.2,
    clip_low=0.2,
    clip_high=0.2,
    kl_estimator="k3",
    loss_type="grpo",
    max_tokens=None,
):
    """-J of paper.md section 3 as a sum and its weight, with per-stream metrics.

    logp, old_logp, ref_logp, masks, entropy: dict stream -> [P, G, R] (float32; masks bool):
      of the sampled tokens under the policy, the sampling policy and the frozen reference.
    advantages: float32[P, G].
    Returns: (loss_sum float32[], weight float32[], metrics dict name -> (sum, weight)).
    """
    weights, total = token_weights(masks, loss_type, max_tokens)
    advantages = jax.lax.stop_gradient(advantages)[..., None]
    loss_sum = jnp.float32(0.0)
    metrics = {}
    for stream, mask in masks.items():
        # Values at positions nobody chose are arbitrary: zero them before exp, not only after,
        # or an overflow there becomes NaN in the gradient.
        new, old, ref = (jnp.where(mask, x[stream], 0.0) for x in (logp, old_logp, ref_logp))
        surrogate, clipped = clipped_surrogate(
            new,
            jax.lax.stop_gradient(old),
            advantages,
            clip_low=clip_low,
            clip_high=clip_high,
        )
        kl = kl_to_reference(new, jax.lax.stop_gradient(ref), kl_estimator)
        loss_sum += jnp.where(mask, weights * (beta * kl - surrogate), 0.0).sum()
        len_tokens = mask.sum().astype(jnp.float32)
        # The logged KL is always k3: never negative and of low variance, whatever is optimised.
        shown = {"kl": kl_to_reference(new, ref), "clip_share": clipped.astype(jnp.float32)}
        if entropy is not None:
            shown["entropy"] = entropy[stream]
        for name, value in shown.items():
            total_shown = jnp.where(mask, jax.lax.stop_gradient(value), 0.0).sum()
            metrics[f"{name}/{stream}"] = (total_shown, len_tokens)
    return loss_sum, total, metrics


def stream_cross_entropy(logp, masks):
    """Next-token cross-entropy on both streams, forced tokens masked out.

    logp: dict stream -> float32[..., R], of the target tokens; masks: dict stream -> bool[..., R].
    Returns: (loss_sum float32[], weight float32[]: tokens of both streams, metrics with
      `nll/<stream>` per token of that stream).
    """
    loss_sum, weight, metrics = jnp.float32(0.0), jnp.float32(0.0), {}
    for stream, mask in masks.items():
        nll = -jnp.where(mask, logp[stream], 0.0).sum()
        len_tokens = mask.sum().astype(jnp.float32)
        metrics[f"nll/{stream}"] = (jax.lax.stop_gradient(nll), len_tokens)
        loss_sum, weight = loss_sum + nll, weight + len_tokens
    return loss_sum, weight, metrics
