"""The k-means codec: what goes in comes out, whatever is around it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paras2s_jax.audio.mel import mel_filters
from paras2s_jax.models import codec as codec_lib
from paras2s_jax.models.codec import KMeansCodec, fit_codebook

TONES_HZ = (200, 450, 1000, 2100)


def tone(hz, amplitude=0.3, num_samples=12_800):
    return (amplitude * np.sin(2 * np.pi * hz * np.arange(num_samples) / 16_000)).astype(np.float32)


@pytest.fixture(scope="module")
def waves():
    clips = [tone(hz, amplitude) for hz in TONES_HZ for amplitude in (0.3, 0.03)]
    # Silence, and noise that falls off, so that patches differ.
    noise = np.random.default_rng(0).normal(size=12_800) * np.linspace(0.2, 0.001, 12_800)
    return [*clips, np.zeros(12_800, np.float32), noise.astype(np.float32)]


@pytest.fixture(scope="module")
def codec(waves):
    return KMeansCodec.from_codebook(fit_codebook(waves, size=32, seed=0))


encode = jax.jit(lambda codec, waves, lens: codec.encode(waves, lens))
decode = jax.jit(lambda codec, codes, lens: codec.decode(codes, lens))


def there_and_back(codec, wave):
    codes, len_codes = encode(codec, wave[None], np.array([len(wave)]))
    return np.asarray(decode(codec, codes, len_codes)[0][0])


def test_transform_is_inverted():
    wave = np.random.default_rng(1).normal(size=(2, 3200)).astype(np.float32)
    spectrum = codec_lib.stft(jnp.asarray(wave))
    assert spectrum.shape == (2, 20, 321)
    back = codec_lib.istft(spectrum)
    # The outermost frames overlap with silence: their samples are attenuated, not wrong.
    np.testing.assert_allclose(back[:, 480:-480], wave[:, 480:-480], atol=1e-5)


def test_lengths_are_rounded_up_to_80_ms(codec):
    codes, len_codes = encode(codec, np.ones((4, 2570), np.float32), np.array([0, 1, 1280, 1281]))
    # 2570 samples = 2 * 1280 + 10 -> 3 patches.
    assert codes.shape == (4, 3) and codes.dtype == jnp.int32
    assert len_codes.tolist() == [0, 1, 1, 2]
    assert not np.any(codes[0]) and not np.any(codes[1:3, 1:])
    waves, lens = decode(codec, codes, len_codes)
    assert waves.shape == (4, 3 * 1280) and lens.tolist() == [0, 1280, 1280, 2560]


def test_padding_is_not_heard(codec, waves):
    padded = np.full((2, 20_000), 0.7, np.float32)
    lens = np.array([12_800, 9_000])
    for row, size in enumerate(lens):
        padded[row, :size] = waves[row][:size]
    codes, len_codes = encode(codec, padded, lens)
    alone, len_alone = encode(codec, waves[1][None, :9_000], np.array([9_000]))
    assert int(len_codes[1]) == int(len_alone[0]) == 8
    np.testing.assert_array_equal(codes[1, :8], alone[0])
    spoken, _ = decode(codec, codes, len_codes)
    spoken_alone, _ = decode(codec, alone, len_alone)
    np.testing.assert_allclose(spoken[1, : 8 * 1280], spoken_alone[0], atol=1e-5)
    assert not np.any(spoken[1, 8 * 1280 :])


def test_codes_do_not_change_when_the_clip_goes_on(codec, waves):
    wave = waves[-1]
    whole, _ = encode(codec, wave[None], np.array([len(wave)]))
    cut, _ = encode(codec, wave[None, :6400], np.array([6400]))
    # The last of five patches looks 15 ms ahead.
    np.testing.assert_array_equal(cut[0, :4], whole[0, :4])
    assert len(np.unique(whole)) > 3


@pytest.mark.parametrize("hz", TONES_HZ)
def test_pitch_and_level_survive(codec, hz):
    loud, soft = (there_and_back(codec, tone(hz, a))[2560:-2560] for a in (0.3, 0.03))
    peak_hz = np.argmax(np.abs(np.fft.rfft(loud))) * 16_000 / len(loud)
    # A mel band is 45 Hz wide here, more at 2100 Hz.
    assert abs(peak_hz - hz) < max(45, 0.05 * hz)
    # 20 dB apart, and within 6 dB of a sine's level, 0.3 / sqrt(2).
    assert 7 < np.std(loud) / np.std(soft) < 14
    assert 0.5 < np.std(loud) / (0.3 / 2**0.5) < 2


def test_rows_decoded_a_few_at_a_time_sound_the_same(codec, waves):
    padded = np.stack([np.resize(wave, 12_800) for wave in waves[:3]])
    codes, len_codes = encode(codec, padded, np.array([12_800, 6400, 9000]))
    together, _ = decode(codec, codes, len_codes)
    apart, _ = decode(codec.replace(rows_at_once=2), codes, len_codes)
    np.testing.assert_array_equal(apart, together)


def test_silence_and_unknown_codes_are_silent(codec):
    assert np.abs(there_and_back(codec, np.zeros(6400, np.float32))).max() < 1e-3
    waves, _ = decode(codec, np.array([[-1, 32, 99]]), np.array([3]))
    assert not np.any(waves)


def test_linear_magnitudes_have_the_mel_of_the_codebook():
    filters = mel_filters(16_000, codec_lib.N_FFT, codec_lib.N_MELS)
    spectrum = np.random.default_rng(2).uniform(0.5, 2, (16, filters.shape[0]))
    mel = spectrum @ filters
    found = codec_lib.linear_magnitudes(np.log(mel).reshape(2, -1), num_iters=200)
    assert found.shape == (2, 8, 321) and found.min() >= 0
    wanted = codec_lib.LEVEL * (mel.reshape(2, 8, -1) - codec_lib.FLOOR)
    np.testing.assert_allclose(found @ filters, wanted, rtol=0.03)


def test_fit_is_deterministic(waves, codec):
    np.testing.assert_array_equal(fit_codebook(waves, size=32, seed=0), codec.codebook)
    assert np.any(fit_codebook(waves, size=32, seed=1) != codec.codebook)
    # 10 clips of 0.8 s hold 100 patches.
    with pytest.raises(ValueError, match="got 100"):
        fit_codebook(waves, size=101)


def test_saved_codec_gives_the_same_codes(codec, waves, tmp_path):
    path = tmp_path / "codec" / "codec.safetensors"
    codec.save(path)
    assert path.stat().st_size < 32 * 512 * 2 + 200  # float16.
    loaded = KMeansCodec.load(path, num_iters=4)
    assert loaded.num_iters == 4 and loaded.codebook_size == 32
    np.testing.assert_array_equal(loaded.codebook, codec.codebook)


def test_unreadable_codecs_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.safetensors"):
        KMeansCodec.load(tmp_path / "nothing.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"bad\.safetensors"):
        KMeansCodec.load(tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="512"):
        KMeansCodec.from_codebook(np.zeros((4, 80)))
