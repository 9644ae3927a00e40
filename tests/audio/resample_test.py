"""Resampling on the device against soxr, with padded rows."""

import jax
import numpy as np
import pytest
import soxr

from paras2s_jax.audio.resample import resample_rows

run = jax.jit(resample_rows, static_argnums=(2, 3))


def chirp(size, rate_hz, top_hz):
    """Sweeps up to top_hz and falls silent at both ends, where edges are a matter of taste."""
    t = np.arange(size) / rate_hz
    sweep = np.sin(np.pi * top_hz * t**2 * rate_hz / size)
    return (0.5 * sweep * np.hanning(size)).astype(np.float32)


RATES = [(24_000, 16_000), (16_000, 24_000), (22_050, 16_000)]


@pytest.mark.parametrize(("from_hz", "to_hz"), RATES)
def test_equals_soxr_below_the_rolloff(from_hz, to_hz):
    wave = chirp(12_001, from_hz, 0.8 * min(from_hz, to_hz) / 2)
    found, lens = run(wave[None], np.array([12_001]), from_hz, to_hz)
    wanted = soxr.resample(wave, from_hz, to_hz, quality="VHQ")
    assert int(lens[0]) == found.shape[1] == -(-12_001 * to_hz // from_hz)
    size = min(len(wanted), found.shape[1])
    np.testing.assert_allclose(found[0, :size], wanted[:size], atol=2e-3)


def test_what_does_not_fit_the_lower_rate_is_gone():
    tone = np.sin(2 * np.pi * 9000 * np.arange(4800) / 24_000).astype(np.float32)
    found, _ = run(tone[None], np.array([4800]), 24_000, 16_000)
    assert np.abs(found[0, 100:-100]).max() < 1e-3


def test_padding_is_not_heard():
    wave = chirp(3000, 24_000, 6000)
    rows = np.full((2, 3500), 0.9, np.float32)
    rows[:, :3000] = wave
    found, lens = run(rows, np.array([3000, 1001]), 24_000, 16_000)
    assert found.shape == (2, 2334) and lens.tolist() == [2000, 668]
    alone, _ = run(wave[None], np.array([3000]), 24_000, 16_000)
    np.testing.assert_allclose(found[0, :2000], alone[0], atol=1e-6)
    assert not np.any(found[0, 2000:]) and not np.any(found[1, 668:])


def test_equal_rates_change_nothing():
    wave, lens = np.ones((1, 5), np.float32), np.array([3])
    found, found_lens = resample_rows(wave, lens, 16_000, 16_000)
    assert found is wave and found_lens is lens
