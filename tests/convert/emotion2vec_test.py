"""The table of emotion2vec: released sizes, back again, and config files that do not fit."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
import yaml

from paras2s_jax.convert import emotion2vec as table
from paras2s_jax.convert import folders, from_pretrained
from paras2s_jax.convert.rules import (
    Checkpoint,
    ConversionError,
    check_shapes,
    export_params,
    import_params,
    write_checkpoint,
)
from tests.models.emotion2vec_test import CASES, GOLDENS, expected_params


@pytest.mark.parametrize("name", ["plus_base", "plus_large"])
def test_released_size(tmp_path, name):
    # Names and shapes come from funasr's class (tests/goldens/emotion2vec/make.py).
    shutil.copy(GOLDENS / name / "config.yaml", tmp_path)
    (tmp_path / "tokens.txt").write_text("".join(f"label_{i}\n" for i in range(9)))
    write_checkpoint(tmp_path, {"d2v_model.any": np.zeros(1, np.float32)})
    model = table.make_model(tmp_path)
    shapes = json.loads((GOLDENS / name / "shapes.json").read_text())
    assert any("decoder" in key for key in shapes)
    check_shapes(shapes, table.rules(model.config), expected_params(model), ignore=table.IGNORE)
    assert model.config.embed_dim == {"plus_base": 768, "plus_large": 1024}[name]


@pytest.mark.parametrize("name", CASES)
def test_export_inverts_import(name):
    assert table.matches(GOLDENS / name)
    model = table.make_model(GOLDENS / name)
    tensors, rules = Checkpoint(GOLDENS / name), table.rules(model.config)
    back = export_params(import_params(tensors, rules, expected_params(model)), rules)
    assert set(back) == set(tensors)
    for key, value in tensors.items():
        np.testing.assert_array_equal(back[key], value)


def test_torch_file_goes_there_and_back(tmp_path):
    source, there, back = tmp_path / "source", tmp_path / "there", tmp_path / "back"
    source.mkdir()
    for file in ("config.yaml", "tokens.txt"):
        shutil.copy(GOLDENS / "base" / file, source)
    tensors = dict(Checkpoint(GOLDENS / "base"))
    decoder = {"d2v_model.modality_encoders.AUDIO.decoder.proj.bias": np.ones(3, np.float32)}
    state = {key: torch.tensor(value) for key, value in {**tensors, **decoder}.items()}
    torch.save({"model": state, "epoch": 3}, source / "model.pt")
    folders.convert(str(source), str(there))
    model, params, processor = from_pretrained(there)
    assert model.config.prefix == "d2v_model." and len(processor.labels) == 9
    wave = np.load(GOLDENS / "base" / "io.npz")["2/wave"]
    logits, _ = jax.jit(model.apply)({"params": params}, **processor([wave]))
    want = np.load(GOLDENS / "base" / "io.npz")["2/logits"]
    np.testing.assert_allclose(logits[0], want, atol=1e-4)
    folders.export(str(there), str(back))
    exported = Checkpoint(back)
    assert set(exported) == set(tensors)
    for key, value in tensors.items():
        np.testing.assert_array_equal(exported[key], value)


def test_head_without_its_labels_is_told(tmp_path):
    for file in ("config.yaml", "model.safetensors"):
        shutil.copy(GOLDENS / "base" / file, tmp_path)
    model = table.make_model(tmp_path)
    with pytest.raises(ConversionError, match=r"not used by the model: proj\.bias, proj\.weight"):
        import_params(Checkpoint(tmp_path), table.rules(model.config), expected_params(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_norm_first": True}, "layer_norm_first True is not supported"),
        ({"extractor_mode": "other"}, "extractor_mode must be one of layer_norm, default"),
        ({"feature_encoder_spec": "__import__('os')"}, "is no list of"),
        ({"embed_dim": None}, "keys missing from model_conf: embed_dim"),
    ],
)
def test_config_that_does_not_fit_is_refused(tmp_path, change, message):
    whole = yaml.safe_load((GOLDENS / "base" / "config.yaml").read_text())
    conf = whole["model_conf"]
    for key, value in change.items():
        place = conf["modalities"]["audio"] if key in conf["modalities"]["audio"] else conf
        if value is None:
            del place[key]
        else:
            place[key] = value
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(whole))
    with pytest.raises(ValueError, match=message):
        table.make_model(tmp_path)


def test_other_configs_do_not_match(tmp_path):
    assert not table.matches(tmp_path)
    (tmp_path / "config.yaml").write_text("model: Paraformer\n")
    assert not table.matches(tmp_path)
    with pytest.raises(ValueError, match="give an emotion2vec folder"):
        table.make_model(tmp_path)
