import numpy as np
import pytest

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.models.whisper_layers import WhisperConfig

# A "word" is a steady sound of its own frequency.
WORDS_HZ = {"low": 300.0, "high": 1900.0}


def sound(words: str, dur_s: float = 0.16, level: float = 0.3) -> np.ndarray:
    """float32[L]: the words, one after the other, with short gaps."""
    time_s = np.arange(round(dur_s * wave_lib.RATE_HZ)) / wave_lib.RATE_HZ
    gap = np.zeros(round(0.04 * wave_lib.RATE_HZ))
    parts = [np.sin(2 * np.pi * WORDS_HZ[word] * time_s) for word in words.split()]
    return level * np.concatenate([x for part in parts for x in (gap, part)]).astype(np.float32)


@pytest.fixture(scope="session")
def tiny_whisper() -> WhisperConfig:
    return WhisperConfig(
        d_model=24,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        num_mel_bins=20,
        max_source_positions=64,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        max_target_positions=32,
        classifier_proj_size=16,
    )
