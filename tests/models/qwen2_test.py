"""Qwen2 and Llama against Hugging Face, and cache and prefix against the plain forward."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from paras2s_jax.convert import qwen2 as table
from paras2s_jax.convert.rules import import_params
from paras2s_jax.models.layers import RopeScaling
from paras2s_jax.models.qwen2 import Qwen2Config, Qwen2LM, last_real
from paras2s_jax.models.unrolled import unroll_kv, unroll_variables

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
ONE_KEY_HEAD = Qwen2Config(53, 20, 44, 2, 5, 1, head_dim=6, tie_word_embeddings=True)
NO_GROUPS = Qwen2Config(37, 28, 30, 2, 2, 2, rms_norm_eps=1e-5)
LLAMA = Qwen2Config(61, 24, 40, 3, 6, 3, rope_theta=500.0, attention_bias=False)
# Within the 9 tokens all three bands turn: kept, mixed and stretched wavelengths.
STRETCHED = dataclasses.replace(LLAMA, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32), head_dim=10)
TIED_LLAMA = dataclasses.replace(
    STRETCHED, num_key_value_heads=1, num_hidden_layers=2, tie_word_embeddings=True
)


def _hugging_face(config: Qwen2Config):
    """A random model of the same sizes: Llama if there are no biases."""
    torch.manual_seed(0)
    sizes = {key: value for key, value in dataclasses.asdict(config).items() if value is not None}
    rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
    if config.rope_scaling is not None:
        rope |= {"rope_type": "llama3"} | sizes.pop("rope_scaling")._asdict()
    name = "Qwen2" if sizes.pop("attention_bias") else "Llama"
    settings = getattr(transformers, f"{name}Config")(**sizes, rope_parameters=rope)
    model = getattr(transformers, f"{name}ForCausalLM")(settings)
    with torch.no_grad():  # biases and norms start at 0 and 1: move them, so that they count
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _run(model: Qwen2LM, variables: dict, input_ids, **inputs):
    """model.apply, compiled whole: op by op would compile dozens of programs."""
    emit = inputs.pop("emit", ())
    run = jax.jit(lambda v, t, kw: model.apply(v, t, emit=emit, **kw))
    return run(variables, input_ids, inputs)


def _converted(model: Qwen2LM, hf) -> dict:
    expected = jax.eval_shape(lambda: table.init(model, jax.random.key(0)))
    tensors = {key: value.numpy() for key, value in hf.state_dict().items()}
    rules = table.rules(model.config)
    expected = nn.meta.unbox(expected)["params"]
    return {"params": import_params(tensors, rules, expected, ignore=table.IGNORE)}


@pytest.fixture(scope="module")
def variables():
    return _converted(Qwen2LM(CONFIG), _hugging_face(CONFIG))


TOKENS = np.random.default_rng(0).integers(0, 37, (4, 9)).astype(np.int32)


@pytest.mark.parametrize("config", [CONFIG, ONE_KEY_HEAD, NO_GROUPS, LLAMA, STRETCHED, TIED_LLAMA])
def test_matches_hugging_face_with_padding(config, tmp_path):
    hf, model = _hugging_face(config), Qwen2LM(config)
    mask = np.ones(TOKENS.shape, np.int32)
    mask[1, 6:] = mask[2, :4] = 0  # right and left padding
    with torch.no_grad():
        want = hf(torch.tensor(TOKENS), attention_mask=torch.tensor(mask)).logits.numpy()
    got, out = _run(model, _converted(model, hf), TOKENS, attention_mask=mask, emit=("input",))
    assert got.shape == (4, 9, config.vocab_size)
    assert out["input"].shape == (config.num_hidden_layers, 4, 9, config.hidden_size)
    np.testing.assert_allclose(got[mask > 0], want[mask > 0], atol=1e-4)
    hf.config.save_pretrained(tmp_path)
    read = Qwen2Config.from_json(tmp_path / "config.json")
    assert dataclasses.replace(read, head_dim=config.head_dim) == config
    assert read.width_per_head == config.width_per_head


def test_far_positions_match_hugging_face():
    # 31 and 1000 turn every band of the stretched wavelengths by a different angle.
    hf, model = _hugging_face(STRETCHED), Qwen2LM(STRETCHED)
    positions = np.array([[0, 3, 31, 32, 33, 500, 1000, 1001, 2000]], np.int32)
    # With a mask given, transformers does not take gaps for the start of another sequence.
    inputs = {"position_ids": torch.tensor(positions), "attention_mask": torch.ones(1, 9)}
    with torch.no_grad():
        want = hf(torch.tensor(TOKENS[:1]), **inputs).logits
    got, _ = _run(model, _converted(model, hf), TOKENS[:1], position_ids=positions)
    np.testing.assert_allclose(got, want.numpy(), atol=1e-4)


def test_embeds_stand_in_for_ids(variables):
    model = Qwen2LM(CONFIG)
    embeds = model.apply(variables, TOKENS, method="embed")
    got, _ = jax.jit(lambda e: model.apply(variables, inputs_embeds=e))(embeds)
    want, _ = _run(model, variables, TOKENS)
    np.testing.assert_allclose(got, want, atol=1e-6)


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
    assert out["cache"]["k"].shape == (3, 4, 2, 12, 8)
    assert not jnp.any(out["cache"]["k"][..., 9:, :])  # nothing past the tokens is touched


def test_unrolled_layers_equal_the_scan(variables):
    model = Qwen2LM(CONFIG)
    _, out = _run(model, variables, TOKENS[:2, :5], emit=("kv",))
    prefix, mask = out["kv"], np.ones((2, 5), bool)
    inputs = {"prefix_mask": mask, "cache_index": jnp.int32(2), "position_ids": 7 + np.arange(2)}
    inputs["position_ids"] = np.tile(inputs["position_ids"], (4, 1))
    tokens, cache = TOKENS[:, 7:], model.init_cache(4, 6)
    cache = jax.tree.map(lambda x: x.at[..., :2, :].set(0.5), cache)
    want, seen = _run(model, variables, tokens, prefix=prefix, cache=cache, **inputs)
    unrolled = model.clone(unrolled=True)
    own = unroll_variables(variables)
    shapes = nn.meta.unbox(jax.eval_shape(unrolled.init, jax.random.key(0), TOKENS))
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.shape, y.shape), dict(shapes), own)
    split = unroll_kv(cache)
    got, out = _run(unrolled, own, tokens, prefix=unroll_kv(prefix), cache=split, **inputs)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert jax.tree.map(jnp.shape, split) == jax.tree.map(jnp.shape, out["cache"])
    for name, x in seen["cache"].items():
        np.testing.assert_allclose(jnp.stack(out["cache"][name]), x, atol=1e-6)


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
    assert 1e-5 < error < 0.02


def test_parameters_name_logical_axes():
    boxed = jax.eval_shape(Qwen2LM(CONFIG).init, jax.random.key(0), TOKENS)
    layer = boxed["params"]["stack"]["layers"]
    assert layer["self_attn"]["q_proj"]["kernel"].names == ("layers", "embed", "heads")
    assert layer["mlp"]["down_proj"]["kernel"].names == ("layers", "mlp", "embed")
    assert boxed["params"]["lm_head"]["kernel"].names == ("embed", "vocab")


def test_last_real():
    values = jnp.arange(8).reshape(2, 4)
    mask = jnp.array([[1, 1, 0, 0], [0, 1, 0, 0]], bool)
    assert last_real(values, mask).tolist() == [1, 5]
