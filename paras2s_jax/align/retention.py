"""How much of its old ability a policy keeps: likelihood of answers on neutral dialogue."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from paras2s_jax.align import sft
from paras2s_jax.align.policy import Frontend, SpeechPolicy
from paras2s_jax.train.sharding import ONE_DEVICE, Layout


def nll_growth(
    policy: SpeechPolicy,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    frontend: Frontend,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    layout: Layout = ONE_DEVICE,
) -> dict[str, float]:
    """Relative growth of the answers' negative log-likelihood from `before` to `after`.

    Args:
        before, after: variables of policy.model, e.g. the SFT policy and what RL made of it.
        batches: demonstrations of neutral dialogue (as `sft.evaluate` takes them), iterable twice.

    Returns:
        {"nll_before", "nll_after", "nll_growth" = after / before - 1}, per token of both streams.
    """
    nll = [
        sft.evaluate(policy, variables, frontend, batches, layout=layout)["nll"]
        for variables in (before, after)
    ]
    return {"nll_before": nll[0], "nll_after": nll[1], "nll_growth": nll[1] / nll[0] - 1.0}
