"""Waveform files: round trips, resampling, and every way a file can be broken."""

import struct

import numpy as np
import pytest
import soundfile

from paras2s_jax.audio import wave
from paras2s_jax.audio.wave import AudioError


def tone(hz: float, dur_s: float = 0.5, rate_hz: int = wave.RATE_HZ) -> np.ndarray:
    t = np.arange(round(dur_s * rate_hz)) / rate_hz
    return (0.5 * np.sin(2 * np.pi * hz * t)).astype(np.float32)


def wav_bytes(tmp_path, samples=None) -> bytes:
    wave.save(tmp_path / "whole.wav", tone(440) if samples is None else samples)
    return (tmp_path / "whole.wav").read_bytes()


def peak_hz(samples: np.ndarray, rate_hz: int) -> float:
    return np.argmax(np.abs(np.fft.rfft(samples))) * rate_hz / len(samples)


def test_save_then_load_returns_the_same_pcm16_values(tmp_path):
    steps = np.array([-32768, -32767, -1, 0, 1, 2, 32767], np.int32)
    wave.save(tmp_path / "deep" / "er" / "a.wav", steps / 2.0**15)
    loaded = wave.load(tmp_path / "deep" / "er" / "a.wav")
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded * 2**15, steps)


def test_save_clips_instead_of_wrapping(tmp_path):
    wave.save(tmp_path / "a.wav", np.array([1.5, -1.5], np.float32))
    np.testing.assert_array_equal(wave.load(tmp_path / "a.wav") * 2**15, [32767, -32768])


def test_save_leaves_nothing_else_behind_and_replaces(tmp_path):
    wave.save(tmp_path / "a.wav", tone(440))
    wave.save(tmp_path / "a.wav", tone(440, dur_s=0.25))
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]
    assert len(wave.load(tmp_path / "a.wav")) == 4000


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    before = wav_bytes(tmp_path)

    def half_written(path, *args, **kwargs):
        path.write_bytes(b"RIFF")
        raise OSError("disk full")

    monkeypatch.setattr(soundfile, "write", half_written)
    with pytest.raises(OSError, match="disk full"):
        wave.save(tmp_path / "whole.wav", tone(100))
    assert [path.name for path in tmp_path.iterdir()] == ["whole.wav"]
    assert (tmp_path / "whole.wav").read_bytes() == before


@pytest.mark.parametrize(
    "samples",
    [np.zeros(0), np.zeros((2, 10)), np.array([0.0, np.nan]), np.array([np.inf])],
)
def test_save_refuses_what_is_no_wave(tmp_path, samples):
    with pytest.raises(AudioError, match=r"a\.wav"):
        wave.save(tmp_path / "a.wav", samples)
    assert not (tmp_path / "a.wav").exists()


@pytest.mark.parametrize("rate_hz", [8_000, 22_050, 44_100])
def test_load_resamples_to_the_rate_asked_for(tmp_path, rate_hz):
    wave.save(tmp_path / "a.wav", tone(440, 1.0, rate_hz), rate_hz)
    loaded = wave.load(tmp_path / "a.wav")
    assert abs(len(loaded) - wave.RATE_HZ) <= 1
    assert abs(peak_hz(loaded, wave.RATE_HZ) - 440) < 2
    # The middle, away from the filter's ends, keeps its amplitude.
    assert np.abs(loaded[4000:12000]).max() == pytest.approx(0.5, abs=5e-3)


def test_resample_removes_what_the_new_rate_cannot_hold():
    # 6 kHz would alias to 2 kHz at a rate of 8 kHz.
    assert np.abs(wave.resample(tone(6000), 16_000, 8_000)[500:-500]).max() < 1e-3


def test_load_mixes_channels_by_their_mean(tmp_path):
    left, right = tone(300), tone(300) * 0.5
    soundfile.write(tmp_path / "s.wav", np.stack([left, right], 1), 16_000, subtype="FLOAT")
    np.testing.assert_allclose(wave.load(tmp_path / "s.wav"), left * 0.75, atol=1e-6)


@pytest.mark.parametrize("container", ["flac", "ogg", "mp3", "aiff"])
def test_load_reads_other_containers(tmp_path, container):
    soundfile.write(tmp_path / f"a.{container}", tone(440, 1.0), 16_000)
    loaded = wave.load(tmp_path / f"a.{container}")
    assert abs(peak_hz(loaded, wave.RATE_HZ) - 440) < 5


def test_missing_file_is_named(tmp_path):
    with pytest.raises(AudioError, match=r"nowhere\.wav: no such audio file"):
        wave.load(tmp_path / "nowhere.wav")


def test_folder_is_named(tmp_path):
    with pytest.raises(AudioError, match=f"{tmp_path.name}: cannot be read"):
        wave.load(tmp_path)


@pytest.mark.parametrize("name", ["a.wav", "a.raw", "a.txt"])
@pytest.mark.parametrize("content", [b"", b"not audio at all, just words", b"RIFF\x00\x00"])
def test_files_that_are_not_audio_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AudioError, match=name):
        wave.load(tmp_path / name)


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.999])
def test_truncated_wav_is_an_error_not_a_shorter_wave(tmp_path, keep):
    data = wav_bytes(tmp_path)
    (tmp_path / "cut.wav").write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(AudioError, match=r"cut\.wav: truncated"):
        wave.load(tmp_path / "cut.wav")


def test_truncated_flac_is_an_error(tmp_path):
    noise = np.random.default_rng(0).normal(size=16_000).astype(np.float32) * 0.1
    soundfile.write(tmp_path / "a.flac", noise, 16_000)
    data = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(data[: len(data) // 2])
    with pytest.raises(AudioError, match=r"cut\.flac"):
        wave.load(tmp_path / "cut.flac")


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF])
def test_streamed_wav_with_unknown_size_is_whole(tmp_path, size):
    # Speech servers stream WAV whose header was written before the length was known.
    data = bytearray(wav_bytes(tmp_path))
    at = data.index(b"data")
    struct.pack_into("<I", data, at + 4, size)
    struct.pack_into("<I", data, 4, size)
    assert len(wave.decode(bytes(data), "stream")) == 8000


def test_wav_without_samples_is_an_error(tmp_path):
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16_000)
    with pytest.raises(AudioError, match=r"none\.wav: contains no samples"):
        wave.load(tmp_path / "none.wav")


def test_samples_that_are_not_finite_are_an_error(tmp_path):
    samples = tone(440)
    samples[7] = np.nan
    soundfile.write(tmp_path / "nan.wav", samples, 16_000, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"nan\.wav: contains samples that are not finite"):
        wave.load(tmp_path / "nan.wav")


def test_inside_joins_and_forbids_leaving(tmp_path):
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "link").symlink_to(tmp_path)
    assert wave.inside(root, "a/b.wav") == root.resolve() / "a" / "b.wav"
    assert wave.inside(root, "a/../c.wav") == root.resolve() / "c.wav"
    for outside in ("../x.wav", "/etc/passwd", "a/../../x.wav", "link/x.wav"):
        with pytest.raises(AudioError, match="leads outside"):
            wave.inside(root, outside)
