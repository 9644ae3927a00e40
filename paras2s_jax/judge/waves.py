"""Files as the judge's stages take them: a wave, or the reason why there is none."""

from pathlib import Path

import numpy as np

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.judge.interfaces import Failure
from paras2s_jax.judge.ledger import file_digest


def hash_or_failure(path: Path) -> str | Failure:
    """sha256 of a file's bytes."""
    try:
        return file_digest(path)
    except OSError as error:
        return Failure(f"unreadable wav {path}: {error.strerror}")


def load_or_failure(path: Path, max_dur_s: float | None = None) -> np.ndarray | Failure:
    """float32[L] at 16 kHz, or a Failure: no audio, empty, cut off, not finite, or too long."""
    try:
        wave = wave_lib.load(path)
    except wave_lib.AudioError as error:
        return Failure(str(error))
    return (None if max_dur_s is None else too_long(wave, max_dur_s)) or wave


def too_long(wave: np.ndarray, max_dur_s: float) -> Failure | None:
    """The failure of a wave that exceeds what a stage can hear; None for one that does not."""
    if len(wave) <= round(max_dur_s * wave_lib.RATE_HZ):
        return None
    dur_s = len(wave) / wave_lib.RATE_HZ
    return Failure(f"too long: {dur_s:.1f} s, where {max_dur_s:.1f} s is the most")
