"""LoRA under the layer scan: against peft, merged, and frozen base."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from paras2s_jax.models.layers import Dense
from paras2s_jax.models.lora import ATTENTION, LoRA, merge_lora
from paras2s_jax.models.qwen2 import Qwen2Config, Qwen2LM

CONFIG = Qwen2Config(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=28,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 6)).astype(np.int32)


@pytest.fixture(scope="module")
def trained():
    """Variables whose adapters are not zero."""
    model = Qwen2LM(CONFIG, LoRA(rank=3, alpha=12.0))
    variables = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), TOKENS))
    leaves, tree = jax.tree.flatten(variables["lora"])
    keys = jax.random.split(jax.random.key(1), len(leaves))
    move = jax.jit(lambda x, key: x + 0.3 * jax.random.normal(key, x.shape))
    leaves = [move(x, key) for x, key in zip(leaves, keys, strict=True)]
    return variables | {"lora": jax.tree.unflatten(tree, leaves)}


def test_adapters_are_stacked_by_layer_on_the_targets_only():
    model = Qwen2LM(CONFIG, LoRA(rank=3, targets=ATTENTION))
    lora = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["lora"]["stack"]["layers"]
    assert set(lora) == {"self_attn"}
    assert lora["self_attn"]["v_proj"]["a"].value.shape == (2, 16, 3)
    assert lora["self_attn"]["v_proj"]["b"].value.shape == (2, 3, 8)
    assert lora["self_attn"]["v_proj"]["a"].names == ("layers", "embed", "lora_rank")


def test_each_layer_gets_its_own_random_a():
    model = Qwen2LM(CONFIG, LoRA(rank=3))
    variables = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), TOKENS))
    a = variables["lora"]["stack"]["layers"]["mlp"]["up_proj"]["a"]
    assert not np.allclose(a[0], a[1])


def test_merged_kernels_equal_adapters(trained):
    want, _ = jax.jit(Qwen2LM(CONFIG, LoRA(rank=3, alpha=12.0)).apply)(trained, TOKENS)
    plain = jax.jit(Qwen2LM(CONFIG).apply)
    base, _ = plain({"params": trained["params"]}, TOKENS)
    got, _ = plain(merge_lora(trained, alpha=12.0), TOKENS)
    assert np.abs(want - base).max() > 1e-2
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_one_layer_equals_peft(trained):
    layer = jax.tree.map(lambda x: np.asarray(x[1]), trained["params"]["stack"]["layers"]["mlp"])
    lora = jax.tree.map(lambda x: np.asarray(x[1]), trained["lora"]["stack"]["layers"]["mlp"])
    base = torch.nn.Sequential(torch.nn.Linear(16, 28, bias=False))
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=12, target_modules=["0"]))
    wrapped = model.base_model.model[0]
    state = {
        "base_layer.weight": layer["up_proj"]["kernel"].T,
        "lora_A.default.weight": lora["up_proj"]["a"].T,
        "lora_B.default.weight": lora["up_proj"]["b"].T,
    }
    wrapped.load_state_dict({key: torch.tensor(value) for key, value in state.items()})
    x = np.random.default_rng(1).normal(size=(5, 16)).astype(np.float32)
    dense = Dense(28, use_bias=False, lora_rank=3, lora_alpha=12.0)
    got = dense.apply({"params": layer["up_proj"], "lora": lora["up_proj"]}, x)
    with torch.no_grad():
        np.testing.assert_allclose(got, wrapped(torch.tensor(x)).numpy(), atol=1e-5)


def test_adapters_alone_can_be_trained(trained):
    model = Qwen2LM(CONFIG, LoRA(rank=3, alpha=12.0))

    def loss(lora):
        return jnp.mean(jnp.square(model.apply(trained | {"lora": lora}, TOKENS)[0]))

    gradient = jax.jit(jax.grad(loss))(trained["lora"])
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(gradient))


def test_a_model_with_adapters_needs_them(trained):
    with pytest.raises(Exception, match="lora"):
        Qwen2LM(CONFIG, LoRA(rank=3)).apply({"params": trained["params"]}, TOKENS)
