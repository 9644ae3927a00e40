"""Whisper's tables at released sizes, both ways, and its processor without torch."""

import dataclasses
import functools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn
from safetensors.numpy import load_file

from paras2s_jax.convert import whisper, whisper_classifier
from paras2s_jax.convert.rules import check_shapes, export_params, import_params
from tests.models.whisper_pairs import CONFIGS, hf_config

# openai/whisper-large-v3.
LARGE_V3 = {
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "decoder_layers": 32,
    "decoder_attention_heads": 20,
    "decoder_ffn_dim": 5120,
    "num_mel_bins": 128,
    "vocab_size": 51_866,
    "max_source_positions": 1500,
    "max_target_positions": 448,
    "pad_token_id": 50_256,
    "bos_token_id": 50_257,
    "eos_token_id": 50_257,
    "decoder_start_token_id": 50_258,
}
FAMILIES = {
    whisper: transformers.WhisperForConditionalGeneration,
    whisper_classifier: transformers.WhisperForAudioClassification,
}


def expected_of(family, model):
    variables = jax.eval_shape(functools.partial(family.init, model), jax.random.key(0))
    return nn.unbox(variables)["params"]


@pytest.mark.parametrize("family", FAMILIES)
def test_released_size(family, tmp_path):
    config = transformers.WhisperConfig(**LARGE_V3)
    with torch.device("meta"):
        reference = FAMILIES[family](config)
    shapes = {key: tuple(value.shape) for key, value in reference.state_dict().items()}
    config.architectures = [FAMILIES[family].__name__]
    assert tuple(config.architectures) == family.ARCHITECTURES
    config.save_pretrained(tmp_path)
    model = family.make_model(tmp_path)
    # The released sizes: 1.54 billion numbers in the recogniser, the tied head counted once.
    if family is whisper:
        total = sum(np.prod(shape) for key, shape in shapes.items() if "proj_out" not in key)
        assert total == 1_543_490_560
    rules = family.rules(model.config)
    check_shapes(shapes, rules, expected_of(family, model), ignore=family.IGNORE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", CONFIGS)
def test_import_and_export_are_bitwise(family, config, tmp_path):
    reference = FAMILIES[family](hf_config(config, num_labels=3))
    reference.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    model = family.make_model(tmp_path)
    assert model.config == config
    assert getattr(model, "num_labels", 3) == 3
    rules = family.rules(model.config)
    params = import_params(tensors, rules, expected_of(family, model), ignore=family.IGNORE)
    exported = export_params(params, rules)
    assert set(exported) == set(tensors)
    assert all(np.array_equal(exported[key], tensors[key]) for key in tensors)


def test_unknown_settings_are_named(tmp_path):
    path = tmp_path / "config.json"
    values = dataclasses.asdict(CONFIGS[0])
    path.write_text(json.dumps(values | {"use_weighted_layer_sum": True}))
    with pytest.raises(ValueError, match=r"config\.json: use_weighted_layer_sum True"):
        whisper_classifier.make_model(tmp_path)
    path.write_text(json.dumps(values | {"decoder_layers": 0}))
    with pytest.raises(ValueError, match="decoder_layers"):
        whisper.make_model(tmp_path)
    del values["d_model"]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="d_model"):
        whisper.make_model(tmp_path)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A folder with an extractor and a byte-level vocabulary with control tokens."""
    folder = tmp_path_factory.mktemp("processor")
    transformers.WhisperFeatureExtractor(feature_size=20).save_pretrained(folder)
    letters = {chr(code): code - 97 for code in range(97, 123)}
    vocab = letters | {"he": 26, "<|endoftext|>": 27}
    transformers.WhisperTokenizer(vocab=vocab, merges=[("h", "e")]).save_pretrained(folder)
    return folder


def test_processor_works_without_torch(words):
    """In a process where torch cannot be imported: extractor and vocabulary."""
    program = f"""
import sys
sys.modules["torch"] = None
import numpy as np
from paras2s_jax.convert import whisper
processor = whisper.load_processor({str(words)!r})
wave = np.sin(np.arange(8000) / 5).astype(np.float32)
features = processor(wave, sampling_rate=16_000, return_tensors="np").input_features
print(features.shape, float(np.abs(features).max()) > 0, processor.tokenizer.decode([26, 0]))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[-2] == "(1, 20, 3000) True hea"


def test_processor_is_what_the_folder_has(tmp_path):
    assert whisper.load_processor(tmp_path) is None
    transformers.WhisperFeatureExtractor(feature_size=20).save_pretrained(tmp_path)
    assert whisper.load_processor(tmp_path).feature_size == 20
