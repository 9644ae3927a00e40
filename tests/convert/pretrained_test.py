"""from_pretrained: every kind of source, onto one device and onto a mesh."""

import json
import re
import shutil
from pathlib import Path

import flax.linen as nn
import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from paras2s_jax.convert import families, folders, from_pretrained
from paras2s_jax.convert.rules import Checkpoint, ConversionError, export_params
from paras2s_jax.train.sharding import make_mesh

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 5))
RULES = (("vocab", "tensor"), ("embed", "fsdp"), ("mlp", "tensor"), ("heads", "tensor"))


def logits_of(model, params):
    return jax.jit(lambda p, t: model.apply({"params": p}, t)[0])(params, TOKENS)


@pytest.mark.parametrize("shards", [False, True])
def test_a_released_folder(release, shards):
    import torch

    folder, hf = release("qwen2", shards=shards)
    assert (folder / "model.safetensors.index.json").exists() == shards
    model, params, processor = from_pretrained(folder)
    assert isinstance(model, nn.Module) and processor is None
    with torch.no_grad():
        want = hf(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits_of(model, params), want, atol=1e-4)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_import_and_export_are_inverse(release, tmp_path, name):
    folder, _ = release(name)
    model, params, _ = from_pretrained(folder)
    family = families.family_of(folder)
    assert family is families.load(name)
    released = Checkpoint(folder)
    back = export_params(params, family.rules(model.config))
    spare = {key for key in released if any(re.fullmatch(p, key) for p in family.IGNORE)}
    assert set(released) - spare <= set(back) <= set(released)
    folders.convert(str(folder), str(tmp_path / "there"))
    folders.export(str(tmp_path / "there"), str(tmp_path / "back"))
    again = Checkpoint(tmp_path / "back")
    assert set(again) == set(back)
    for key in back:
        want = released[key]
        assert back[key].tobytes() == want.tobytes() == again[key].tobytes()
        assert back[key].dtype == want.dtype == again[key].dtype and back[key].shape == want.shape


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("converted", [False, True])
def test_types(release, tmp_path, dtype, converted):
    folder, _ = release("qwen2")
    if converted:
        folders.convert(str(folder), str(tmp_path / "c"))
        folder = tmp_path / "c"
    model, params, _ = from_pretrained(folder, dtype=dtype)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    assert model.dtype == dtype == model.param_dtype
    model, params, _ = from_pretrained(folder, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    assert model.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("converted", [False, True])
def test_parameters_land_on_their_shards(release, tmp_path, converted):
    folder, _ = release("qwen2")
    model, plain, _ = from_pretrained(folder)
    if converted:
        folders.convert(str(folder), str(tmp_path / "c"))
        folder = tmp_path / "c"
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    _, params, _ = from_pretrained(folder, mesh=mesh, rules=RULES)
    up = params["stack"]["layers"]["mlp"]["up_proj"]["kernel"]  # [layers 3, 24, 40]
    assert up.sharding.spec == P(None, "fsdp", "tensor")
    assert {shard.data.shape for shard in up.addressable_shards} == {(3, 12, 10)}
    # 6 heads of 4: 24 columns over 4; the table of 64 rows over 4.
    assert params["embed_tokens"]["embedding"].sharding.spec == P("tensor", "fsdp")
    jax.tree.map(np.testing.assert_array_equal, params, plain)
    np.testing.assert_allclose(logits_of(model, params), logits_of(model, plain), atol=1e-5)


def test_a_mesh_needs_rules(release):
    with pytest.raises(ValueError, match="go together"):
        from_pretrained(release("qwen2")[0], mesh=jax.make_mesh((8,), ("fsdp",)))


def test_a_hub_id(release, monkeypatch):
    folder, _ = release("qwen2")
    asked = {}

    def download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    from_pretrained("Qwen/Qwen2-tiny")
    assert set(asked) == {"Qwen/Qwen2-tiny"}
    assert "*.safetensors" in asked["Qwen/Qwen2-tiny"]
    assert not {"*.bin", "*.pt", "*.pkl", "*.py"} & set(asked["Qwen/Qwen2-tiny"])


def test_a_hub_that_does_not_answer(monkeypatch):
    def download(name, allow_patterns):
        raise LocalEntryNotFoundError("no connection\nand no copy")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ConversionError, match=r"the hub does not give it \(no connection\); check"):
        from_pretrained("Qwen/none")
    with pytest.raises(FileNotFoundError, match="no such folder, and no hub id"):
        from_pretrained("a/b/c")


@pytest.fixture
def copy(release, tmp_path):
    """A copy of a release that may be spoilt: (folder, its tensors)."""
    folder = tmp_path / "copy"
    shutil.copytree(release("qwen2")[0], folder)
    return folder, load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "config.json is missing"),
        ("{", "is not a config"),
        ("[]", "is not a config"),
        ("{}", "names no architecture, which no family reads"),
        ('{"architectures": ["Qwen2ForCausalLn"]}', "did you mean Qwen2ForCausalLM"),
        ('{"architectures": ["Xyz"]}', r"names Xyz.*known are .*Qwen2ForCausalLM"),
    ],
)
def test_an_unknown_architecture(copy, text, message):
    path = copy[0] / "config.json"
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(ConversionError, match=message):
        from_pretrained(copy[0])


NORM = "model.norm.weight"
MISFITS = [
    (lambda t: t.pop(NORM), f"missing from it: {NORM}"),
    (lambda t: t.update(more=t[NORM]), "not used by the model: more"),
    (lambda t: t.update({NORM: t[NORM][:-1]}), rf"{NORM} is \(23,\), norm/scale needs \(24,\)"),
]


@pytest.mark.parametrize(("spoil", "message"), MISFITS)
def test_a_checkpoint_that_does_not_fit(copy, spoil, message):
    folder, tensors = copy
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConversionError, match=message):
        from_pretrained(folder)
    target = folder.parent / "converted"
    with pytest.raises(ConversionError, match=message):
        folders.convert(str(folder), str(target))
    assert [path.name for path in folder.parent.iterdir()] == ["copy"]


def test_converted_parameters_of_another_config(copy, tmp_path):
    folder, _ = copy
    folders.convert(str(folder), str(tmp_path / "c"))
    path = tmp_path / "c" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 44}))
    message = r"up_proj/kernel is \(3, 24, 40\), the model has \(3, 24, 44\)"
    with pytest.raises(ConversionError, match=message):
        from_pretrained(tmp_path / "c")


def test_every_family_is_listed():
    files = Path(families.__file__).parent.glob("*.py")
    modules = {path.stem for path in files if "\nARCHITECTURES" in path.read_text()}
    assert modules == set(families.FAMILIES)
    flat = [name for module in families.FAMILIES for name in families.load(module).ARCHITECTURES]
    assert len(flat) == len(set(flat))
