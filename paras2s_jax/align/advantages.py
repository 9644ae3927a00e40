"""Rewards of a group of answers -> advantages. Pure array functions on [P, G]."""

import jax
import jax.numpy as jnp

# GRPO (arXiv 2402.03300, section 4.1.2) divides by "std" without naming the estimator.
# Ours is the sample standard deviation (ddof 1) plus 1e-4, as TRL's GRPOTrainer.
STD_DDOF = 1
STD_EPS = 1e-4


def group_moments(rewards):
    """Mean and standard deviation (ddof 1) of each group's scored answers.

    rewards: float32[P, G], NaN = unscorable.
    Returns: dict of
      count int32[P], scored answers;
      mean float32[P], 0 where nothing was scored;
      std float32[P], 0 where fewer than two answers were scored;
      spread bool[P], whether at least two scored answers differ.
    """
    scored = ~jnp.isnan(rewards)
    values = jnp.where(scored, rewards, 0.0)
    count = scored.sum(axis=1)
    mean = values.sum(axis=1) / jnp.maximum(count, 1)
    squares = jnp.where(scored, (values - mean[:, None]) ** 2, 0.0).sum(axis=1)
    std = jnp.sqrt(squares / jnp.maximum(count - STD_DDOF, 1))
    highest = jnp.where(scored, rewards, -jnp.inf).max(axis=1)
    lowest = jnp.where(scored, rewards, jnp.inf).min(axis=1)
    return {"count": count, "mean": mean, "std": std, "spread": highest > lowest}


def group_advantages(rewards, *, scale_by_std=True):
    """Group-normalised advantages: (r - mean) / (std + 1e-4), std with ddof 1.

    rewards: float32[P, G], NaN = unscorable.
    scale_by_std: False leaves the division out (Dr. GRPO, arXiv 2503.20783, section 3.2).
    Returns: float32[P, G]. Exactly 0 for an unscorable answer, which also stays out of the
      moments of its group, and for all of a group without spread, where rounding of the mean
      would otherwise be blown up by the division.
    """
    moments = group_moments(rewards)
    centred = rewards - moments["mean"][:, None]
    if scale_by_std:
        centred = centred / (moments["std"][:, None] + STD_EPS)
    keep = ~jnp.isnan(rewards) & moments["spread"][:, None]
    return jax.lax.stop_gradient(jnp.where(keep, centred, 0.0))


def reward_metrics(rewards):
    """Sums and weights of what a batch of rewards looks like.

    rewards: float32[P, G], NaN = unscorable.
    Returns: dict of name -> (sum, weight), each a scalar; `reward/mean` is
      over scored answers, `reward/std` and `reward/zero_spread` over groups. `reward/unscorable`
      is a count (weight 1).
    """
    moments = group_moments(rewards)
    scored = ~jnp.isnan(rewards)
    groups = jnp.float32(rewards.shape[0])
    return {
        "reward/mean": (
            jnp.where(scored, rewards, 0.0).sum(),
            scored.sum().astype(jnp.float32),
        ),
        "reward/std": (moments["std"].sum(), groups),
        "reward/zero_spread": ((~moments["spread"]).sum().astype(jnp.float32), groups),
        "reward/unscorable": ((~scored).sum().astype(jnp.float32), jnp.float32(1.0)),
    }
