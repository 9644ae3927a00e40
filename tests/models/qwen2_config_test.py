"""What a config.json may leave out, and what stops with a reason."""

import json

import pytest

from paras2s_jax.models.layers import RopeScaling
from paras2s_jax.models.qwen2_config import Qwen2Config

SIZES = {
    "vocab_size": 32,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _read(tmp_path, **values) -> Qwen2Config:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    return Qwen2Config.from_json(path)


def test_rotary_settings_of_old_and_new_files(tmp_path):
    old = _read(tmp_path, **SIZES, model_type="llama", rope_theta=5e5, rope_scaling=LLAMA3)
    new = _read(tmp_path, **SIZES, model_type="llama", rope_parameters=LLAMA3 | {"rope_theta": 5e5})
    assert old == new
    assert old.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192) and old.rope_theta == 5e5
    assert not old.attention_bias and old.num_key_value_heads == 3 and old.width_per_head == 4


def test_silent_qwen2_file(tmp_path):
    config = _read(tmp_path, **SIZES, model_type="qwen2", num_key_value_heads=1, head_dim=None)
    assert config.attention_bias and not config.tie_word_embeddings
    assert (config.rope_theta, config.rope_scaling, config.num_key_value_heads) == (1e4, None, 1)


def test_part_of_a_file_takes_the_class_defaults():
    config = Qwen2Config.from_dict({"model_type": "qwen2", "intermediate_size": 11_008})
    assert (config.hidden_size, config.intermediate_size) == (4096, 11_008)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model_type": "qwen2", "hidden_size": None}, "num_hidden_layers, num_attention_heads"),
        (SIZES | {"model_type": "gemma"}, "model_type is 'gemma'"),
        (SIZES | {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (SIZES | {"use_sliding_window": True, "max_window_layers": 1}, "sliding-window"),
        (SIZES | {"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        (SIZES | {"model_type": "llama", "attention_bias": True}, "attention_bias"),
        (SIZES | {"model_type": "llama", "mlp_bias": True}, "mlp_bias"),
        (SIZES | {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        (SIZES | {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_what_the_model_lacks_is_named(tmp_path, values, reason):
    with pytest.raises(ValueError, match=reason) as error:
        _read(tmp_path, **values)
    assert "config.json" in str(error.value)


def test_window_past_the_last_layer_is_no_window(tmp_path):
    # Qwen2.5's files have max_window_layers = num_hidden_layers.
    _read(tmp_path, **SIZES, use_sliding_window=True, max_window_layers=2)
