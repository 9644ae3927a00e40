"""Checkpoints of Qwen2-Audio: the released size, and files that come back bit by bit."""

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

from paras2s_jax.convert import qwen2_audio
from paras2s_jax.convert.rules import Checkpoint, check_shapes, export_params, import_params

# Qwen2-Audio-7B-Instruct's config.json; what it leaves out are the defaults of transformers.
RELEASED_TEXT = {
    "model_type": "qwen2",
    "vocab_size": 156_032,
    "intermediate_size": 11_008,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
}
SMALL_AUDIO = {
    "d_model": 24,
    "encoder_layers": 2,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 40,
    "num_mel_bins": 10,
    "max_source_positions": 20,
}
SMALL_TEXT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _expected(model):
    shapes = jax.eval_shape(lambda: qwen2_audio.init(model, jax.random.key(0)))
    return nn.meta.unbox(shapes)["params"]


def test_released_size(tmp_path):
    with torch.device("meta"):
        config = transformers.Qwen2AudioConfig(text_config=RELEASED_TEXT)
        hf = transformers.Qwen2AudioForConditionalGeneration(config)
    config.save_pretrained(tmp_path)
    model = qwen2_audio.make_model(tmp_path)
    # The names in checkpoints, which are not those in memory.
    state = revert_weight_conversion(hf, hf.state_dict())
    assert "language_model.model.layers.31.self_attn.q_proj.weight" in state
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    expected = _expected(model)
    check_shapes(shapes, qwen2_audio.rules(model.config), expected, ignore=qwen2_audio.IGNORE)
    # "8.4B" on the model's page.
    assert round(sum(leaf.size for leaf in jax.tree.leaves(expected)) / 1e9, 1) == 8.4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_import_and_export_give_back_every_bit(tmp_path, dtype):
    torch.manual_seed(0)
    config = transformers.Qwen2AudioConfig(
        audio_config=SMALL_AUDIO, text_config=SMALL_TEXT, audio_token_index=60
    )
    hf = transformers.Qwen2AudioForConditionalGeneration(config).to(dtype)
    hf.save_pretrained(tmp_path)
    model, tensors = qwen2_audio.make_model(tmp_path), Checkpoint(tmp_path)
    assert model.config.audio_token_index == 60
    kept = np.float32 if dtype == torch.float32 else ml_dtypes.bfloat16
    rules = qwen2_audio.rules(model.config)
    params = import_params(tensors, rules, _expected(model), dtype=kept)
    back = export_params(params, rules)
    assert set(back) == set(tensors)
    for key, value in back.items():
        assert value.dtype == tensors[key].dtype
        np.testing.assert_array_equal(value.view(np.uint8), tensors[key].view(np.uint8), key)
