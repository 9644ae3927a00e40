"""Waveforms on disk and in memory: float32[L], mono, in [-1, 1]."""

import io
import os
import pathlib
import struct
import uuid

import numpy as np
import soundfile
import soxr

RATE_HZ = 16_000

# Sizes that a writer which cannot seek (a pipe, an HTTP stream) leaves in a RIFF header.
_UNKNOWN_SIZES = (0, 0x7FFFFFFF, 0xFFFFFFFF)


class AudioError(ValueError):
    """A waveform, a file or a service that cannot be used; the message names it."""


def load(path: str | os.PathLike, rate_hz: int = RATE_HZ) -> np.ndarray:
    """Reads any format that libsndfile knows, mixed to mono, at `rate_hz`. Returns: float32[L]."""
    path = pathlib.Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise AudioError(f"{path}: no such audio file") from error
    except OSError as error:
        raise AudioError(f"{path}: cannot be read ({error.strerror})") from error
    return decode(data, str(path), rate_hz)


def decode(data: bytes, name: str, rate_hz: int = RATE_HZ) -> np.ndarray:
    """Decodes the bytes of an audio file; `name` is used in errors. Returns: float32[L]."""
    if not data:
        raise AudioError(f"{name}: empty file (0 bytes)")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            container, expected, from_hz = file.format, file.frames, file.samplerate
            samples = file.read(dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{name}: not readable as audio ({error.error_string})") from error
    missing = _riff_bytes_missing(data)
    if missing:
        raise AudioError(f"{name}: truncated, {missing} bytes short of its header")
    # An MP3 header only estimates the number of frames.
    if container != "MP3" and len(samples) < expected:
        raise AudioError(f"{name}: truncated, {len(samples)} of {expected} frames readable")
    if not len(samples):
        raise AudioError(f"{name}: contains no samples")
    wave = samples.mean(axis=1)
    if not np.isfinite(wave).all():
        raise AudioError(f"{name}: contains samples that are not finite")
    return resample(wave, from_hz, rate_hz)


def _riff_bytes_missing(data: bytes) -> int:
    """Bytes that the data chunk of a WAV header promises beyond the end of the file.

    libsndfile silently clamps the number of frames to the size of the file.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return 0
    at = 12
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, at)
        if kind == b"data":
            return 0 if size in _UNKNOWN_SIZES else max(0, at + 8 + size - len(data))
        at += 8 + size + size % 2
    return 0


def save(path: str | os.PathLike, wave: np.ndarray, rate_hz: int = RATE_HZ) -> None:
    """Writes a PCM16 WAV so that no reader ever sees half a file.

    Values are scaled by 2**15 and clipped, so that `load` returns what was saved to half a step.

    wave: float[L].
    """
    path = pathlib.Path(path)
    wave = np.asarray(wave, np.float32)
    if wave.ndim != 1 or not wave.size:
        raise AudioError(f"{path}: expected a non-empty mono wave, got shape {wave.shape}")
    if not np.isfinite(wave).all():
        raise AudioError(f"{path}: refusing to save samples that are not finite")
    pcm = np.clip(np.round(wave * 2.0**15), -(2**15), 2**15 - 1).astype(np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        soundfile.write(partial, pcm, rate_hz, format="WAV", subtype="PCM_16")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def resample(wave: np.ndarray, from_hz: float, to_hz: float) -> np.ndarray:
    """Band-limited resampling (soxr HQ). wave: float[L]. Returns: float32[L * to_hz / from_hz]."""
    wave = np.asarray(wave, np.float32)
    if from_hz == to_hz or not wave.size:
        return wave
    return soxr.resample(wave, from_hz, to_hz, quality="HQ").astype(np.float32)


def inside(root: str | os.PathLike, relative: str | os.PathLike) -> pathlib.Path:
    """Returns root/relative with links resolved; AudioError if that lies outside of root."""
    root = pathlib.Path(root).resolve()
    path = (root / relative).resolve()
    if not path.is_relative_to(root):
        raise AudioError(f"{relative}: leads outside of {root}; use paths relative to it")
    return path
