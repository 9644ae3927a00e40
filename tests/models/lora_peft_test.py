"""LoRA on whole models against peft: which layers it reaches, its scale, and merging."""

import functools

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import linen as nn
from flax import traverse_util
from transformers.models.qwen2_5_omni import Qwen2_5OmniThinkerConfig

from paras2s_jax.convert import qwen2, qwen2_5_omni, qwen2_audio
from paras2s_jax.convert.rules import Checkpoint, import_params
from paras2s_jax.models.lora import LoRA, merge_lora

AUDIO = 40
NUM_FRAMES = 20
TEXT = {
    "vocab_size": 41,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOWER = {
    "encoder_layers": 2,
    "d_model": 24,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 40,
    "num_mel_bins": 10,
    "max_source_positions": NUM_FRAMES // 2,
}
ROPE = {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [1, 2, 1]}
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 12, "num_heads": 2}


def qwen2_reference():
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT))


def qwen2_audio_reference():
    config = transformers.Qwen2AudioConfig(
        audio_config=TOWER, text_config=TEXT, audio_token_index=AUDIO
    )
    return transformers.Qwen2AudioForConditionalGeneration(config)


def thinker_reference():
    config = Qwen2_5OmniThinkerConfig(
        audio_config=TOWER | {"n_window": 4, "output_dim": 32},
        text_config=TEXT | {"rope_parameters": ROPE},
        vision_config=VISION | {"out_hidden_size": 32, "fullatt_block_indexes": [0]},
        audio_token_index=AUDIO,
        vision_start_token_id=39,  # get_rope_index asks for it.
    )
    return transformers.Qwen2_5OmniThinkerForConditionalGeneration(config)


# Family: its table and its reference.
FAMILIES = {
    "qwen2": (qwen2, qwen2_reference),
    "qwen2_audio": (qwen2_audio, qwen2_audio_reference),
    "thinker": (qwen2_5_omni, thinker_reference),
}
CASES = [
    ("qwen2", ("q_proj", "v_proj"), 2, 5.0),
    ("qwen2", ("k_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"), 3, 12.0),
    ("qwen2_audio", ("q_proj", "out_proj", "fc2", "linear", "lm_head"), 4, 2.0),
    ("thinker", ("k_proj", "v_proj", "fc1", "fc2", "proj", "down_proj"), 3, 7.0),
]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """family -> (folder of the checkpoint, ours without adapters, variables)."""

    @functools.cache
    def convert(family):
        table, make = FAMILIES[family]
        torch.manual_seed(0)
        hf, folder = make(), tmp_path_factory.mktemp("base")
        with torch.no_grad():
            for parameter in hf.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        hf.save_pretrained(folder)
        model = table.make_model(folder)
        boxed = jax.eval_shape(lambda: table.init(model, jax.random.key(0)))
        params = import_params(
            Checkpoint(folder),
            table.rules(model.config),
            nn.meta.unbox(boxed)["params"],
            ignore=table.IGNORE,
        )
        return hf, model, {"params": params}

    return convert


def inputs_of(family):
    """ids, and for the audio models two audios of different lengths in two padded rows."""
    rng = np.random.default_rng(0)
    if family == "qwen2":
        return {"input_ids": rng.integers(0, AUDIO, (2, 7))}
    lens = np.array([20, 13])  # 5 and 3 slots
    ids = rng.integers(0, AUDIO, (2, 9))
    ids[0, 1:6], ids[1, 2:5] = AUDIO, AUDIO
    mask = np.ones((2, 9), np.int64)
    mask[1, 7:] = 0
    return {
        "input_ids": ids,
        "input_features": rng.normal(size=(2, 10, NUM_FRAMES)).astype(np.float32),
        "attention_mask": mask,
        "feature_attention_mask": (np.arange(NUM_FRAMES) < lens[:, None]).astype(np.int64),
    }


def adapters_of(wrapped, rules, renames):
    """peft's adapters in the tree of ours."""

    def checkpoint_name(name):
        name = name.removeprefix("base_model.model.")
        old = next((old for old in renames if name.startswith(old)), "")
        return renames.get(old, "") + name.removeprefix(old)

    layers = {
        checkpoint_name(name): layer
        for name, layer in wrapped.named_modules()
        if hasattr(layer, "lora_A")
    }
    found = {}
    for rule in rules:
        for key, path in rule.pairs():
            layer = layers.pop(key.removesuffix(".weight"), None)
            if layer is None:
                continue
            for name, part in (("a", layer.lora_A), ("b", layer.lora_B)):
                weight = part["default"].weight.detach().numpy().T
                where = (*path.split("/")[:-1], name)
                found[where] = [*found.get(where, ()), weight] if rule.is_stack else weight
    # The vision tower has a "proj" too; ours has no vision tower.
    assert all(name.startswith("visual.") for name in layers)
    return traverse_util.unflatten_dict(jax.tree.map(np.stack, found, is_leaf=_is_list))


def _is_list(x):
    return isinstance(x, list)


@functools.partial(jax.jit, static_argnums=0)
def call(model, variables, inputs):
    return model.apply(variables, **inputs)[0]


@pytest.mark.parametrize(("family", "targets", "rank", "alpha"), CASES)
def test_logits_equal_peft(converted, family, targets, rank, alpha):
    hf, model, variables = converted(family)
    table, renames = FAMILIES[family][0], {}
    if family != "qwen2":
        renames = table.memory_names(model.config)
    inputs = inputs_of(family)
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))
    wrapped = peft.get_peft_model(hf, settings).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
        expected = wrapped(**{k: torch.tensor(v) for k, v in inputs.items()}).logits.numpy()
    lora = adapters_of(wrapped, table.rules(model.config), renames)
    wrapped.unload()
    settings = LoRA(rank, alpha, targets)
    fields = {"lora": settings}
    if family != "qwen2":
        fields["audio_lora"] = settings
    adapted = model.clone(**fields)
    fresh = jax.eval_shape(lambda: table.init(adapted, jax.random.key(0)))
    shapes = jax.tree.map(np.shape, nn.meta.unbox(fresh)["lora"])
    assert jax.tree.map(np.shape, lora) == shapes  # Exactly the layers that peft adapts.
    variables = variables | {"lora": lora}
    found = call(adapted, variables, inputs)
    real = inputs.get("attention_mask", np.ones(inputs["input_ids"].shape)) > 0
    np.testing.assert_allclose(found[real], expected[real], atol=1e-4)
    base = call(model, {"params": variables["params"]}, inputs)
    assert np.abs(found - base)[real].max() > 0.05
    merged = call(model, merge_lora(variables, alpha), inputs)
    np.testing.assert_allclose(merged[real], found[real], atol=1e-4)
