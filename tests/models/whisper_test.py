"""Whisper against transformers, the Kimi-Audio fixture, and its own padding."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from paras2s_jax.audio import mel as mel_lib
from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.audio.mel import whisper_log_mel
from paras2s_jax.convert import whisper as table
from paras2s_jax.convert.rules import Checkpoint
from paras2s_jax.models import whisper
from paras2s_jax.models.lora import LoRA
from tests.models.whisper_pairs import CONFIG, CONFIGS, build, convert, convert_asr

GOLDENS = Path(__file__).parents[1] / "goldens" / "whisper_frontend"


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


@pytest.fixture(scope="module")
def mel():
    return np.random.default_rng(0).normal(size=(2, 40, 10)).astype(np.float32)


@pytest.fixture(scope="module")
def asr():
    hf, tensors = build(transformers.WhisperForConditionalGeneration, CONFIG)
    return hf, *convert_asr(CONFIG, tensors)


@pytest.mark.parametrize("config", CONFIGS)
def test_asr_equals_transformers(config):
    hf, tensors = build(transformers.WhisperForConditionalGeneration, config, seed=3)
    model, variables = convert_asr(config, tensors)
    rng = np.random.default_rng(1)
    features = rng.normal(size=(3, config.num_mel_bins, 2 * config.max_source_positions))
    inputs = {
        "input_features": features.astype(np.float32),
        "decoder_input_ids": rng.integers(0, 50, (3, 7)),
        "decoder_attention_mask": (np.arange(7) < np.array([[7], [4], [5]])).astype(np.int32),
    }
    with torch.no_grad():
        expected = hf(**{key: torch.tensor(value) for key, value in inputs.items()})
    logits, out = jax.jit(model.apply)(variables, **inputs)
    assert logits.shape == (3, 7, 50) and logits.dtype == jnp.float32
    real = inputs["decoder_attention_mask"].astype(bool)
    np.testing.assert_allclose(out["encoded"], expected.encoder_last_hidden_state, atol=1e-4)
    np.testing.assert_allclose(logits[real], expected.logits.numpy()[real], atol=1e-4)
    # Compute in bfloat16, norms, softmax and parameters in float32.
    rough, _ = jax.jit(model.clone(dtype=jnp.bfloat16).apply)(variables, **inputs)
    assert rms((rough - logits)[real]) < 2e-2 * rms(logits[real])


@pytest.mark.parametrize("config", CONFIGS)
def test_classifier_equals_transformers(config):
    hf, tensors = build(transformers.WhisperForAudioClassification, config, num_labels=5)
    model = whisper.WhisperForAudioClassification(config, num_labels=5)
    shape = (2, config.num_mel_bins, 2 * config.max_source_positions)
    features = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    variables = convert(model, table.classification_rules(config), tensors, features)
    with torch.no_grad():
        expected = hf(input_features=torch.tensor(features)).logits
    logits, _ = jax.jit(model.apply)(variables, input_features=features)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def pad_rows(mel, len_frames, num_frames, fill):
    """Cuts row b to len_frames[b] and fills up with a value that must not matter."""
    padded = np.full((len(mel), num_frames, mel.shape[2]), fill, np.float32)
    for row, size in enumerate(len_frames):
        padded[row, :size] = mel[row, :size]
    return padded, np.arange(num_frames) < np.array(len_frames)[:, None]


@pytest.mark.parametrize("pool", [1, 2])
def test_padded_encoder_equals_unpadded(asr, mel, pool):
    variables = {"params": asr[2]["params"]["encoder"]}
    encode = jax.jit(whisper.WhisperEncoder(CONFIG, pool=pool).apply)
    padded, mask = pad_rows(mel, (40, 21), 40, fill=7.0)
    x, out = encode(variables, padded, mask)
    alone, _ = encode(variables, mel[1:, :21])
    # 21 mel frames -> 11 steps; pooled by two, the odd one is dropped -> 5.
    size = 11 // pool
    assert alone.shape[1] == size and out["mask"].sum(1).tolist() == [20 // pool, size]
    np.testing.assert_allclose(x[1, :size], alone[0], atol=1e-5)
    assert not np.any(x[1, size:])


def test_padded_asr_and_classifier_equal_unpadded(asr, mel):
    _, model, variables = asr
    padded, mask = pad_rows(mel, (40, 21), 40, fill=-3.0)
    tokens = np.random.default_rng(1).integers(0, 50, (2, 7))
    token_mask = np.arange(7) < np.array([[7], [4]])
    predict = jax.jit(lambda *args: model.apply(*args, method="predict"))
    logits, _ = predict(variables, padded, tokens, mask, token_mask)
    alone, _ = predict(variables, mel[1:, :21], tokens[1:, :4])
    np.testing.assert_allclose(logits[1, :4], alone[0], atol=1e-5)

    classifier = whisper.WhisperForAudioClassification(CONFIG, num_labels=3)
    variables = jax.jit(classifier.init)(jax.random.key(1), mel.swapaxes(1, 2))
    classify = jax.jit(classifier.apply)
    alone, _ = classify(variables, mel[1:, :21].swapaxes(1, 2))
    together, _ = classify(variables, padded.swapaxes(1, 2), mask.astype(np.int32))
    np.testing.assert_allclose(together[1], alone[0], atol=1e-5)


def test_too_many_frames_are_refused(asr):
    mel = np.zeros((1, 41, 10), np.float32)
    with pytest.raises(ValueError, match="41 mel frames"):
        whisper.WhisperEncoder(CONFIG).apply({"params": asr[2]["params"]["encoder"]}, mel)


def test_lora_starts_without_effect_remat_and_unroll_change_nothing(asr, mel):
    variables = {"params": asr[2]["params"]["encoder"]}
    plain, _ = jax.jit(whisper.WhisperEncoder(CONFIG).apply)(variables, mel)
    lora = LoRA(rank=2, targets=("v_proj", "fc1"))
    adapted = whisper.WhisperEncoder(CONFIG, lora, remat="full", scan_unroll=2)
    boxed = jax.jit(adapted.init)(jax.random.key(0), mel)
    lora = whisper.nn.meta.unbox(boxed)["lora"]
    # Layers are stacked: [layers, in, rank].
    assert lora["layers"]["self_attn"]["v_proj"]["a"].shape == (2, 24, 2)
    run = jax.jit(adapted.apply)
    x, _ = run({**variables, "lora": lora}, mel)
    np.testing.assert_allclose(x, plain, atol=1e-6)
    lora["layers"]["mlp"]["fc1"]["b"] += 0.1
    assert np.abs(run({**variables, "lora": lora}, mel)[0] - plain).max() > 1e-3


def test_kimi_features_side_by_side():
    # Two rows, five encoder frames of width 1 -> two steps of width 4, the last filled by zeros.
    encoded = jnp.arange(10.0).reshape(2, 5, 1)
    features, lens = whisper.kimi_features(encoded, jnp.array([9, 8]))
    assert features.tolist() == [[[0, 1, 2, 3], [4, 0, 0, 0]], [[5, 6, 7, 8], [9, 0, 0, 0]]]
    # 9 mel frames -> ceil(9 / 8) = 2 steps of 80 ms; 8 -> 1.
    assert lens.tolist() == [2, 1]


@pytest.fixture(scope="module")
def fixture():
    config = whisper.WhisperConfig.from_json(GOLDENS / "config.json")
    encoder = whisper.WhisperEncoder(config)
    tensors = Checkpoint(GOLDENS / "model.safetensors")
    mel = np.zeros((1, 8, config.num_mel_bins), np.float32)
    variables = convert(encoder, table.encoder_rules(config), tensors, mel)
    return encoder, variables, np.load(GOLDENS / "io.npz")


@pytest.fixture(scope="module")
def features_of(fixture):
    encoder, variables, _ = fixture
    run = jax.jit(lambda waves, lens: whisper.kimi_speech_features(encoder, variables, waves, lens))

    def features(waves, lens):
        return run(np.asarray(waves, np.float32), np.asarray(lens, np.int32))

    return features


def test_filters_and_window_equal_kimi_audio_reference(fixture):
    io = fixture[2]
    np.testing.assert_allclose(
        mel_lib.mel_filters(16_000, 400, 128), io["mel_filters"].T, atol=1e-7
    )
    np.testing.assert_allclose(mel_lib.hann(400), io["hann_window"].ravel(), atol=1e-6)


@pytest.mark.parametrize("clip", ["exact", "ragged"])
def test_encoder_equals_kimi_audio_reference(fixture, clip):
    encoder, variables, io = fixture
    wave = np.pad(io[f"{clip}/wave"].ravel(), (0, 480_000 - io[f"{clip}/wave"].size))
    mel, _ = jax.jit(lambda wave: whisper_log_mel(wave, None, 128))(wave[None])
    np.testing.assert_allclose(mel.max(), io[f"{clip}/log_mel_max"], atol=1e-4)
    # From the reference's own mel: what is cut off is constant.
    head, tail = io[f"{clip}/log_mel_head"], io[f"{clip}/log_mel_tail_value"]
    np.testing.assert_allclose(mel[0, :200], head.T, atol=1e-4)
    np.testing.assert_allclose(mel[0, 200:], np.full((2800, 128), tail), atol=1e-4)
    exact = np.full((1, 3000, 128), tail, np.float32)
    exact[0, :200] = head.T
    x, out = jax.jit(encoder.apply, static_argnames="emit")(variables, exact, emit=("layer_out",))

    def expect(found, name):
        wanted = io[f"{clip}/{name}"]
        wanted = wanted.reshape(-1, wanted.shape[-1])
        np.testing.assert_allclose(found[: len(wanted)], wanted, atol=1e-5)

    expect(out["after_conv"][0], "after_conv_head")
    expect(out["layer_out"][0, 0], "layer0_out_head")
    expect(x[0], "encoder_out_head")
    expect(x[0, -4:], "encoder_out_last")


@pytest.mark.parametrize("clip", ["exact", "ragged"])
def test_speech_features_equal_kimi_audio_reference(fixture, features_of, clip):
    io = fixture[2]
    wave = io[f"{clip}/wave"].reshape(1, -1)
    # Noise in the padding must not be heard.
    padded = np.ones((1, 26_000), np.float32)
    padded[:, : wave.shape[1]] = wave
    features, len_features = features_of(padded, [wave.shape[1]])
    assert len_features.tolist() == [int(io[f"{clip}/token_len"])] == [20]
    np.testing.assert_allclose(features[:, :20], io[f"{clip}/feature"], atol=1e-4)


def test_long_clip_is_heard_in_pieces(fixture, features_of):
    io = fixture[2]
    second = io["long/second"].ravel()
    wave = np.concatenate([np.tile(second, 31), second[:777]])[None]
    assert wave.shape[1] == int(io["long/n_samples"])
    features, len_features = features_of(wave, [wave.shape[1]])
    features = features[:, : int(len_features[0])]
    assert features.shape == tuple(io["long/feature_shape"])
    np.testing.assert_allclose(features[0, :6], io["long/feature_head"].reshape(6, -1), atol=1e-4)
    boundary = io["long/feature_30s_boundary"].reshape(-1, features.shape[-1])
    assert len(boundary) > 3
    np.testing.assert_allclose(features[0, 372 : 372 + len(boundary)], boundary, atol=1e-4)


def test_features_at_the_edges(features_of):
    """Silence, 0.05 s and 95 s together; exactly 30 s and 0.05 s alone."""
    rng = np.random.default_rng(4)
    lens = np.array([0, 800, 1_520_000])
    waves = 0.1 * rng.normal(size=(3, lens.max())).astype(np.float32)
    features, len_features = features_of(waves, lens)
    # ceil(n / 1280): 0.625 and 1187.5 steps of 80 ms.
    assert len_features.tolist() == [0, 1, 1188]
    # The first is all padding: what stands there is the sound of silence.
    assert np.isfinite(features).all()
    alone, _ = features_of(waves[1:2, :800], lens[1:2])
    np.testing.assert_allclose(features[1, :1], alone[0, :1], atol=1e-5)
    # Exactly 30 s: all of the first piece, and only that.
    whole, len_whole = features_of(waves[2:, :480_000], [480_000])
    assert len_whole.tolist() == [375] and whole.shape[1] == 375
    np.testing.assert_allclose(features[2, :375], whole[0], atol=1e-5)


def test_features_of_other_rates_and_channels(features_of, tmp_path):
    """A chirp at 16 kHz mono, 8 kHz mono and 48 kHz stereo sounds the same."""
    heard = []
    for rate_hz, channels in ((16_000, 1), (8_000, 1), (48_000, 2)):
        time_s = np.arange(rate_hz) / rate_hz
        chirp = 0.3 * np.sin(2 * np.pi * (200 + 800 * time_s) * time_s) * np.hanning(rate_hz)
        path = tmp_path / f"{rate_hz}.wav"
        wave_lib.soundfile.write(path, np.tile(chirp[:, None], channels), rate_hz, subtype="FLOAT")
        wave = wave_lib.load(path)
        assert wave.shape == (16_000,)
        features, len_features = features_of(wave[None], [len(wave)])
        assert len_features.tolist() == [13]
        heard.append(np.asarray(features[0, :13]))
    assert rms(heard[1] - heard[0]) < 0.2 * rms(heard[0])
    assert rms(heard[2] - heard[0]) < 0.05 * rms(heard[0])
