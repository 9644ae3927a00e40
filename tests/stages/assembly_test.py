"""One assembly for packaged parts and for released checkpoints, and its outline without weights."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from paras2s_jax.models.placement import unbox
from paras2s_jax.stages import assembly, kimi
from paras2s_jax.stages.registry import StageError
from paras2s_jax.train.sharding import Layouts


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), unbox(tree))


@pytest.fixture
def small(load_config, converted):
    """The 7B config on the small release, on one device."""
    c = load_config("kimi_audio_7b")
    c.mesh = c.decode_mesh = {"data": 1, "fsdp": 1, "tensor": 1}
    c.policy.checkpoint = str(converted)
    sizes = json.loads((converted / "config.json").read_text())
    c.policy.model = {name: sizes[name] for name in c.policy.model}
    return c


def test_an_outline_has_the_shapes_of_what_is_assembled(small):
    made, outlined = assembly.assemble(small, Path()), assembly.outline(small, Layouts())
    assert outlined.policy == made.policy
    boxed = made.policy.boxed_frontend(outlined.frontend)
    assert shapes(boxed) == shapes(made.frontend)
    assert shapes(made.load(made.base)) == shapes(made.policy.boxed())


def test_the_outline_of_the_release_needs_no_files(load_config):
    """9.77B parameters of the policy (performance.md), 1.5B of the detokenizer's network."""
    c = load_config("kimi_audio_7b")
    c.policy.checkpoint = "no/such/folder"
    outlined = assembly.outline(c, Layouts())
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(unbox(outlined.policy.boxed())))
    assert 9.7e9 < count < 9.8e9
    boxed = unbox(outlined.policy.boxed_frontend(outlined.frontend))
    dit = sum(math.prod(x.shape) for x in jax.tree.leaves(boxed.detokenizer.dit_params))
    assert 1.5e9 < dit < 1.7e9
    # Codes are decisions: the speech tokenizer stays in float32.
    assert {str(x.dtype) for x in jax.tree.leaves(boxed.speech_tokenizer)} == {"float32"}
    assert {str(x.dtype) for x in jax.tree.leaves(boxed.encoder)} == {"bfloat16"}


def test_the_released_sizes_fit_together():
    vocabulary = type("V", (), {"special_tokens": {"<|im_kimia_text_blank|>": 151_666}})()
    kimi.check_fit(Path("release"), kimi.RELEASED, vocabulary)


def test_layers_that_a_plan_leaves_out(load_config):
    c = load_config("kimi_audio_7b")
    c.policy.checkpoint = "no/such/folder"
    c.policy.model.num_hidden_layers, c.policy.model.kimia_mimo_layers = 4, 1
    c.policy.model.kimia_mimo_transformer_from_layer_index = 2
    sizes = assembly.outline(c, Layouts()).policy.model.config.stack_sizes
    assert sizes == {"trunk": 3, "text_tail": 1, "audio_tail": 1}


def test_packaged_parts(load_config):
    c = load_config("tiny")
    made, outlined = assembly.assemble(c, Path()), assembly.outline(c, Layouts())
    assert outlined.policy == made.policy and made.base is None
    assert shapes(outlined.frontend) == shapes(made.frontend)
    assert made.layouts == Layouts()


@pytest.mark.parametrize(
    ("trainable", "rank", "trains"), [("", 0, True), ("^lora/", 4, False), ("lora|norm", 4, True)]
)
def test_whether_parameters_are_trained(small, trainable, rank, trains):
    small.policy.trainable, small.policy.lora.rank = trainable, rank
    assert assembly.outline(small, Layouts()).trains_params == trains


def test_frozen_weights_compute_the_same_to_the_bit(small):
    """Masters in float32, kernels and embeddings of the frozen copy in bfloat16."""
    made = assembly.outline(small, Layouts())
    model = made.policy.model
    assert (model.dtype, model.param_dtype) == ("bfloat16", "float32")
    variables = made.load(made.base)
    ids = np.arange(12).reshape(2, 6)
    frozen = made.frozen(variables)
    dtypes = {str(x.dtype) for x in jax.tree.leaves(frozen)}
    assert dtypes == {"bfloat16", "float32"}
    apply = jax.jit(lambda variables: model.apply(variables, ids, ids)[0])
    for own, copy in zip(apply(variables), apply(frozen), strict=True):
        np.testing.assert_array_equal(own, copy)
    assert shapes(made.frozen(jax.eval_shape(lambda: variables))) == shapes(frozen)
    # Nothing is copied where nothing changes.
    pairs = zip(jax.tree.leaves(made.frozen(frozen)), jax.tree.leaves(frozen), strict=True)
    assert all(a is b for a, b in pairs)


def test_another_model_than_the_config_says(small):
    small.policy.model.num_hidden_layers = 5
    with pytest.raises(StageError, match=r"config\.policy\.model\.num_hidden_layers is 5, that of"):
        assembly.assemble(small, Path())


def test_a_digest_changes_with_any_file(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("x")
    before = assembly.folder_digest(tmp_path)
    assert before == assembly.folder_digest(tmp_path)
    (tmp_path / "a" / "b").write_text("xy")
    assert assembly.folder_digest(tmp_path) != before


def test_one_process_answers_on_its_own_devices(load_config, monkeypatch):
    c = load_config("tiny")
    assert assembly.own_layouts(c) == Layouts()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    mesh = assembly.own_layouts(c).decode.mesh
    assert mesh.shape["tensor"] == mesh.size == len(jax.local_devices())


def test_layouts_of_a_config(load_config):
    c = load_config("tiny")
    c.mesh = {"data": 2, "fsdp": 4, "tensor": 1}
    c.decode_mesh = {"data": 1, "fsdp": 1, "tensor": 8}
    layouts = assembly.layouts_of(c)
    assert dict(layouts.train.mesh.shape) == c.mesh.to_dict()
    assert dict(layouts.decode.mesh.shape) == c.decode_mesh.to_dict()
    np.testing.assert_array_equal(
        layouts.train.mesh.devices.ravel(), layouts.decode.mesh.devices.ravel()
    )
