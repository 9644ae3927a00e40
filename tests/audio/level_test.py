"""Standardised waves against transformers and torch."""

import jax
import numpy as np
import torch
import transformers

from paras2s_jax.audio.level import standardize


def _waves() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    # A quiet clip on an offset, a short one, silence, and a loud one.
    return [
        0.01 * rng.normal(size=4001).astype(np.float32) + np.float32(0.3),
        rng.normal(size=7).astype(np.float32),
        np.zeros(100, np.float32),
        rng.normal(size=5000).astype(np.float32),
    ]


def test_equals_the_feature_extractor():
    waves = _waves()
    extract = transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    want = extract(waves, padding=True, sampling_rate=16_000, return_tensors="np")
    padded = np.full((4, 5000), 9.0, np.float32)
    for row, wave in enumerate(waves):
        padded[row, : len(wave)] = wave
    lens = np.array([len(wave) for wave in waves])
    got = jax.jit(standardize)(padded, lens)
    np.testing.assert_allclose(got, want["input_values"], atol=1e-4)
    assert not np.any(got[2]) and not np.any(got[1, 7:])


def test_equals_a_layer_norm_over_the_wave():
    wave = _waves()[0]
    want = torch.nn.functional.layer_norm(torch.tensor(wave), wave.shape)
    np.testing.assert_allclose(standardize(wave[None], eps=1e-5)[0], want, atol=1e-4)
