"""Checkpoints of Qwen2.5-Omni: the released size, and files that come back bit by bit."""

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion
from transformers.models import qwen2_5_omni as reference

from paras2s_jax.convert import qwen2_5_omni
from paras2s_jax.convert.rules import Checkpoint, check_shapes, export_params, import_params

SMALL = {
    "audio_config": {
        "d_model": 24,
        "encoder_layers": 2,
        "encoder_attention_heads": 3,
        "encoder_ffn_dim": 40,
        "num_mel_bins": 10,
        "n_window": 5,
        "output_dim": 32,
    },
    "text_config": {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 700.0,
            "mrope_section": [1, 2, 1],
        },
    },
    "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 12,
        "num_heads": 2,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [0],
    },
    "audio_token_index": 60,
}


def _expected(model):
    shapes = jax.eval_shape(lambda: qwen2_5_omni.init(model, jax.random.key(0)))
    return nn.meta.unbox(shapes)["params"]


def test_released_size(tmp_path):
    """The defaults of transformers are Qwen2.5-Omni-7B's config, talker and vocoder included."""
    with torch.device("meta"):
        config = reference.Qwen2_5OmniConfig()
        hf = transformers.Qwen2_5OmniForConditionalGeneration(config)
    config.save_pretrained(tmp_path)
    model = qwen2_5_omni.make_model(tmp_path)
    audio, text = model.config.audio, model.config.text
    assert (audio.d_model, audio.output_dim, audio.n_window) == (1280, 3584, 100)
    assert (text.num_hidden_layers, text.hidden_size, text.intermediate_size) == (28, 3584, 18_944)
    assert (text.num_attention_heads, text.num_key_value_heads) == (28, 4)
    assert (text.vocab_size, text.mrope_section) == (152_064, (16, 24, 24))
    # The names in checkpoints, which are not those in memory.
    state = revert_weight_conversion(hf, hf.state_dict())
    for part in ("thinker.model.layers.27.mlp.up_proj", "talker.model", "token2wav"):
        assert any(key.startswith(part) for key in state)
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    rules = qwen2_5_omni.rules(model.config)
    check_shapes(shapes, rules, _expected(model), ignore=qwen2_5_omni.IGNORE)


@pytest.mark.parametrize("prefix", ["", "thinker."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_import_and_export_give_back_every_bit(tmp_path, dtype, prefix):
    torch.manual_seed(0)
    thinker = reference.Qwen2_5OmniThinkerConfig(**SMALL)
    hf = transformers.Qwen2_5OmniThinkerForConditionalGeneration(thinker).to(dtype)
    hf.save_pretrained(tmp_path)
    if prefix:
        reference.Qwen2_5OmniConfig(thinker_config=SMALL).save_pretrained(tmp_path)
    model = qwen2_5_omni.make_model(tmp_path)
    assert model.config.audio_token_index == 60 and model.config.audio.n_window == 5
    assert (model.config.text.rope_theta, model.config.text.mrope_section) == (700.0, (1, 2, 1))
    tensors = {f"{prefix}{key}": value for key, value in Checkpoint(tmp_path).items()}
    kept = np.float32 if dtype == torch.float32 else ml_dtypes.bfloat16
    rules = qwen2_5_omni.rules(model.config)
    params = import_params(tensors, rules, _expected(model), ignore=qwen2_5_omni.IGNORE, dtype=kept)
    back = export_params(params, rules)
    heard = {key for key in tensors if not key.startswith(f"{prefix}visual.")}
    assert set(back) == heard
    for key, value in back.items():
        assert value.dtype == tensors[key].dtype
        np.testing.assert_array_equal(value.view(np.uint8), tensors[key].view(np.uint8), key)
