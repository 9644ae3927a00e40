"""Kimi-Audio's flow-matching network: the table against the released sizes, and its folder."""

import json

import jax
import numpy as np
import pytest
import torch
import yaml

from paras2s_jax.convert import families, flow_matching, folders, from_pretrained
from paras2s_jax.convert.rules import Checkpoint, ConversionError, check_shapes
from paras2s_jax.models.placement import unbox

# Sizes of the release as tests/goldens/kimi_detokenizer_dit/README.md reports them.
DIT = {
    "input_size": 80,
    "semantic_vocab_size": 16_384,
    "hidden_size": 2304,
    "depth": 16,
    "num_heads": 18,
    "mlp_ratio": 4.0,
    "ffn_type": "vanilla_mlp",
    "use_rope": True,
    "rope_params": {
        "max_position_embeddings": 4096,
        "rope_base": 10_000.0,
        "rope_interpolation_factor": 1.0,
    },
    "position_embedding_type": "skip",
    "max_seq_len": 4096,
}
RELEASED = {
    "model": {"dit": DIT},
    "normalize_mel": True,
    "mel_mean": -4.479605,
    "mel_std": 3.4584913,
    # What the release's config names besides, and its inference ignores.
    "ode_steps": 150,
    "cfg_scale": 2.0,
}


def released_shapes() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the release: one line for each kind of layer in the README."""
    wide = 2304
    linears = {
        "input_linear": (wide, 80),
        "t_embedder.mlp.0": (wide, 256),
        "t_embedder.mlp.2": (wide, wide),
        "final_layer.linear": (80, wide),
        "final_layer.adaLN_modulation.1": (4608, wide),
    }
    for i in range(16):
        linears |= {
            f"blocks.{i}.attn.qkv": (6912, wide),
            f"blocks.{i}.attn.proj": (wide, wide),
            f"blocks.{i}.mlp.fc1": (9216, wide),
            f"blocks.{i}.mlp.fc2": (wide, 9216),
            f"blocks.{i}.adaLN_modulation.1": (13_824, wide),
        }
    shapes = {"speech_model.semantic_token_embedding.weight": (16_385, wide)}
    for name, shape in linears.items():
        shapes[f"speech_model.{name}.weight"] = shape
        shapes[f"speech_model.{name}.bias"] = shape[:1]
    return shapes


def test_released_size(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(RELEASED))
    assert families.family_of(tmp_path) is flow_matching
    model = flow_matching.make_model(tmp_path)
    expected = unbox(families.abstract_variables(flow_matching, model))["params"]
    shapes = released_shapes()
    rules = flow_matching.rules(model.config)
    check_shapes(shapes, rules, expected, ignore=flow_matching.IGNORE)
    # 16 blocks of 18 matrices of 2304 x 2304 are 1.53 billion parameters.
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(expected))
    assert count == sum(int(np.prod(shape)) for shape in shapes.values())
    assert 1.53e9 < count < 1.61e9
    with pytest.raises(ConversionError, match=r"not used by the model: speech_model\.guide"):
        check_shapes(shapes | {"speech_model.guide": (1,)}, rules, expected)


def test_the_released_pt_file(release, tmp_path):
    """config.yaml and a .pt with the tensors under "state_dict", beside those of other modules."""
    folder, _ = release("flow_matching")
    source = tmp_path / "audio_detokenizer"
    source.mkdir()
    (source / "config.yaml").write_bytes((folder / "config.yaml").read_bytes())
    tensors = {key: torch.tensor(value) for key, value in Checkpoint(folder).items()}
    other = {"teacher.weight": torch.zeros(2)}
    torch.save({"state_dict": tensors | other}, source / "model.pt")
    folders.convert(str(source), str(tmp_path / "converted"))
    _, params, _ = from_pretrained(tmp_path / "converted")
    jax.tree.map(np.testing.assert_array_equal, params, from_pretrained(folder)[1])
    folders.export(str(tmp_path / "converted"), str(tmp_path / "back"))
    back = Checkpoint(tmp_path / "back")
    assert set(back) == set(tensors)
    assert all(back[key].tobytes() == Checkpoint(folder)[key].tobytes() for key in back)


def test_other_folders_are_not_mistaken(tmp_path):
    assert not flow_matching.matches(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"model": "Emotion2vec"}))
    assert not flow_matching.matches(tmp_path)
    path.write_text("a: [")
    with pytest.raises(ConversionError, match=r"config\.yaml is not YAML"):
        flow_matching.matches(tmp_path)
