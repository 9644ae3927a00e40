"""The race of GRPO steps on a model so small that speed means nothing."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from paras2s_jax.models.qwen2 import Qwen2Config
from paras2s_jax.perf import grpo
from paras2s_jax.perf.race import RaceError

SMALL = grpo.Work(Qwen2Config(211, 16, 20, 2, 4, 2), prompts=2, group=3, prompt_len=5, answer_len=7)


def test_a_small_race_agrees_and_compiles_once():
    result = grpo.measure(SMALL, repeats=1)
    figures = result.figures()
    assert result.compiled == 0 and figures["grpo/ratio"] > 0
    assert figures["grpo/loss_difference"] < 1e-6
    assert 0 < figures["grpo/gradient_difference"] < 1e-5
    for side in ("ours", "theirs"):
        parts = [figures[f"grpo/{side}_{name}_ms"] for name in ("rollout", "reference", "update")]
        assert min(parts) > 0 and sum(parts) < 2 * figures[f"grpo/{side}_ms"]


def test_losses_that_differ_are_refused(monkeypatch):
    make, other = grpo.OurStep, dataclasses.replace(SMALL, beta=0.2)
    monkeypatch.setattr(grpo, "OurStep", lambda p, ref, _, laps: make(p, ref, other, laps))
    with pytest.raises(RaceError, match="loss: answers differ"):
        grpo.measure(SMALL, repeats=1)


def test_reward_by_hand():
    # Real ids 2, 3, 4: two of three are even. Nothing real: 0.
    tokens = jnp.array([[[2, 3, 4, 6], [1, 2, 3, 4]]])
    mask = jnp.array([[[True, True, True, False], [False] * 4]])
    np.testing.assert_allclose(grpo.even_share(tokens, mask), [[2 / 3, 0.0]], rtol=1e-6)
