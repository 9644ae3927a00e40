"""The programs of a step: what moves, what they are lowered with, what they give."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paras2s_jax.align import phases
from paras2s_jax.models import axes
from paras2s_jax.models.codec import PATCH_SAMPLES
from paras2s_jax.train import sharding


def leaves_of(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def test_weights_that_need_not_move_are_not_copied(tiny):
    reshard = phases.Reshard(tiny.policy.boxed(), sharding.ONE_DEVICE_LAYOUTS)
    weights = reshard(tiny.variables)
    given = dict(leaves_of(tiny.variables))
    assert all(leaf is given[path] for path, leaf in leaves_of(weights))
    assert reshard.call(tiny.variables) is None


def test_frozen_weights_are_cast_once(tiny):
    reshard = phases.Reshard(tiny.policy.boxed(), sharding.ONE_DEVICE_LAYOUTS, jnp.bfloat16)
    trained = {"params": {"text_head": tiny.variables["params"]["text_head"]}}
    frozen = {"params": {k: v for k, v in tiny.variables["params"].items() if k != "text_head"}}
    first, second = reshard(trained, frozen), reshard(trained, frozen)
    assert jax.tree.structure(first) == jax.tree.structure(tiny.variables)
    assert {leaf.dtype for _, leaf in leaves_of(first)} == {jnp.dtype(jnp.bfloat16)}
    again = dict(leaves_of(second))
    kept = {jax.tree_util.keystr(path) for path, leaf in leaves_of(first) if leaf is again[path]}
    assert kept == {jax.tree_util.keystr(path) for path, _ in leaves_of(frozen)}


def test_weights_move_to_another_mesh_of_the_same_devices(tiny):
    layouts = sharding.make_layouts(
        {"fsdp": 8}, axes.TRAIN_RULES, {"fsdp": 2, "tensor": 4}, axes.DECODE_RULES
    )
    boxed = tiny.policy.boxed()
    variables = layouts.train.place(tiny.variables, boxed)
    assert variables["params"]["text_head"]["kernel"].addressable_shards[0].data.shape == (2, 172)
    reshard = phases.Reshard(boxed, layouts)
    weights = reshard(variables)
    head = weights["params"]["text_head"]["kernel"]
    assert head.addressable_shards[0].data.shape == (16, 43)
    assert len({leaf.sharding.mesh for _, leaf in leaves_of(weights)}) <= 2
    jax.tree.map(np.testing.assert_array_equal, weights, tiny.variables)
    wanted = layouts.decode.abstract(boxed)
    for (path, leaf), (_, other) in zip(leaves_of(weights), leaves_of(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(other.sharding, leaf.ndim), path


def test_options_reach_the_compiler_of_the_rollout(tiny, queries):
    policy = dataclasses.replace(tiny.policy, rollout_options=(("xla_no_such_option", "1"),))
    respond = phases.Responder(policy, group_size=2)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        respond(tiny.variables, tiny.frontend, queries, jax.random.key(0))


def test_respond_batch_gives_what_a_bench_wants(tiny, queries):
    respond = phases.make_respond_batch(tiny.policy, tiny.variables, tiny.frontend, tiny.tokenizer)
    waves, lens, texts, finished = respond(
        queries["query"][:2], queries["query_len"][:2], jax.random.key(0)
    )
    assert waves.shape == (2, tiny.policy.max_steps * PATCH_SAMPLES)
    assert lens.shape == (2,) and finished.dtype == bool
    assert len(texts) == 2 and all(isinstance(text, str) for text in texts)
