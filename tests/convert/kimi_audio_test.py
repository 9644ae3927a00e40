"""Kimi-Audio's conversion at the released size, and what its table leaves out."""

import functools
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paras2s_jax.convert import kimi_audio as family
from paras2s_jax.convert.rules import ConversionError, check_shapes, import_params
from paras2s_jax.models.kimi_audio import KimiAudio, KimiAudioConfig

# config.json of moonshotai/Kimi-Audio-7B-Instruct, as goldens/kimi_lm/README.md has it; rope_theta
# is not confirmed there and bears on no shape.
RELEASED = {
    "architectures": ["MoonshotKimiaForCausalLM"],
    "vocab_size": 168_448,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 151_643,
    "eos_token_id": [151_644, 151_645],
    "pad_token_id": 152_063,
    "kimia_mimo_layers": 6,
    "kimia_mimo_audiodelaytokens": 6,
    "kimia_mimo_transformer_from_layer_index": 21,
    "kimia_audio_output_vocab": 16_896,
    "kimia_text_output_vocab": 152_064,
    "kimia_token_offset": 152_064,
    "use_whisper_feature": True,
    "kimia_adaptor_input_dim": 5120,
    "kimia_media_begin": 151_661,
    "kimia_media_end": 151_663,
}
# The release's index: tensors and their bytes, in bfloat16 [3p].
NUM_TENSORS, NUM_BYTES = 453, 19_532_673_280


def released_shapes() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the release, from the README's list of keys and sizes."""
    width, hidden, vocab, features = 3584, 18_944, 168_448, 5120
    heads, kv_heads = 28 * 128, 4 * 128
    shapes = {
        "model.embed_tokens.weight": (vocab, width),
        "lm_head.weight": (vocab, width),
        "mimo_output.weight": (vocab, width),
        "model.norm.weight": (width,),
        "model.mimo_norm.weight": (width,),
        "model.vq_adaptor.layers.0.weight": (width, features),
        "model.vq_adaptor.layers.3.weight": (width, width),
    }
    for name in ("0.bias", "3.bias", "4.weight", "4.bias"):
        shapes[f"model.vq_adaptor.layers.{name}"] = (width,)
    layer = {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (heads, width),
        "self_attn.q_proj.bias": (heads,),
        "self_attn.k_proj.weight": (kv_heads, width),
        "self_attn.k_proj.bias": (kv_heads,),
        "self_attn.v_proj.weight": (kv_heads, width),
        "self_attn.v_proj.bias": (kv_heads,),
        "self_attn.o_proj.weight": (width, heads),
        "mlp.gate_proj.weight": (hidden, width),
        "mlp.up_proj.weight": (hidden, width),
        "mlp.down_proj.weight": (width, hidden),
        "self_attn.rotary_emb.inv_freq": (64,),
    }
    for stack, layers in (("layers", 28), ("mimo_layers", 6)):
        for i in range(layers):
            shapes |= {f"model.{stack}.{i}.{key}": shape for key, shape in layer.items()}
    return shapes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("kimi")
    (path / "config.json").write_text(json.dumps(RELEASED))
    return path


def _expected(model: KimiAudio) -> dict:
    shapes = jax.eval_shape(functools.partial(family.init, model), jax.random.key(0))
    return nn.unbox(shapes)["params"]


def test_released_size(folder):
    shapes = released_shapes()
    assert len(shapes) == NUM_TENSORS
    assert sum(2 * math.prod(shape) for shape in shapes.values()) == NUM_BYTES
    model = family.make_model(folder)
    assert model.config == KimiAudioConfig()
    check_shapes(shapes, family.rules(model.config), _expected(model), ignore=family.IGNORE)
    del shapes["model.mimo_layers.5.mlp.up_proj.weight"]
    with pytest.raises(ConversionError, match=r"model\.mimo_layers\.5\.mlp\.up_proj\.weight"):
        check_shapes(shapes, family.rules(model.config), _expected(model), ignore=family.IGNORE)


def test_model_takes_the_types_it_is_given(folder):
    model = family.make_model(folder, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat="full")
    assert model.remat == "full"
    assert {x.dtype for x in jax.tree.leaves(_expected(model))} == {jnp.dtype(jnp.bfloat16)}


def test_a_whisper_inside_is_left_out(folder):
    config = KimiAudioConfig(
        vocab_size=90,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=30,
        pad_token_id=75,
        kimia_mimo_layers=1,
        kimia_mimo_transformer_from_layer_index=0,
        kimia_token_offset=76,
        kimia_adaptor_input_dim=6,
    )
    expected, rules = _expected(KimiAudio(config)), family.rules(config)
    keys = {key for rule in rules for key, _ in rule.pairs()}
    shapes = {key: np.zeros(1) for key in keys}
    shapes["whisper_model.speech_encoder.layers.0.fc1.weight"] = np.zeros(1)
    shapes["whisper.encoder"] = np.zeros(1)
    with pytest.raises(ConversionError, match=r"not used by the model: whisper\.encoder"):
        import_params(shapes, rules, expected, ignore=family.IGNORE)


def test_folder_without_a_vocabulary_has_no_processor(folder):
    assert family.load_processor(folder) is None
