"""LoRA adapters: read by peft, written by peft, and folded in."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import traverse_util

from paras2s_jax.convert import adapters, families, folders, from_pretrained
from paras2s_jax.convert.rules import ConversionError
from paras2s_jax.convert.stored import load_params, save_params
from paras2s_jax.models.lora import LoRA, merge_lora
from paras2s_jax.models.placement import unbox

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 5))
LORA = LoRA(rank=3, alpha=12.0, targets=("q_proj", "v_proj", "down_proj"))


@pytest.fixture(scope="module")
def trained(release, tmp_path_factory):
    """(converted folder with trained adapters, model, variables)."""
    folder = tmp_path_factory.mktemp("lora") / "trained"
    folders.convert(str(release("qwen2")[0]), str(folder))
    model, params, _ = from_pretrained(folder)
    model = model.clone(lora=LORA)
    lora = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), TOKENS))["lora"]
    keys = iter(jax.random.split(jax.random.key(1), 99))
    lora = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), lora)
    variables = {"params": params, "lora": lora}
    save_params(folder / "params", variables, {"lora": {"alpha": LORA.alpha}})
    return folder, model, variables


def hf_logits(hf) -> np.ndarray:
    with torch.no_grad():
        return hf(torch.tensor(TOKENS)).logits.numpy()


def test_peft_reads_the_adapter(release, trained, tmp_path):
    folder, model, variables = trained
    folders.export(str(folder), str(tmp_path / "adapter"), lora="adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    base = transformers.Qwen2ForCausalLM.from_pretrained(release("qwen2")[0])
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    want, _ = jax.jit(model.apply)(variables, TOKENS)
    np.testing.assert_allclose(hf_logits(adapted), want, atol=1e-4)
    # The adapter does something.
    assert np.abs(hf_logits(release("qwen2")[1]) - want).max() > 1e-2


def test_what_peft_writes_is_read(release, trained, tmp_path):
    _, model, variables = trained
    base = transformers.Qwen2ForCausalLM.from_pretrained(release("qwen2")[0])
    config = peft.LoraConfig(
        r=LORA.rank,
        lora_alpha=5,
        target_modules=list(LORA.targets),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(base, config).eval()
    adapted.save_pretrained(tmp_path)
    rules = families.load("qwen2").rules(model.config)
    lora, alpha = adapters.read_adapter(tmp_path, rules, variables["lora"])
    assert alpha == 5
    model = model.clone(lora=LoRA(LORA.rank, alpha, LORA.targets))
    got, _ = jax.jit(model.apply)({"params": variables["params"], "lora": lora}, TOKENS)
    np.testing.assert_allclose(got, hf_logits(adapted), atol=1e-4)


def test_an_adapter_comes_back_bit_by_bit(trained, tmp_path):
    folder, model, variables = trained
    folders.export(str(folder), str(tmp_path / "adapter"), lora="adapter")
    rules = families.load("qwen2").rules(model.config)
    lora, alpha = adapters.read_adapter(tmp_path / "adapter", rules, variables["lora"])
    assert alpha == LORA.alpha
    jax.tree.map(np.testing.assert_array_equal, lora, variables["lora"])


def test_merged_weights_are_plain_ones(trained, tmp_path):
    folder, _, variables = trained
    folders.export(str(folder), str(tmp_path / "merged"))
    _, got, _ = from_pretrained(tmp_path / "merged")
    want = merge_lora(variables, LORA.alpha)["params"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)
    assert not np.allclose(
        got["stack"]["layers"]["mlp"]["down_proj"]["kernel"],
        variables["params"]["stack"]["layers"]["mlp"]["down_proj"]["kernel"],
    )


def test_adapters_that_cannot_be_written(release, trained, tmp_path):
    _, _, variables = trained
    folders.convert(str(release("qwen2")[0]), str(tmp_path / "plain"))
    with pytest.raises(ConversionError, match="has no adapters to write"):
        folders.export(str(tmp_path / "plain"), str(tmp_path / "x"), lora="adapter")
    _, meta = load_params(tmp_path / "plain" / "params")
    save_params(tmp_path / "plain" / "params", variables, meta)
    with pytest.raises(ConversionError, match="does not tell the alpha of its adapters"):
        folders.export(str(tmp_path / "plain"), str(tmp_path / "x"), lora="adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_adapters_that_cannot_be_read(trained, tmp_path):
    folder, model, variables = trained
    rules = families.load("qwen2").rules(model.config)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json: no such file"):
        adapters.read_adapter(tmp_path, rules, variables["lora"])
    folders.export(str(folder), str(tmp_path / "a"), lora="adapter")
    path = tmp_path / "a" / "adapter_config.json"
    text = path.read_text()
    path.write_text(text.replace('"bias"', '"use_dora": true, "bias"'))
    with pytest.raises(ConversionError, match="only plain LoRA"):
        adapters.read_adapter(tmp_path / "a", rules, variables["lora"])
    path.write_text("{}")
    with pytest.raises(ConversionError, match="is not an adapter's config"):
        adapters.read_adapter(tmp_path / "a", rules, variables["lora"])
    path.write_text(text)
    flat = traverse_util.flatten_dict(variables["lora"])
    fewer = traverse_util.unflatten_dict({k: v for k, v in flat.items() if "q_proj" not in k})
    with pytest.raises(ConversionError, match="not used by the model: base_model"):
        adapters.read_adapter(tmp_path / "a", rules, fewer)


def test_an_adapter_of_no_kernel():
    with pytest.raises(ConversionError, match="adapters without a kernel: x"):
        adapters.merged({"y/kernel": np.ones(1)}, {"x/a": np.ones(1), "x/b": np.ones(1)}, 1.0)


def peft_modules(model) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(A, B) of every adapted module."""
    return {
        name: tuple(x["default"].weight.detach().numpy() for x in (layer.lora_A, layer.lora_B))
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("qwen2_audio", ("q_proj", "out_proj", "fc2", "linear", "lm_head")),
        ("qwen2_5_omni", ("k_proj", "v_proj", "fc1", "down_proj", "lm_head")),
    ],
)
def test_models_whose_modules_are_called_otherwise_in_memory(release, tmp_path, name, targets):
    folder, _ = release(name)
    family = families.load(name)
    base = getattr(transformers, family.ARCHITECTURES[-1]).from_pretrained(folder)
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=list(targets), init_lora_weights=False,
        exclude_modules=r".*visual.*",
    )  # fmt: skip
    adapted = peft.get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "peft")
    want = peft_modules(adapted)
    model, params, _ = from_pretrained(folder)
    model = model.clone(lora=LoRA(2, 3.0, targets), audio_lora=LoRA(2, 3.0, targets))
    boxed = families.abstract_variables(family, model)["lora"]
    rules, renames = family.rules(model.config), family.memory_names(model.config)
    lora, alpha = adapters.read_adapter(tmp_path / "peft", rules, unbox(boxed), renames)
    # And back: peft finds every module and tensor again.
    folders.convert(str(folder), str(tmp_path / "c"))
    save_params(tmp_path / "c" / "params", {"params": params, "lora": lora}, {"lora": {"alpha": 3}})
    folders.export(str(tmp_path / "c"), str(tmp_path / "a"), lora="adapter")
    base = getattr(transformers, family.ARCHITECTURES[-1]).from_pretrained(folder)
    got = peft_modules(peft.PeftModel.from_pretrained(base, tmp_path / "a"))
    assert alpha == 3 and got.keys() == want.keys() and len(got) > 5
    for key, parts in want.items():
        for a, b in zip(got[key], parts, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=key)


def test_adapters_of_a_whole_omni_are_those_of_its_thinker(release, tmp_path):
    """The release has keys "thinker.…"; adapters are made and read for the thinker alone."""
    family = families.load("qwen2_5_omni")
    alone = family.make_model(release("qwen2_5_omni")[0]).clone(lora=LORA, audio_lora=LORA)
    whole = dataclasses.replace(alone.config, is_whole=True)
    shapes = unbox(families.abstract_variables(family, alone)["lora"])
    rng = np.random.default_rng(0)
    lora = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    flat = traverse_util.flatten_dict(lora, sep="/")
    files = []
    for name, config in (("alone", alone.config), ("whole", whole)):
        rules, renames = family.rules(config), family.memory_names(config)
        adapters.write_adapter(
            tmp_path / name, flat, rules, alpha=4.0, base="omni", renames=renames
        )
        files.append([path.read_bytes() for path in sorted((tmp_path / name).iterdir())])
        back, _ = adapters.read_adapter(tmp_path / "alone", rules, shapes, renames)
        jax.tree.map(np.testing.assert_array_equal, back, lora)
    assert files[0] == files[1]
