import functools
import json

import jax
import numpy as np
import pytest
from flax import linen as nn

from paras2s_jax.convert import from_pretrained
from paras2s_jax.convert import speech_tokenizer as family
from paras2s_jax.convert.rules import Checkpoint, ConversionError, check_shapes
from tests.models.speech_tokenizer_test import GOLDENS, shapes_of

# glm-4-voice-tokenizer, as the fixture's README gives it; 16 of the 32 layers are built.
RELEASED = {
    "architectures": ["WhisperVQEncoder"],
    "d_model": 1280,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "encoder_layers": 32,
    "num_mel_bins": 128,
    "max_source_positions": 1500,
    "pooling_kernel_size": 4,
    "pooling_type": "avg",
    "pooling_position": 16,
    "quantize_position": 16,
    "quantize_vocab_size": 16_384,
    "quantize_causal_block_size": 200,
    "quantize_encoder_only": True,
    "encoder_causal_convolution": True,
    "encoder_causal_attention": False,
}


def test_released_size(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    model = family.make_model(tmp_path)
    variables = jax.eval_shape(functools.partial(family.init, model), jax.random.key(0))
    expected = nn.unbox(variables)["params"]
    shapes = shapes_of(model.config)
    # 16 layers of 4 projections, 2 norms, 2 feed-forward maps: 15 tensors each; 9 others.
    assert len(shapes) == 16 * 15 + 9
    assert shapes["embed_positions2.weight"] == (375, 1280)
    check = functools.partial(
        check_shapes, rules=family.rules(model.config), expected=expected, ignore=family.IGNORE
    )
    check(shapes)
    with pytest.raises(ConversionError, match=r"layers\.16\.fc1\.bias"):
        check(shapes | {"layers.16.fc1.bias": (5120,)})
    with pytest.raises(ConversionError, match=r"codebook\.weight"):
        check(shapes | {"codebook.weight": (16_384, 1281)})


def test_restatement_of_the_keys_is_that_of_the_fixture():
    """`shapes_of`, on which the above rests, gives the fixture's keys and shapes."""
    found = Checkpoint(GOLDENS / "model.safetensors")
    shapes = {key: tuple(found[key].shape) for key in found}
    assert shapes_of(family.make_model(GOLDENS).config) == shapes


def test_released_folder_gives_the_fixtures_codes():
    model, params, processor = from_pretrained(GOLDENS)
    io = np.load(GOLDENS / "io.npz")
    codes, _ = jax.jit(model.apply)({"params": params}, io["direct/input_features"])
    np.testing.assert_array_equal(codes, io["direct/codes"])
    assert processor is None


def test_extractor_is_the_releases_own(tmp_path):
    assert family.load_processor(tmp_path) is None
    extractor = json.loads((GOLDENS / "config.json").read_text())["feature_extractor"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(extractor))
    assert family.load_processor(tmp_path).feature_size == 128
