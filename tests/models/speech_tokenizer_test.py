"""Whisper-VQ against the GLM-4-Voice fixture, a restatement in torch, and its own padding."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.audio.mel import mel_filters, whisper_log_mel
from paras2s_jax.convert import speech_tokenizer as family
from paras2s_jax.convert.rules import Checkpoint, export_params, import_params
from paras2s_jax.models import speech_tokenizer as st

GOLDENS = Path(__file__).parents[1] / "goldens" / "glm4_voice_tokenizer"


def load(model, tensors) -> dict:
    shapes = nn.unbox(jax.eval_shape(functools.partial(family.init, model), jax.random.key(0)))
    rules = family.rules(model.config)
    return {"params": import_params(tensors, rules, shapes["params"], ignore=family.IGNORE)}


@pytest.fixture(scope="module")
def released():
    model = family.make_model(GOLDENS)
    variables = load(model, Checkpoint(GOLDENS / "model.safetensors"))
    apply = jax.jit(model.apply, static_argnames="emit")
    return model, variables, apply, np.load(GOLDENS / "io.npz")


@jax.jit
def encode(tokenizer, waves, lens):
    return tokenizer.encode(waves, lens)


CASES = {"exact": [25_600], "ragged": [24_485], "batch2": [20_000, 11_000]}


@pytest.mark.parametrize("case", [*CASES, "direct"])
def test_states_equal_the_reference(released, case):
    _, variables, apply, io = released
    features = io[f"{case}/input_features"]
    mask = np.ones((len(features), features.shape[2]), int)
    if f"{case}/attention_mask" in io:
        mask = io[f"{case}/attention_mask"]
    codes, out = apply(variables, features, mask, emit=("layer_out",))
    np.testing.assert_array_equal(codes, io[f"{case}/codes"].reshape(codes.shape))
    found = {"conv2": out["conv2"], "layer0": out["layer_out"][0]}
    found |= {name: out[name] for name in ("pre_pool", "pooled", "last_hidden", "token_mask")}
    compared = 0
    for name, value in found.items():
        if f"{case}/{name}" in io:
            wanted = io[f"{case}/{name}"]
            # Some are stored as channels before frames.
            if wanted.shape != value.shape:
                wanted = wanted.swapaxes(1, 2)
            np.testing.assert_allclose(value, wanted, atol=2e-5, err_msg=name)
            compared += 1
    assert compared >= 2
    plain, _ = apply(variables, features)
    if mask.all():
        np.testing.assert_array_equal(plain, codes)


@pytest.mark.parametrize("case", CASES)
def test_codes_of_waves_equal_the_reference(released, case):
    model, variables, _, io = released
    lens = np.array(CASES[case], np.int32)
    # Noise behind the end must not be heard.
    waves = np.full((len(lens), lens.max() + 700), 0.9, np.float32)
    for row, size in enumerate(lens):
        waves[row, :size] = io[f"{case}/wave{row}"].ravel()
    codes, len_codes = encode(st.WhisperVQTokenizer(variables, model), waves, lens)
    assert codes.shape[1] == -(-waves.shape[1] // 1280)
    for row, size in enumerate(lens):
        wanted = io[f"{case}/codes{row}"].ravel()
        assert len_codes[row] == len(wanted) == -(-size // 1280)
        np.testing.assert_array_equal(codes[row, : len(wanted)], wanted)
        assert not codes[row, len(wanted) :].any()


@pytest.mark.parametrize("case", CASES)
def test_features_and_masks_equal_the_reference(released, case):
    io = released[3]
    lens = CASES[case]
    size = -(-max(lens) // 1280) * 1280
    waves = np.zeros((len(lens), size), np.float32)
    for row, length in enumerate(lens):
        waves[row, :length] = io[f"{case}/wave{row}"].ravel()
    wanted = io[f"{case}/input_features"]
    log_mel = jax.jit(whisper_log_mel, static_argnames=("n_mels", "mirror_ends"))
    mel, _ = log_mel(waves, None, 128)
    np.testing.assert_allclose(mel.swapaxes(1, 2), wanted, atol=1e-4)
    mirrored, len_frames = log_mel(waves, np.full(len(lens), size), 128, mirror_ends=True)
    assert len_frames.tolist() == [size // 160] * len(lens)
    np.testing.assert_allclose(mirrored, mel, atol=1e-6)
    is_real = 160 * np.arange(size // 160) < np.array(lens)[:, None]
    np.testing.assert_array_equal(is_real, io[f"{case}/attention_mask"].astype(bool))
    np.testing.assert_allclose(mel_filters(16_000, 400, 128), io["mel_filters"], atol=1e-7)


def test_block_causal_mask_equals_the_reference(released):
    io = released[3]
    wanted = io["mask/block_causal_40"].astype(bool)
    mask = io["batch2/attention_mask"].astype(bool)[:, ::2]
    visible = st.block_causal(jnp.asarray(mask), 40)
    np.testing.assert_array_equal(visible, wanted.reshape(visible.shape))
    # By hand: blocks of 2, the last frame is padding.
    small = st.block_causal(jnp.array([[True, True, True, False]]), 2)
    wanted = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    np.testing.assert_array_equal(small[0], np.array(wanted, bool))


CONFIG = st.SpeechTokenizerConfig(
    d_model=20,
    encoder_attention_heads=2,
    encoder_ffn_dim=28,
    quantize_position=2,
    quantize_vocab_size=37,
    quantize_causal_block_size=11,
    num_mel_bins=80,
)
CONFIGS = (
    CONFIG,
    dataclasses.replace(
        CONFIG, d_model=30, encoder_attention_heads=5, encoder_ffn_dim=16, quantize_position=1,
        quantize_vocab_size=50, quantize_causal_block_size=200, num_mel_bins=128,
    ),
    dataclasses.replace(
        CONFIG, d_model=12, encoder_attention_heads=1, encoder_ffn_dim=40, quantize_position=3,
        quantize_vocab_size=9, quantize_causal_block_size=4,
    ),
)  # fmt: skip


def shapes_of(config: st.SpeechTokenizerConfig) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a released checkpoint."""
    d, ffn, taps = config.d_model, config.encoder_ffn_dim, 3
    shapes = {
        "conv1.weight": (d, config.num_mel_bins, taps),
        "conv1.bias": (d,),
        "conv2.weight": (d, d, taps),
        "conv2.bias": (d,),
        "embed_positions.weight": (config.max_source_positions, d),
        "embed_positions2.weight": (config.max_source_positions // 4, d),
        "codebook.weight": (config.quantize_vocab_size, d),
        "ema_count": (config.quantize_vocab_size,),
        "ema_weight": (config.quantize_vocab_size, d),
    }
    for i in range(config.quantize_position):
        layer = f"layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{layer}.self_attn.{name}.weight"] = (d, d)
            if name != "k_proj":
                shapes[f"{layer}.self_attn.{name}.bias"] = (d,)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"{layer}.{name}.{part}": (d,) for part in ("weight", "bias")}
        shapes |= {f"{layer}.fc1.weight": (ffn, d), f"{layer}.fc1.bias": (ffn,)}
        shapes |= {f"{layer}.fc2.weight": (d, ffn), f"{layer}.fc2.bias": (d,)}
    return shapes


def sound(length: int, seed: int) -> np.ndarray:
    """Noise whose colour and level change every 0.1 s: float32[length]."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=length)
    parts = -(-length // 1600)
    colour, level = rng.uniform(-0.9, 0.9, parts), 10 ** rng.uniform(-3, -1, parts)
    tilted = noise + np.repeat(colour, 1600)[:length] * np.roll(noise, 1)
    return (np.repeat(level, 1600)[:length] * tilted).astype(np.float32)


def random_tensors(config, seed: int) -> dict[str, np.ndarray]:
    """Far from any start; the codebook is made of the model's own states, so all of it is used."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for key, shape in shapes_of(config).items():
        tensors[key] = (0.25 * rng.normal(size=shape)).astype(np.float32)
        if "layer_norm.weight" in key:
            tensors[key] += 1
    _, pooled, _, _ = restated(config, tensors, [sound(3 * 16_000, seed)])
    chosen = rng.choice(pooled.shape[1], config.quantize_vocab_size)
    noise = 0.02 * rng.normal(size=tensors["codebook.weight"].shape)
    tensors["codebook.weight"] = (pooled[0, chosen] + noise).astype(np.float32)
    return tensors


def restated(config, tensors, waves):
    """Codes and pooled states of waves together, from the fixture's README, in float64 torch."""
    extract = transformers.WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    inputs = extract(
        waves,
        sampling_rate=16_000,
        return_tensors="pt",
        padding="longest",
        pad_to_multiple_of=1280,
        return_attention_mask=True,
    )
    w = {key: torch.tensor(value).double() for key, value in tensors.items()}
    F = torch.nn.functional
    x = inputs.input_features.double()
    x = F.gelu(F.conv1d(F.pad(x, (2, 0)), w["conv1.weight"], w["conv1.bias"]))
    x = F.gelu(F.conv1d(F.pad(x, (2, 0)), w["conv2.weight"], w["conv2.bias"], stride=2))
    x = x.transpose(1, 2)
    frames, d, heads = x.shape[1], config.d_model, config.encoder_attention_heads
    x = x + w["embed_positions.weight"][:frames]
    at = torch.arange(frames)
    seen = (at[None] <= at[:, None]) | (
        at[None] // config.quantize_causal_block_size
        == at[:, None] // config.quantize_causal_block_size
    )
    mask = inputs.attention_mask[:, ::2].bool()
    seen = seen[None, None] & mask[:, None, None]
    for i in range(config.quantize_position):

        def part(name, y, i=i):
            bias = w.get(f"layers.{i}.{name}.bias")
            return F.linear(y, w[f"layers.{i}.{name}.weight"], bias)

        def norm(name, y, i=i):
            return F.layer_norm(
                y, (d,), w[f"layers.{i}.{name}.weight"], w[f"layers.{i}.{name}.bias"]
            )

        y = norm("self_attn_layer_norm", x)
        q, k, v = (
            part(f"self_attn.{name}_proj", y).view(len(y), frames, heads, -1).transpose(1, 2)
            for name in "qkv"
        )
        scores = (q @ k.transpose(2, 3)) * (d // heads) ** -0.5
        scores = scores.masked_fill(~seen, torch.finfo(torch.float32).min)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(len(y), frames, d)
        x = x + part("self_attn.out_proj", y)
        y = norm("final_layer_norm", x)
        x = x + part("fc2", F.gelu(part("fc1", y)))
    pooled = F.avg_pool1d(F.pad(x.transpose(1, 2), (0, -frames % 4)), 4).transpose(1, 2)
    squared = (pooled[:, :, None] - w["codebook.weight"]).square().sum(-1)
    return squared.argmin(-1).numpy(), pooled.numpy(), mask[:, ::4].numpy(), squared


@pytest.mark.parametrize("config", CONFIGS)
def test_random_models_equal_a_restatement(config):
    tensors = random_tensors(config, seed=3)
    model = st.WhisperVQEncoder(config)
    variables = load(model, tensors)
    lens = [30_111, 12_800, 5_000]
    waves = [sound(size, seed=size) for size in lens]
    wanted, pooled, real, squared = restated(config, tensors, waves)
    padded = np.stack([np.pad(wave, (0, 30_720 - len(wave))) for wave in waves])
    mel, _ = jax.jit(whisper_log_mel, static_argnames="n_mels")(padded, None, config.num_mel_bins)
    mask = 160 * np.arange(mel.shape[1]) < np.array(lens)[:, None]
    apply = jax.jit(lambda model, *args: model.apply(*args, method="encode"), static_argnums=0)
    codes, out = apply(model, variables, mel, mask)
    np.testing.assert_array_equal(out["token_mask"], real)
    np.testing.assert_allclose(out["pooled"][real], pooled[real], atol=1e-4)
    nearest = torch.topk(squared, 2, largest=False).values
    assert len(np.unique(wanted)) > 3
    is_clear = real & ((nearest[..., 1] - nearest[..., 0]) > 1e-3).numpy()
    assert is_clear.sum() > 0.8 * real.sum()
    np.testing.assert_array_equal(codes[is_clear], wanted[is_clear])
    # From waves, each as if alone; and alone.
    alone = [restated(config, tensors, [wave]) for wave in waves]
    found, len_codes = encode(st.WhisperVQTokenizer(variables, model), padded, np.array(lens))
    assert len_codes.tolist() == [24, 10, 4]
    for row, (single, _, _, squared) in enumerate(alone):
        size = int(len_codes[row])
        nearest = torch.topk(squared[0], 2, largest=False).values
        is_clear = ((nearest[..., 1] - nearest[..., 0]) > 1e-3).numpy()[:size]
        np.testing.assert_array_equal(found[row, :size][is_clear], single[0, :size][is_clear])
    # Compute in bfloat16.
    rough = apply(model.clone(dtype=jnp.bfloat16), variables, mel, mask)[1]["pooled"]
    error = np.asarray(rough - out["pooled"])[real]
    assert np.sqrt(np.mean(error**2)) < 2e-2 * np.sqrt(np.mean(np.square(out["pooled"][real])))
    # Export gives back every tensor that is used, bit for bit.
    exported = export_params(variables["params"], family.rules(config))
    assert set(exported) == set(tensors) - {"ema_count", "ema_weight"}
    assert all(np.array_equal(exported[key], tensors[key]) for key in exported)


@pytest.fixture(scope="module")
def full_size():
    config = dataclasses.replace(CONFIG, encoder_attention_heads=1, quantize_position=1)
    model = st.WhisperVQEncoder(config)
    return st.WhisperVQTokenizer(load(model, random_tensors(config, seed=5)), model)


def test_edges_together_and_alone(full_size):
    """Nothing, silence, 0.05 s and 95 s together; 0.05 s and exactly 30 s alone."""
    lens = np.array([0, 16_000, 800, 1_520_000], np.int32)
    waves = np.stack([sound(lens.max(), seed) for seed in range(4)])
    waves[1] = 0.0
    codes, len_codes = encode(full_size, waves, lens)
    assert codes.shape == (4, 1188) and len_codes.tolist() == [0, 13, 1, 1188]
    assert len(np.unique(codes[3])) > 5 and len(np.unique(codes[1, :13])) <= 3
    alone, _ = encode(full_size, waves[2:3, :800], lens[2:3])
    np.testing.assert_array_equal(codes[2, :1], alone[0])
    # Pieces know nothing of each other.
    alone, len_alone = encode(full_size, waves[3:, :480_000], np.array([480_000]))
    assert len_alone.tolist() == [375]
    np.testing.assert_array_equal(codes[3, :375], alone[0])
    alone, _ = encode(full_size, waves[3:, 1_440_000:], np.array([80_000]))
    np.testing.assert_array_equal(codes[3, 1125:1187], alone[0, :62])


def test_a_few_pieces_at_once_give_the_same(full_size):
    waves = np.stack([sound(20_000, seed) for seed in range(3)])
    lens = np.array([20_000, 9_000, 13_000])
    few = dataclasses.replace(full_size, pieces_at_once=2)
    np.testing.assert_array_equal(encode(few, waves, lens)[0], encode(full_size, waves, lens)[0])


def test_pieces_by_hand():
    # A row of 2 pieces and one of 1, hops of 1280: the short one is padded to 3 hops.
    lens = jnp.array([480_000 + 1280 + 5, 3000])
    pieces, real, ends = st.cut_pieces(jnp.ones((2, 600_000)), lens, 1280)
    assert pieces.shape == (4, 480_000)
    assert real.tolist() == [480_000, 1285, 3000, 0]
    assert ends.tolist() == [480_000, 480_000, 3840, 0]
    np.testing.assert_array_equal(pieces.sum(axis=1), real)


def test_other_rates_and_channels(full_size, tmp_path):
    lens = []
    for rate_hz, channels in ((8_000, 1), (48_000, 2)):
        sound = np.random.default_rng(1).normal(scale=0.1, size=(rate_hz, channels))
        path = tmp_path / f"{rate_hz}.wav"
        wave_lib.soundfile.write(path, sound, rate_hz)
        wave = wave_lib.load(path)
        codes, len_codes = encode(full_size, wave[None], np.array([len(wave)]))
        lens.append(int(len_codes[0]))
        assert codes.shape == (1, 13) and np.all((codes >= 0) & (codes < 37))
    assert lens == [13, 13]


def test_other_configs_are_refused(tmp_path):
    path = tmp_path / "config.json"
    text = (GOLDENS / "config.json").read_text()
    path.write_text(text.replace('"quantize_position": 3', '"quantize_position": 2'))
    with pytest.raises(ValueError, match=r"config\.json: pooling_position 3 is not supported"):
        st.SpeechTokenizerConfig.from_json(path)
    path.write_text(text.replace('"quantize_encoder_only": true', '"quantize_encoder_only": false'))
    with pytest.raises(ValueError, match="quantize_encoder_only False"):
        st.SpeechTokenizerConfig.from_json(path)
    path.write_text(text.replace("quantize_vocab_size", "vocab"))
    with pytest.raises(ValueError, match="missing from the config: quantize_vocab_size"):
        st.SpeechTokenizerConfig.from_json(path)


def test_too_many_frames_are_refused(released):
    model, variables, _, _ = released
    with pytest.raises(ValueError, match="322 mel frames exceed the encoder's 320"):
        model.apply(variables, np.zeros((1, 128, 322), np.float32))
