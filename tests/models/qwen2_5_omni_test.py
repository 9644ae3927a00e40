"""Qwen2.5-Omni's thinker against transformers, its own padding, and as the reward model."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn

from paras2s_jax.convert import qwen2_5_omni as table
from paras2s_jax.convert.rules import Checkpoint, import_params
from paras2s_jax.data.audio_chat import num_slots
from paras2s_jax.models.qwen2_5_omni import OmniAudioEncoder, Qwen2_5OmniConfig
from paras2s_jax.models.qwen2_audio import generate

torch.set_num_threads(1)  # Thousands of tiny operations: threads would only wait.

AUDIO, START, END = 50, 51, 52
VOCAB = 60
NUM_FRAMES = 37
MELS = 10
# Three audios in two rows; with windows of 10: several, one frame over, and less than one window.
LENS = np.array([37, 11, 7])
# Tower: width, layers, heads, inner, half a window. LM: width, layers, heads, key heads, inner.
# Head sizes: 8, 10, 14; rotary sections that sum to half of them.
SIZES = {
    "grouped": ((24, 2, 3, 40, 5), (32, 3, 4, 2, 44), (1, 2, 1)),
    "one key head": ((20, 1, 2, 28, 8), (60, 2, 6, 1, 36), (2, 2, 1)),
    "no groups": ((36, 2, 4, 52, 3), (42, 2, 3, 3, 30), (1, 2, 2, 1, 1)),
}


@functools.cache
def reference(sizes, noise):
    """A transformers thinker, moved away from its initialisation by noise of that size."""
    (d_model, layers, heads, inner, window), (width, depth, n, k, mlp), sections = SIZES[sizes]
    audio = {
        "encoder_layers": layers,
        "d_model": d_model,
        "encoder_attention_heads": heads,
        "encoder_ffn_dim": inner,
        "num_mel_bins": MELS,
        "max_source_positions": 30,
        "n_window": window,
        "output_dim": width,
    }
    rope = {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": list(sections)}
    text = {
        "vocab_size": VOCAB,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": depth,
        "num_attention_heads": n,
        "num_key_value_heads": k,
        "rope_parameters": rope,
        "rms_norm_eps": 1e-5,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 12,
        "num_heads": 2,
        "out_hidden_size": width,
        "fullatt_block_indexes": [0],
    }
    torch.manual_seed(0)
    config = transformers.models.qwen2_5_omni.Qwen2_5OmniThinkerConfig(
        audio_config=audio,
        text_config=text,
        vision_config=vision,
        audio_token_index=AUDIO,
        audio_start_token_id=START,
        audio_end_token_id=END,
        image_token_index=53,
        video_token_index=54,
        vision_start_token_id=55,  # get_rope_index asks for it.
    )
    hf = transformers.Qwen2_5OmniThinkerForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return hf


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """sizes, noise -> (transformers model, ours as converted from its checkpoint, variables)."""

    @functools.cache
    def convert(sizes, noise=0.1):
        hf, folder = reference(sizes, noise), tmp_path_factory.mktemp("thinker")
        hf.save_pretrained(folder)
        model = table.make_model(folder)
        assert model.config.text.rope_theta == 5000.0
        assert model.config.text.mrope_section == SIZES[sizes][2]
        boxed = jax.eval_shape(lambda: table.init(model, jax.random.key(0)))
        params = import_params(
            Checkpoint(folder / "model.safetensors"),
            table.rules(model.config),
            nn.meta.unbox(boxed)["params"],
            ignore=table.IGNORE,
        )
        return hf, model, {"params": params}

    return convert


@pytest.fixture(scope="module")
def mel():
    return np.random.default_rng(0).normal(size=(3, NUM_FRAMES, MELS)).astype(np.float32)


def reference_inputs(mel, side):
    """Two rows: two audios and one, each with as many slots as it fills."""
    heard = [[START, *[AUDIO] * num_slots(n), END] for n in LENS]
    rows = [[3, 4, *heard[0], 5, *heard[1], 6, 7, 8], [9, *heard[2], 10, 11]]
    width = max(map(len, rows))
    mask = np.arange(width) < np.array([[len(row)] for row in rows])
    ids = np.zeros((2, width), np.int64)
    if side == "left":
        mask = mask[:, ::-1].copy()
    ids[mask] = np.concatenate(rows)
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
def encode(model, variables, mel, mask):
    tower = OmniAudioEncoder(model.config.audio)
    return tower.apply({"params": variables["params"]["audio_tower"]}, mel, mask)


@pytest.mark.parametrize("sizes", SIZES)
def test_tower_equals_transformers(converted, mel, sizes):
    hf, model, variables = converted(sizes)
    frames = np.arange(NUM_FRAMES) < LENS[:, None]
    packed = torch.tensor(mel[frames]).T
    with torch.no_grad():
        expected = hf.model.audio_tower(packed, feature_lens=torch.tensor(LENS)).last_hidden_state
    encoded, out = encode(model, variables, mel, frames)
    assert out["mask"].sum(1).tolist() == [num_slots(n) for n in LENS]
    np.testing.assert_allclose(encoded[out["mask"]], expected, atol=1e-4)
    assert not np.any(np.asarray(encoded)[~np.asarray(out["mask"])])


def test_tower_hears_no_padding(converted, mel):
    _, model, variables = converted("grouped")
    noisy = np.pad(mel, ((0, 0), (0, 25), (0, 0)), constant_values=3.0)
    padded, _ = encode(model, variables, noisy, np.arange(noisy.shape[1]) < LENS[:, None])
    for row, size in enumerate(LENS):
        alone, _ = encode(model, variables, mel[row : row + 1, :size], np.ones((1, size), bool))
        assert alone.shape[1] == num_slots(size)
        np.testing.assert_allclose(padded[row, : alone.shape[1]], alone[0], atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("sizes", SIZES)
def test_called_as_transformers(converted, mel, sizes, side):
    hf, model, variables = converted(sizes)
    inputs = reference_inputs(mel, side)
    with torch.no_grad():
        expected = hf(**as_torch(inputs)).logits.numpy()
    logits, out = call(model, variables, inputs)
    real = inputs["attention_mask"] > 0
    np.testing.assert_array_equal(out["mask"], real)
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-4)


@pytest.mark.parametrize("sizes", ["grouped", "no groups"])
def test_positions_on_three_axes(converted, mel, sizes):
    hf, model, variables = converted(sizes)
    inputs = reference_inputs(mel, "right")
    shape = (3, *inputs["input_ids"].shape)
    inputs["position_ids"] = np.random.default_rng(1).integers(0, 90, shape)
    with torch.no_grad():
        expected = hf(**as_torch(inputs)).logits.numpy()
    logits, _ = call(model, variables, inputs)
    real = inputs["attention_mask"] > 0
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-4)
    inputs["position_ids"] = inputs["position_ids"][::-1].copy()
    other, _ = call(model, variables, inputs)
    assert np.abs(other - logits)[real].max() > 1e-2


def test_positions_are_those_of_get_rope_index(converted, mel):
    hf, model, variables = converted("grouped")
    inputs = reference_inputs(mel, "left")
    given, _ = hf.get_rope_index(
        torch.tensor(inputs["input_ids"]),
        attention_mask=torch.tensor(inputs["attention_mask"]),
        audio_seqlens=torch.tensor(LENS),
    )
    own, _ = call(model, variables, inputs)
    same, _ = call(model, variables, inputs | {"position_ids": given.numpy()})
    real = inputs["attention_mask"] > 0
    np.testing.assert_allclose(own[real], same[real], atol=1e-5)


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


def test_half_precision_is_near(converted, mel):
    _, model, variables = converted("grouped")
    inputs = reference_inputs(mel, "right")
    full, out = call(model, variables, inputs)
    half, _ = call(model.clone(dtype=jnp.bfloat16), variables, inputs)
    assert half.dtype == jnp.float32
    error = np.asarray(half - full)[np.asarray(out["mask"])]
    size = np.sqrt(np.mean(error**2)) / np.sqrt(np.mean(np.asarray(full) ** 2))
    assert 1e-5 < size < 2e-2


@functools.partial(jax.jit, static_argnums=0)
def hear(model, variables, mel, lens):
    return model.apply(variables, mel, lens, method="audio_embeds")


def test_shared_prefix_equals_full_rows(converted, mel):
    """One query, two answers to it, all in slots of one size."""
    _, model, variables = converted("grouped")
    heard, mask = hear(model, variables, mel, LENS)
    size = num_slots(NUM_FRAMES)
    head = np.array([[3, START, *[AUDIO] * size, END]])
    tail = np.tile([START, *[AUDIO] * size, END, 4, 5], (2, 1))
    query = {"input_ids": head, "audio_embeds": heard[:1], "audio_mask": mask[:1]}
    _, shared = call(model, variables, query, ("kv",))
    answers = {"input_ids": tail, "audio_embeds": heard[1:], "audio_mask": mask[1:]}
    prefix = {"prefix": shared["kv"], "prefix_mask": shared["mask"]}
    logits, _ = call(model, variables, answers | prefix)
    first = np.array([0, 0])
    inputs = {
        "input_ids": np.concatenate([head[first], tail], axis=1),
        "audio_embeds": jnp.stack([heard[first], heard[1:]], axis=1),
        "audio_mask": jnp.stack([mask[first], mask[1:]], axis=1),
    }
    full, _ = call(model, variables, inputs)
    np.testing.assert_allclose(logits[:, -2:], full[:, -2:], atol=1e-5)


def test_config_of_other_models_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"thinker_config": {"text_config": {}}}')
    with pytest.raises(ValueError, match="audio_config"):
        Qwen2_5OmniConfig.from_json(path)
    path.write_text('{"audio_config": {"output_dim": 8}, "text_config": {}}')
    with pytest.raises(ValueError, match=r"output_dim 8 is not text_config\.hidden_size 3584"):
        Qwen2_5OmniConfig.from_json(path)


def test_config_as_released(tmp_path):
    """Where transformers 4 wrote the rotary settings, with much that has no field here."""
    rope = {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}
    text = {
        "model_type": "qwen2_5_omni_text",
        "hidden_act": "silu",
        "rope_scaling": rope,
        "rope_theta": 500_000.0,
        "max_window_layers": 28,
        "sliding_window": 32_768,
        "use_sliding_window": False,
    }
    thinker = {"audio_config": {"n_window": 50}, "text_config": text, "audio_token_index": 7}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"thinker_config": thinker, "talker_config": {}}))
    config = Qwen2_5OmniConfig.from_json(path)
    assert config.is_whole and config.audio_token_index == 7
    assert (config.audio.n_window, config.audio.d_model, config.audio.output_dim) == (
        50,
        1280,
        3584,
    )
    assert (config.text.rope_theta, config.text.mrope_section) == (500_000.0, (16, 24, 24))
    assert (config.text.num_hidden_layers, config.text.vocab_size) == (28, 152_064)
    assert not config.text.tie_word_embeddings and config.text.attention_bias
