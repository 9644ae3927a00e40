"""Qwen2 against Hugging Face, and its cache and prefix against the plain forward."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from paras2s_jax.convert import qwen2 as table
from paras2s_jax.convert.rules import export_params, import_params
from paras2s_jax.models.qwen2 import Qwen2Config, Qwen2LM

# All sizes differ, so that a wrong transpose cannot fit.
CONFIG = Qwen2Config(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    rope_theta=10_000.0,
)


def _hugging_face(config: Qwen2Config):
    torch.manual_seed(0)
    sizes = dataclasses.asdict(config)
    theta = sizes.pop("rope_theta")
    rope = {"rope_type": "default", "rope_theta": theta}
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**sizes, rope_parameters=rope, attn_implementation="eager")
    )
    with torch.no_grad():  # biases and norms start at 0 and 1: move them, so that they count
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _run(model: Qwen2LM, variables: dict, tokens, **inputs):
    """model.apply, compiled whole: op by op would compile dozens of programs."""
    emit = inputs.pop("emit", ())
    run = jax.jit(lambda v, t, kw: model.apply(v, t, emit=emit, **kw))
    return run(variables, tokens, inputs)


def _converted(model: Qwen2LM, hf) -> dict:
    tokens = jnp.zeros((1, 2), jnp.int32)
    expected = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens))["params"]
    tensors = {key: value.numpy() for key, value in hf.state_dict().items()}
    ignore = ["lm_head.weight"] if model.config.tie_word_embeddings else []
    rules = table.rules(model.config)
    return {"params": import_params(tensors, rules, expected, ignore=ignore)}


@pytest.fixture(scope="module")
def hf():
    return _hugging_face(CONFIG)


@pytest.fixture(scope="module")
def variables(hf):
    return _converted(Qwen2LM(CONFIG), hf)


TOKENS = np.random.default_rng(0).integers(0, 61, (4, 9)).astype(np.int32)


@pytest.mark.parametrize("tied", [False, True])
def test_matches_hugging_face_with_padding(tied):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    hf, model = _hugging_face(config), Qwen2LM(config)
    mask = np.ones(TOKENS.shape, bool)
    mask[1, 6:] = mask[2, :4] = False  # right and left padding
    with torch.no_grad():
        want = hf(torch.tensor(TOKENS), attention_mask=torch.tensor(mask).long()).logits.numpy()
    got, out = _run(model, _converted(model, hf), TOKENS, attention_mask=mask, emit=("input",))
    assert got.shape == (4, 9, 61) and out["input"].shape == (3, 4, 9, 24)
    np.testing.assert_allclose(got[mask], want[mask], atol=1e-4)


def test_export_gives_back_the_checkpoint(hf, variables):
    tensors = export_params(variables["params"], table.rules(CONFIG))
    state = hf.state_dict()
    assert set(tensors) == set(state)
    for key, value in state.items():
        np.testing.assert_array_equal(tensors[key], value.numpy(), err_msg=key)


def test_cached_steps_equal_the_full_forward(variables):
    model = Qwen2LM(CONFIG)
    want, _ = _run(model, variables, TOKENS)
    step = jax.jit(
        lambda cache, i, tokens: model.apply(variables, tokens, cache=cache, cache_index=i)
    )
    first, out = step(model.init_cache(4, 12), jnp.int32(0), TOKENS[:, :5])
    logits = [first]
    for i in range(5, 9):
        cache = out["cache"]
        one, out = step(cache, jnp.int32(i), TOKENS[:, i : i + 1])
        logits.append(one)
    np.testing.assert_allclose(jnp.concatenate(logits, axis=1), want, atol=1e-5)
    assert out["cache"]["k"].shape == (3, 4, 12, 2, 8)
    assert not jnp.any(out["cache"]["k"][:, :, 9:])  # nothing past the tokens is touched


def test_group_on_a_ragged_shared_prefix_equals_separate_rows(variables):
    model = Qwen2LM(CONFIG)
    prompts, lengths = TOKENS[:2, :5], np.array([5, 3])
    mask = np.arange(5) < lengths[:, None]
    answers = np.random.default_rng(1).integers(0, 61, (6, 4)).astype(np.int32)
    _, out = _run(model, variables, prompts, attention_mask=mask.astype(np.int32), emit=("kv",))
    positions = np.repeat(lengths, 3)[:, None] + np.arange(4)
    got, _ = _run(
        model, variables, answers, position_ids=positions, prefix=out["kv"], prefix_mask=mask
    )
    # By hand: prompt and answer in one row each, the short rows padded at their end.
    whole = np.zeros((6, 9), np.int32)
    for row in range(6):
        n = lengths[row // 3]
        whole[row, : n + 4] = [*prompts[row // 3, :n], *answers[row]]
    want, _ = _run(model, variables, whole)
    for row in range(6):
        n = lengths[row // 3]
        np.testing.assert_allclose(got[row], want[row, n : n + 4], atol=1e-5)


def test_remat_and_unroll_change_no_gradient(variables):
    def gradient(**fields):
        model = Qwen2LM(CONFIG, **fields)
        loss = jax.jit(jax.grad(lambda v: jnp.mean(jnp.square(model.apply(v, TOKENS)[0]))))
        return loss(variables)

    plain = gradient()
    for fields in ({"remat": "full", "scan_unroll": 3}, {"remat": "dots"}):
        other = gradient(**fields)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, other)


def test_bfloat16_compute_gives_float32_logits_near_the_float32_ones(variables):
    want, _ = _run(Qwen2LM(CONFIG), variables, TOKENS)
    got, _ = _run(Qwen2LM(CONFIG, dtype=jnp.bfloat16), variables, TOKENS)
    assert got.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean(jnp.square(got - want)) / jnp.mean(jnp.square(want)))
    assert 1e-5 < error < 0.05


def test_parameters_name_logical_axes():
    boxed = jax.eval_shape(Qwen2LM(CONFIG).init, jax.random.key(0), TOKENS)
    layer = boxed["params"]["stack"]["layers"]
    assert layer["self_attn"]["q_proj"]["kernel"].names == ("layers", "embed", "heads")
    assert layer["mlp"]["down_proj"]["kernel"].names == ("layers", "mlp", "embed")
    assert boxed["params"]["lm_head"]["kernel"].names == ("embed", "vocab")
