"""The table of wav2vec 2.0: released sizes, both spellings of weight norm, and back again."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from paras2s_jax.convert import folders
from paras2s_jax.convert import wav2vec2 as table
from paras2s_jax.convert.rules import (
    Checkpoint,
    check_shapes,
    export_params,
    import_params,
    write_checkpoint,
)
from tests.models.wav2vec2_test import CONFIGS, SIZES, AgeGenderModel, expected_params

# config.json of facebook/wav2vec2-large-robust where it differs from the defaults, which are
# those of facebook/wav2vec2-base (transformers: Wav2Vec2Config).
LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "conv_bias": True,
}


def old_spelling(key: str) -> str:
    """How checkpoints written before torch 2, as the released ones, spell weight norm."""
    for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
        key = key.replace(f"parametrizations.weight.{new}", old)
    return key


def make_folder(folder, config, architecture, **more):
    values = {**config.to_diff_dict(), "architectures": [architecture], **more}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("spelling", [str, old_spelling])
@pytest.mark.parametrize(
    ("hf_class", "values"),
    [
        # facebook/wav2vec2-base: the encoder, with the heads of its pretraining.
        (transformers.Wav2Vec2ForPreTraining, {}),
        (transformers.Wav2Vec2ForSequenceClassification, LARGE),
        # audeering/wav2vec2-large-robust-24-ft-age-gender and -6-.
        (AgeGenderModel, LARGE),
        (AgeGenderModel, {**LARGE, "num_hidden_layers": 6}),
    ],
)
def test_released_size(tmp_path, hf_class, values, spelling):
    config = transformers.Wav2Vec2Config(**values)
    with torch.device("meta"):
        tensors = hf_class(config).state_dict()
    make_folder(tmp_path, config, hf_class.__name__)
    shapes = {spelling(key): tuple(value.shape) for key, value in tensors.items()}
    key = "wav2vec2.encoder.pos_conv_embed.conv." + spelling("parametrizations.weight.original0")
    write_checkpoint(tmp_path, {key: np.zeros(1, np.float32)})
    model = table.make_model(tmp_path)
    check_shapes(shapes, table.rules(model.config), expected_params(model), ignore=table.IGNORE)


@pytest.mark.parametrize("spelling", [str, old_spelling])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_export_inverts_import(tmp_path, name, dtype, spelling):
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(**{**SIZES, **CONFIGS[name]})
    hf = transformers.Wav2Vec2ForSequenceClassification(config)
    tensors = {spelling(k): v.numpy().astype(dtype) for k, v in hf.state_dict().items()}
    make_folder(tmp_path, config, type(hf).__name__)
    write_checkpoint(tmp_path, tensors)
    model = table.make_model(tmp_path)
    rules = table.rules(model.config)
    params = import_params(Checkpoint(tmp_path), rules, expected_params(model), dtype=dtype)
    back = export_params(params, rules)
    assert set(back) == set(tensors)
    for key, value in tensors.items():
        assert back[key].dtype == value.dtype
        np.testing.assert_array_equal(back[key], value)


def test_old_names_go_there_and_back(tmp_path):
    source, there, back = tmp_path / "source", tmp_path / "there", tmp_path / "back"
    hf = transformers.Wav2Vec2ForSequenceClassification(transformers.Wav2Vec2Config(**SIZES))
    tensors = {old_spelling(key): value.numpy() for key, value in hf.state_dict().items()}
    source.mkdir()
    make_folder(source, hf.config, type(hf).__name__)
    write_checkpoint(source, tensors)
    folders.convert(str(source), str(there))
    folders.export(str(there), str(back))
    exported = Checkpoint(back)
    assert set(exported) == set(tensors)
    for key, value in tensors.items():
        np.testing.assert_array_equal(exported[key], value)
    # transformers reads either spelling.
    again = transformers.Wav2Vec2ForSequenceClassification.from_pretrained(back)
    for key, value in hf.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("architecture", "kind", "prefix"),
    [
        ("Wav2Vec2Model", "Wav2Vec2Model", ""),
        ("Wav2Vec2ForCTC", "Wav2Vec2Model", "wav2vec2."),
        ("Wav2Vec2ForSequenceClassification", "Wav2Vec2ForSequenceClassification", "wav2vec2."),
        ("AgeGenderModel", "AgeGenderModel", "wav2vec2."),
    ],
)
def test_the_config_names_the_class(tmp_path, architecture, kind, prefix):
    labels = {"id2label": {"10": "k", "2": "c", "0": "a"}}
    make_folder(tmp_path, transformers.Wav2Vec2Config(**SIZES), architecture, **labels)
    assert architecture in table.ARCHITECTURES and table.matches(tmp_path)
    model = table.make_model(tmp_path, dtype=ml_dtypes.bfloat16)
    assert type(model).__name__ == kind and model.config.prefix == prefix
    # In the order of the numbers, not of the strings.
    assert model.config.id2label == ("a", "c", "k")
    assert model.config.conv_dim == (12, 14, 10) and model.dtype == ml_dtypes.bfloat16


def test_heads_for_age_and_gender_tell_the_class(tmp_path):
    make_folder(tmp_path, transformers.Wav2Vec2Config(**SIZES), "SomeClassifier")
    write_checkpoint(tmp_path, {"age.out_proj.weight": np.zeros(1, np.float32)})
    model = table.make_model(tmp_path)
    assert type(model).__name__ == "AgeGenderModel" and model.config.prefix == "wav2vec2."


def test_processor(tmp_path):
    assert table.load_processor(tmp_path) is None
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path)
    assert table.load_processor(tmp_path).do_normalize is False
