"""A GRPO run that goes on with other devices than it began with."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from paras2s_jax.align import grpo
from paras2s_jax.models import axes
from paras2s_jax.train import sharding
from paras2s_jax.train.checkpoint import Checkpointer
from paras2s_jax.train.metrics import MetricWriter, read_metrics
from tests.align.conftest import Repeat, make_queries, make_tiny


def mean_code(reward_variables, query, query_len, answers):
    """Mean code number of an answer, in small units."""
    return answers.codes.sum(axis=-1) / jnp.maximum(answers.len_codes, 1) / 10.0


def train(folder, num_steps, layouts):
    tiny = make_tiny(max_steps=6)
    variables = grpo.train(
        tiny.policy,
        tiny.variables,
        tiny.variables,
        tiny.frontend,
        mean_code,
        {},
        Repeat([make_queries(8, seed) for seed in range(4)]),
        # Adam would blow up the rounding of gradients near zero.
        optimizer=optax.sgd(1e-2, momentum=0.9),
        settings=grpo.Settings(group_size=2),
        num_steps=num_steps,
        rng=jax.random.key(7),
        layouts=layouts,
        checkpointer=Checkpointer(folder / "checkpoints"),
        save_every=2,
        writer=MetricWriter(folder),
        log_every=1,
    )
    return jax.device_get(variables)


def test_from_one_device_to_eight_and_back(tmp_path):
    one = sharding.ONE_DEVICE_LAYOUTS
    eight = sharding.make_layouts(
        {"fsdp": 4, "tensor": 2}, axes.TRAIN_RULES, {"fsdp": 2, "tensor": 4}, axes.DECODE_RULES
    )
    start = make_tiny(max_steps=6).variables
    expected = train(tmp_path / "whole", 6, one)
    for num_steps, layouts in ((2, one), (4, eight), (6, one)):
        found = train(tmp_path / "moved", num_steps, layouts)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, expected)
    moved = max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y).max(), start, expected)))
    assert moved > 1e-2
    whole, rows = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "moved"))
    assert [row["step"] for row in rows] == [row["step"] for row in whole] == [1, 2, 3, 4, 5, 6]
    for row, expected_row in zip(rows, whole, strict=True):
        for name in ("loss", "reward/mean", "grad_norm"):
            np.testing.assert_allclose(row[name], expected_row[name], atol=1e-5, err_msg=name)
