"""Qwen2-Audio against transformers, its own padding, and shared prefixes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn

from paras2s_jax.convert import qwen2_audio as table
from paras2s_jax.convert.rules import Checkpoint, import_params
from paras2s_jax.data.audio_chat import num_slots
from paras2s_jax.models.lora import LoRA
from paras2s_jax.models.qwen2_audio import Qwen2AudioConfig, generate, slot_sources

torch.set_num_threads(1)  # Thousands of tiny operations: threads would only wait.

AUDIO = 50  # Id of an audio slot.
VOCAB = 60
NUM_FRAMES = 40
MELS = 10
LENS = np.array([40, 21, 34, 7])  # Two audios per row; 21 frames -> 11 -> 5 slots, 7 -> 4 -> 2.
TEXTS = [[[3, 4], [5], [6, 7, 8]], [[9], [10, 11], [12]]]  # Before, between and after the audios.
# Tower: width, layers, heads, inner. LM: width, layers, heads, key heads, head size, inner.
SIZES = {
    "grouped": ((24, 2, 3, 40), (32, 3, 4, 2, 8, 44)),
    "one key head": ((20, 1, 2, 28), (28, 2, 6, 1, 14, 36)),
    "no groups": ((36, 3, 4, 52), (24, 2, 3, 3, 10, 30)),
}


def test_number_of_slots():
    assert [num_slots(n) for n in (*LENS, 3000)] == [10, 5, 8, 2, 750]


def test_slot_sources_by_hand():
    """Audios of 2, 0 and 3 embeddings; a sixth slot that no audio fills."""
    is_slot = jnp.array([[0, 1, 1, 0, 1, 1, 1, 1]], bool)
    audio, frame, exists = slot_sources(is_slot, jnp.array([[2, 0, 3]]))
    at = np.asarray(is_slot)
    assert audio[at].tolist() == [0, 0, 2, 2, 2, 2]
    assert frame[at][:5].tolist() == [0, 1, 0, 1, 2]
    assert exists[at].tolist() == [True] * 5 + [False]


@functools.cache
def reference(sizes, noise):
    """A transformers model, moved away from its initialisation by noise of that size."""
    (d_model, layers, heads, inner), (width, depth, n, k, head_dim, mlp) = SIZES[sizes]
    audio = {
        "encoder_layers": layers,
        "d_model": d_model,
        "encoder_attention_heads": heads,
        "encoder_ffn_dim": inner,
        "num_mel_bins": MELS,
        "max_source_positions": NUM_FRAMES // 2,
    }
    text = {
        "vocab_size": VOCAB,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": depth,
        "num_attention_heads": n,
        "num_key_value_heads": k,
        "head_dim": head_dim,
        "rope_theta": 5000.0,
        "rms_norm_eps": 1e-5,
    }
    torch.manual_seed(0)
    config = transformers.Qwen2AudioConfig(
        audio_config=audio, text_config=text, audio_token_index=AUDIO
    )
    hf = transformers.Qwen2AudioForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return hf


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """sizes, noise -> (transformers model, ours as converted from its checkpoint, variables)."""

    @functools.cache
    def convert(sizes, noise=0.1):
        hf, folder = reference(sizes, noise), tmp_path_factory.mktemp("released")
        hf.save_pretrained(folder)
        model = table.make_model(folder)
        assert model.config.text.rope_theta == 5000.0
        assert model.config.audio.d_model == SIZES[sizes][0][0]
        boxed = jax.eval_shape(lambda: table.init(model, jax.random.key(0)))
        tensors = Checkpoint(folder / "model.safetensors")
        expected = nn.meta.unbox(boxed)["params"]
        return hf, model, {"params": import_params(tensors, table.rules(model.config), expected)}

    return convert


@pytest.fixture(scope="module")
def released(converted):
    """Ours hears no padding."""
    hf, model, variables = converted("grouped")
    return hf, model.clone(mask_inputs=True), variables


@pytest.fixture(scope="module")
def mel():
    return np.random.default_rng(0).normal(size=(4, NUM_FRAMES, MELS)).astype(np.float32)


def layout(slots, side="right"):
    """ids and mask of TEXTS with slots[row][i] audio slots for each audio, padded on a side."""
    rows = []
    for (before, between, after), (first, second) in zip(TEXTS, slots, strict=True):
        rows.append([*before, *[AUDIO] * first, *between, *[AUDIO] * second, *after])
    width = max(map(len, rows))
    pads = [[0] * (width - len(row)) for row in rows]
    ids = [row + pad if side == "right" else pad + row for row, pad in zip(rows, pads, strict=True)]
    mask = np.arange(width) < np.array([[len(row)] for row in rows])
    return np.array(ids), mask if side == "right" else mask[:, ::-1]


def at_text(values, ids, mask):
    """The values at real text positions, of both rows in turn."""
    return np.asarray(values)[np.asarray(mask) & (ids != AUDIO)]


def reference_inputs(mel, side):
    """Arguments of the reference, each audio with as many slots as it fills."""
    ids, mask = layout(np.array([num_slots(n) for n in LENS]).reshape(2, 2), side)
    assert mask[0].sum() != mask[1].sum()  # One row is padded.
    frames = np.arange(NUM_FRAMES) < LENS[:, None]
    return {
        "input_ids": ids,
        "input_features": mel.transpose(0, 2, 1),
        "attention_mask": mask.astype(np.int64),
        "feature_attention_mask": frames.astype(np.int64),
    }


def as_torch(inputs):
    return {key: torch.tensor(value) for key, value in inputs.items()}


@functools.partial(jax.jit, static_argnums=(0, 3))
def call(model, variables, inputs, emit=()):
    return model.apply(variables, **inputs, emit=emit)


@functools.partial(jax.jit, static_argnums=0)
def hear(model, variables, mel, lens):
    return model.apply(variables, mel, lens, method="audio_embeds")


@functools.partial(jax.jit, static_argnums=0)
def run(model, variables, mel, lens, ids, mask):
    embeds, audio_mask = model.apply(variables, mel, lens, method="audio_embeds")
    embeds = embeds.reshape(len(ids), -1, embeds.shape[-1])
    return model.apply(
        variables,
        ids,
        attention_mask=mask,
        audio_embeds=embeds,
        audio_mask=audio_mask.reshape(len(ids), -1),
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("sizes", SIZES)
def test_called_as_transformers(converted, mel, sizes, side):
    hf, model, variables = converted(sizes)
    inputs = reference_inputs(mel, side)
    with torch.no_grad():
        expected = hf(**as_torch(inputs)).logits.numpy()
    logits, out = call(model, variables, inputs)
    assert logits.shape == (*inputs["input_ids"].shape, VOCAB)
    real = inputs["attention_mask"] > 0
    np.testing.assert_array_equal(out["mask"], real)
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-4)


def test_slots_of_one_size_equal_transformers(converted, mel):
    hf, model, variables = converted("grouped")
    exact = reference_inputs(mel, "right")
    with torch.no_grad():
        expected = hf(**as_torch(exact)).logits
    ids, mask = layout([[10, 10], [10, 10]])
    logits, out = run(model, variables, mel, LENS, ids, mask)
    assert logits.shape == (2, ids.shape[1], VOCAB)
    assert out["mask"].sum(1).tolist() == exact["attention_mask"].sum(1).tolist()
    wanted = at_text(expected, exact["input_ids"], exact["attention_mask"] > 0)
    np.testing.assert_allclose(at_text(logits, ids, mask), wanted, atol=1e-4)


@pytest.mark.parametrize("sizes", SIZES)
def test_generates_as_transformers(converted, mel, sizes):
    hf, model, variables = converted(sizes, noise=0.3)
    inputs = reference_inputs(mel, "left")
    with torch.no_grad():
        expected = hf.generate(
            **as_torch(inputs), max_new_tokens=64, do_sample=False, eos_token_id=None
        )
    found = generate(model, variables, **inputs, max_new_tokens=64, eos_token_ids=())
    np.testing.assert_array_equal(found.tokens, expected[:, -64:])
    # Not one id over and over.
    assert all(len(np.unique(row)) > 8 for row in expected[:, -64:])


def test_generates_from_text_alone(converted):
    hf, model, variables = converted("grouped")
    ids = np.array([[3, 4, 5]])
    mask = np.ones_like(ids)
    with torch.no_grad():
        expected = hf.generate(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
        )
    found = generate(model, variables, ids, attention_mask=mask, max_new_tokens=8, eos_token_ids=())
    np.testing.assert_array_equal(found.tokens, expected[:, -8:])


def test_half_precision_is_near(converted, mel):
    _, model, variables = converted("grouped")
    inputs = reference_inputs(mel, "right")
    full, out = call(model, variables, inputs)
    half, _ = call(model.clone(dtype=jnp.bfloat16), variables, inputs)
    assert half.dtype == jnp.float32
    error = np.asarray(half - full)[np.asarray(out["mask"])]
    size = np.sqrt(np.mean(error**2)) / np.sqrt(np.mean(np.asarray(full) ** 2))
    assert 1e-5 < size < 2e-2


def test_audios_are_given_in_one_way(released, mel):
    _, model, variables = released
    inputs = reference_inputs(mel, "right")
    embeds = jnp.zeros((2, 3, 32))
    with pytest.raises(ValueError, match="give one of"):
        call(model, variables, inputs | {"audio_embeds": embeds})
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        call(model, variables, {})
    logits, _ = call(model, variables, {"inputs_embeds": embeds})
    assert logits.shape == (2, 3, VOCAB)


def test_padded_equals_unpadded(released, mel):
    _, model, variables = released
    ids, mask = layout([[10, 10], [10, 10]])
    logits, _ = run(model, variables, mel, LENS, ids, mask)
    # The second row on its own, each of its audios cut to its length.
    heard = [hear(model, variables, mel[i : i + 1, : LENS[i]], LENS[i : i + 1]) for i in (2, 3)]
    short_ids, short_mask = layout([[10, 5], [8, 2]])
    size = short_mask[1].sum()
    inputs = {
        "input_ids": short_ids[1:, :size],
        "audio_embeds": jnp.concatenate([embeds for embeds, _ in heard], axis=1),
        "audio_mask": jnp.concatenate([real for _, real in heard], axis=1),
    }
    alone, _ = call(model, variables, inputs)
    alone = at_text(alone, short_ids[1:, :size], short_mask[1:, :size])
    np.testing.assert_allclose(at_text(logits[1:], ids[1:], mask[1:]), alone, atol=1e-5)


def test_shared_prefix_equals_full_rows(released, mel):
    """Two prompts (text and query), two answers each: the prompt is run once."""
    _, model, variables = released
    both = np.concatenate([mel[:2], mel])
    heard, real = hear(model, variables, both, np.array([40, 21, 40, 13, 34, 8]))
    query, answer = {"audio_embeds": heard[:2], "audio_mask": real[:2]}, heard[2:]
    head = np.tile([3, 4, *[AUDIO] * 10, 5], (2, 1))
    tail = np.tile([6, *[AUDIO] * 10, 7, 8], (4, 1))
    _, shared = call(model, variables, {"input_ids": head, **query}, ("kv",))
    inputs = {"input_ids": tail, "audio_embeds": answer, "audio_mask": real[2:]}
    prefix = {"prefix": shared["kv"], "prefix_mask": shared["mask"]}
    logits, _ = call(model, variables, inputs | prefix)
    twice = lambda x: jnp.repeat(x, 2, axis=0)
    inputs = {
        "input_ids": np.concatenate([twice(head), tail], axis=1),
        "audio_embeds": jnp.stack([twice(heard[:2]), answer], axis=1),
        "audio_mask": jnp.stack([twice(real[:2]), real[2:]], axis=1),
    }
    full, _ = call(model, variables, inputs)
    np.testing.assert_allclose(logits[:, -2:], full[:, -2:], atol=1e-5)


def test_adapters_of_both_parts(released, mel):
    _, model, variables = released
    targets = ("q_proj", "v_proj")
    adapted = model.clone(lora=LoRA(rank=2, targets=targets), audio_lora=LoRA(2, 4.0, targets))
    ids, mask = layout([[10, 10], [10, 10]])
    init = jax.jit(functools.partial(adapted.init, method="init_all"))
    lora = nn.meta.unbox(init(jax.random.key(0), mel[:2], ids[:, :12]))["lora"]
    assert lora["audio_tower"]["layers"]["self_attn"]["q_proj"]["a"].shape == (2, 24, 2)
    plain, _ = run(model, variables, mel, LENS, ids, mask)
    same, _ = run(adapted, {**variables, "lora": lora}, mel, LENS, ids, mask)
    np.testing.assert_allclose(same, plain, atol=1e-6)

    def loss(lora):
        return jnp.mean(run(adapted, {**variables, "lora": lora}, mel, LENS, ids, mask)[0] ** 2)

    gradient = jax.jit(jax.grad(loss))(lora)
    for part in ("audio_tower", "language_model"):
        b = [
            x
            for path, x in jax.tree_util.tree_leaves_with_path(gradient[part])
            if path[-1].key == "b"
        ]
        assert len(b) == 2 and all(np.abs(x).max() > 0 for x in b)


def test_config_without_audio_part_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"text_config": {}}')
    with pytest.raises(ValueError, match="audio_config"):
        Qwen2AudioConfig.from_json(path)
    path.write_text('{"text_config": {}, "audio_config": {"d_model": 8}}')
    config = Qwen2AudioConfig.from_json(path)
    # The defaults that the released 7B config leaves out (its text_config states the rest).
    assert (config.audio.d_model, config.audio.num_mel_bins) == (8, 128)
    assert (config.text.hidden_size, config.text.rope_theta) == (4096, 10_000.0)
