"""Folders of trained models: whole, and as adapters on what they were trained from."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from paras2s_jax.convert import folders, from_pretrained, trained
from paras2s_jax.convert.checkpoint import Checkpoint, ConversionError
from paras2s_jax.convert.pretrained import load_variables
from paras2s_jax.models.lora import LoRA, merge_lora
from paras2s_jax.train.sharding import make_mesh

LORA = LoRA(rank=4, alpha=12.0, targets=("q_proj", "v_proj", "down_proj"))
META = {"lora": {"alpha": LORA.alpha}}
RULES = (("vocab", "tensor"), ("embed", "fsdp"), ("mlp", "tensor"), ("heads", "tensor"))
assert_equal = np.testing.assert_array_equal


@pytest.fixture(scope="module")
def base(release, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "base"
    folders.convert(str(release("qwen2")[0]), str(folder))
    (folder / "vocoder").mkdir()
    (folder / "vocoder" / "file").write_text("another network")
    return folder


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory):
    """(folder of trained adapters, the model with adapters, its variables)."""
    model = from_pretrained(base)[0].clone(lora=LORA)
    variables = load_variables(base, model)
    keys = iter(jax.random.split(jax.random.key(1), 99))
    noise = jax.tree.map(lambda x: 0.3 * jax.random.normal(next(keys), x.shape), variables["lora"])
    variables = variables | {"lora": jax.tree.map(lambda a, b: a + b, variables["lora"], noise)}
    folder = tmp_path_factory.mktemp("adapted") / "policy"
    trained.lay_out(folder, base=base, keeps_params=True)
    trained.save(folder, variables, META, keeps_params=True)
    return folder, model, variables


def equal(a, b):
    jax.tree.map(assert_equal, a, b)


def test_a_fully_trained_model_is_read_like_any_other(base, tmp_path):
    params = jax.tree.map(lambda x: x + 1, from_pretrained(base)[1])
    folder = tmp_path / "policy"
    trained.lay_out(folder, base=base)
    trained.save(folder, {"params": params}, {})
    equal(from_pretrained(folder)[1], params)
    assert (folder / "vocoder" / "file").read_text() == "another network"
    assert not (folder / "params").is_symlink()
    folders.export(str(folder), str(tmp_path / "out"))
    exported = Checkpoint(tmp_path / "out")["model.norm.weight"]
    assert_equal(exported, params["norm"]["scale"])


def test_a_model_without_a_base_has_the_config_it_is_given(base, tmp_path):
    config = {"architectures": ["Qwen2ForCausalLM"]}
    model, params, _ = from_pretrained(base)
    trained.lay_out(tmp_path, config=config | dataclasses.asdict(model.config))
    trained.save(tmp_path, {"params": params}, {})
    again, back, _ = from_pretrained(tmp_path)
    assert again == model
    equal(back, params)


def test_adapters_go_on_being_trained(base, adapted):
    folder, model, variables = adapted
    assert (folder / "params").is_symlink()
    found = load_variables(folder, model)
    equal(found, variables)
    fresh = load_variables(base, model)
    equal(fresh["params"], variables["params"])
    assert all(not np.any(x) for path, x in _flat(fresh["lora"]) if path.endswith("b"))


def test_adapters_are_folded_in_where_the_model_has_none(adapted, tmp_path):
    folder, _, variables = adapted
    want = merge_lora(variables, LORA.alpha)["params"]
    _, got, _ = from_pretrained(folder)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)
    kernel = got["stack"]["layers"]["mlp"]["down_proj"]["kernel"]
    assert not np.allclose(
        kernel, variables["params"]["stack"]["layers"]["mlp"]["down_proj"]["kernel"]
    )
    folders.export(str(folder), str(tmp_path / "merged"))
    _, got, _ = from_pretrained(tmp_path / "merged")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)
    folders.export(str(folder), str(tmp_path / "adapter"), lora="adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_all_of_it_lands_on_a_mesh(adapted):
    folder, model, variables = adapted
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    found = load_variables(folder, model, mesh=mesh, rules=RULES)
    equal(found, variables)
    assert all(isinstance(x.sharding, NamedSharding) for x in jax.tree.leaves(found))
    kernel = found["params"]["stack"]["layers"]["mlp"]["down_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    _, folded, _ = from_pretrained(folder, mesh=mesh, rules=RULES)
    want = merge_lora(variables, LORA.alpha)["params"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), folded, want)
    assert folded["stack"]["layers"]["mlp"]["down_proj"]["kernel"].sharding == kernel.sharding


def test_what_a_folder_links_to_is_never_written_to(base, adapted, tmp_path):
    """First adapters alone, then, in the same folder, everything."""
    _, _, variables = adapted
    folder = tmp_path / "policy"
    trained.lay_out(folder, base=base, keeps_params=True)
    trained.save(folder, variables, META, keeps_params=True)
    params = jax.tree.map(lambda x: x + 1, variables["params"])
    trained.lay_out(folder, base=base)
    trained.save(folder, {"params": params}, {})
    equal(from_pretrained(folder)[1], params)
    equal(from_pretrained(base)[1], variables["params"])


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (LoRA(5, 12.0, LORA.targets), r"a is \(3, 24, 4\), the model has \(3, 24, 5\)"),
        (LoRA(4, 12.0, ("q_proj",)), "the model has none"),
        (LoRA(4, 8.0, LORA.targets), "alpha is 12, the model has 8"),
    ],
)
def test_other_adapters_are_refused(adapted, other, named):
    folder, model, _ = adapted
    with pytest.raises(ConversionError, match=named) as error:
        load_variables(folder, model.clone(lora=other))
    assert str(folder / "adapter") in str(error.value)


def test_adapters_beside_trained_parameters(base, adapted, tmp_path):
    """Both were trained: both are saved."""
    _, model, variables = adapted
    params = jax.tree.map(lambda x: x + 1, variables["params"])
    trained.lay_out(tmp_path, base=base)
    trained.save(tmp_path, variables | {"params": params}, META)
    equal(load_variables(tmp_path, model), {"params": params, "lora": variables["lora"]})


def _flat(tree):
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
