"""Log-mel: equal to transformers' extractor, independent of padding."""

import functools

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from paras2s_jax.audio import mel, wave
from paras2s_jax.audio.synth import Delivery, EspeakSynthesizer

PADDED = 480_000  # The extractor pads to 30 s.


@functools.cache
def speech() -> np.ndarray:
    synthesizer = EspeakSynthesizer()
    spoken = synthesizer.speak("Good morning, my friend.", Delivery("en-us+f2", 200, 50, 50, 100))
    return wave.resample(spoken, synthesizer.rate_hz, wave.RATE_HZ)


def clips() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=12_345).astype(np.float32) * 0.1
    return {
        "speech": speech(),
        "odd": speech()[:-77],
        "noise": noise,
        "silence": np.zeros(8_000, np.float32),
        "short": noise[:333],
    }


@functools.cache
def extractor(n_mels: int) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=n_mels)


def expected(clip: np.ndarray, n_mels: int, padding: str) -> np.ndarray:
    """Returns: float32[1, A, M]."""
    out = extractor(n_mels)(clip, sampling_rate=16_000, return_tensors="np", padding=padding)
    return out["input_features"].transpose(0, 2, 1)


log_mel = jax.jit(mel.whisper_log_mel, static_argnames="n_mels")


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("name", ["speech", "odd", "noise", "silence", "short"])
def test_equals_transformers_padded_to_30_s(name, n_mels):
    clip = clips()[name]
    padded = np.pad(clip, (0, PADDED - len(clip)))[None]
    want = expected(clip, n_mels, "max_length")
    got, len_frames = log_mel(padded, n_mels=n_mels)
    assert got.shape == (1, 3000, n_mels)
    assert got.dtype == jnp.float32
    assert len_frames.tolist() == [3000]
    np.testing.assert_allclose(got, want, atol=1e-4)
    # With lengths, the real frames are the same and the others 0.
    got, len_frames = log_mel(padded, np.array([len(clip)]), n_mels=n_mels)
    num_real = -(-len(clip) // 160)
    assert len_frames.tolist() == [num_real]
    np.testing.assert_allclose(got[:, :num_real], want[:, :num_real], atol=1e-4)
    assert not got[:, num_real:].any()


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("name", ["speech", "odd", "noise", "silence", "short"])
def test_equals_transformers_without_padding(name, n_mels):
    clip = clips()[name]
    got, len_frames = log_mel(clip[None], n_mels=n_mels)
    assert got.shape == (1, len(clip) // 160, n_mels)
    assert len_frames.tolist() == [len(clip) // 160]
    np.testing.assert_allclose(got, expected(clip, n_mels, "do_not_pad"), atol=1e-4)


def test_padding_and_neighbours_do_not_matter():
    lens = np.array([len(speech()), 9_999, 160, 161, 0])
    alone = [np.resize(speech(), n) for n in lens]
    # Garbage in the padding, far louder than the speech, must not be heard.
    padded = np.random.default_rng(1).normal(size=(len(lens), 32_000)).astype(np.float32) * 10
    for row, clip in zip(padded, alone, strict=True):
        row[: len(clip)] = clip
    together, len_frames = jax.device_get(log_mel(padded, lens))
    assert together.shape == (5, 200, 80)
    # ceil(9999 / 160) = 63; 160 samples fill one frame, 161 need two.
    assert len_frames.tolist()[1:] == [63, 1, 2, 0]
    assert np.isfinite(together).all()
    for i, clip in enumerate(alone[:-1]):
        single, len_single = jax.device_get(log_mel(clip[None], np.array([len(clip)])))
        assert single.shape[1] == len_single[0] == len_frames[i]
        np.testing.assert_allclose(together[i, : single.shape[1]], single[0], atol=1e-5)
        assert not together[i, single.shape[1] :].any()
    assert not together[-1].any()


def test_dynamic_range_is_per_row():
    # Each row is clamped 8 decades below its own loudest frame: (max - 8 + 4) / 4 = max' - 2.
    rows = np.stack([speech(), speech() * 0.1])
    got, _ = log_mel(rows)
    np.testing.assert_allclose(got.min((1, 2)), got.max((1, 2)) - 2.0, atol=1e-5)
    # Power falls by 1e-2: log10 by 2, the feature by 0.5.
    np.testing.assert_allclose(got[0].max() - got[1].max(), 0.5, atol=1e-4)


def test_gradient_is_finite_through_silence():
    gradient = jax.jit(jax.grad(lambda waves: log_mel(waves)[0].sum()))(jnp.zeros((1, 1600)))
    assert bool(jnp.isfinite(gradient).all())


def test_too_short_a_wave_is_an_error():
    with pytest.raises(ValueError, match="more than 200 samples"):
        mel.whisper_log_mel(np.zeros((1, 200), np.float32))


@pytest.mark.parametrize(
    ("rate_hz", "n_fft", "n_mels", "max_hz"),
    [(16_000, 400, 80, None), (16_000, 400, 128, None), (16_000, 1024, 64, 7600.0)],
)
def test_filters_equal_librosa(rate_hz, n_fft, n_mels, max_hz):
    want = librosa.filters.mel(sr=rate_hz, n_fft=n_fft, n_mels=n_mels, fmax=max_hz)
    np.testing.assert_allclose(mel.mel_filters(rate_hz, n_fft, n_mels, max_hz), want.T, atol=1e-7)


def test_frames_by_hand():
    # Size 4, hop 2 over 0..8: [0 1 2 3], [2 3 4 5], [4 5 6 7]; sample 8 fills no further frame.
    got = mel.frames(jnp.arange(9.0)[None], 4, 2)
    np.testing.assert_array_equal(got, [[[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]]])
    # Hop larger than the size, not dividing it: [0 1], [3 4], [6 7].
    got = mel.frames(jnp.arange(9.0)[None], 2, 3)
    np.testing.assert_array_equal(got, [[[0, 1], [3, 4], [6, 7]]])
    with pytest.raises(ValueError, match="no frame of 4"):
        mel.frames(jnp.zeros((1, 3)), 4, 2)


def test_power_of_a_cosine_sits_in_its_bin():
    # cos at bin 10 of a rectangular window of n: |n / 2|^2 = 40000 there, 0 elsewhere.
    waves = jnp.cos(2 * jnp.pi * 10 * jnp.arange(400) / 400)[None]
    power = mel.power_spectrogram(waves, window=np.ones(400))
    assert power.shape == (1, 1, 201)
    np.testing.assert_allclose(power[0, 0], np.where(np.arange(201) == 10, 40_000, 0), atol=1)


def test_mirrored_rows_are_what_the_extractor_gives_them_alone():
    lens = np.array([16_000, 24_000, 9_999], np.int32)
    rng = np.random.default_rng(3)
    # Noise behind the end, which must not be heard, and loud ends, which set the clamped range.
    waves = rng.normal(size=(3, 24_000)).astype(np.float32) * np.linspace(1e-4, 1, 24_000)
    mirrored, len_frames = jax.jit(mel.whisper_log_mel, static_argnames="mirror_ends")(
        waves.astype(np.float32), lens, mirror_ends=True
    )
    assert len_frames.tolist() == [100, 150, 62]
    for row, size in enumerate(lens):
        alone, _ = log_mel(waves[row : row + 1, :size].astype(np.float32))
        np.testing.assert_allclose(mirrored[row, : size // 160], alone[0], atol=1e-5)
        assert not mirrored[row, size // 160 :].any()


@pytest.mark.parametrize("size", [400, 25])
def test_the_transform_as_products_is_that_by_fft(size):
    framed = np.random.default_rng(0).normal(size=(3, 7, size)).astype(np.float32)
    ours, fft = mel._power_by_products(framed), mel._power_by_fft(framed)
    np.testing.assert_allclose(ours, fft, rtol=1e-4, atol=1e-3)
