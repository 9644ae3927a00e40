"""Log-mel spectrograms in pure jnp, jit-able, equal to the one that Whisper was trained with."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

RATE_HZ = 16_000
N_FFT = 400
HOP = 160

# The floor and the dynamic range, in log10 of power (whisper/audio.py: log_mel_spectrogram).
_FLOOR = 1e-10
_RANGE = 8.0


def whisper_log_mel(
    waves: jax.Array,
    lens: jax.Array | None = None,
    n_mels: int = 80,
    *,
    mirror_ends: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Whisper's log-mel spectrogram: 25 ms windows every 10 ms, 16 kHz.

    Without `lens`, transformers' WhisperFeatureExtractor to the letter: A = L // 160, both ends
    reflected, the dynamic range clamped to the loudest frame of the whole row.

    With `lens`, a row does not depend on its padding: samples past the length count as zeros, the
    loudest frame is sought among the real ones, the others are set to 0; and A = ceil(L / 160), so
    that a last, partly filled hop is kept. With `mirror_ends` the real frames are those that the
    extractor gives the row alone, cut to its length: it is reflected where it ends.

    Args:
      waves: float32[B, L] at 16 kHz.
      lens: int32[B] in samples, or None.
      n_mels: 80, or 128 for Whisper large-v3.
      mirror_ends: see above; needs `lens`, of more than 200 samples.

    Returns:
      mel: float32[B, A, M].
      len_frames: int32[B], ceil(lens / 160), or lens // 160 with `mirror_ends`.
    """
    if lens is None:
        if waves.shape[1] <= N_FFT // 2:
            raise ValueError(f"need more than {N_FFT // 2} samples, got {waves.shape[1]}")
        padded = jnp.pad(waves, ((0, 0), (N_FFT // 2, N_FFT // 2)), mode="reflect")
        num_frames = waves.shape[1] // HOP
        len_frames = jnp.full(waves.shape[0], num_frames, jnp.int32)
    else:
        num_frames = math.ceil(waves.shape[1] / HOP)
        len_frames = (lens // HOP if mirror_ends else -(-lens // HOP)).astype(jnp.int32)
        padded = _mask_and_pad(waves, lens, num_frames)
        padded = _mirror(padded, lens) if mirror_ends else padded
    power = power_spectrogram(padded, n_fft=N_FFT, hop=HOP)[:, :num_frames]
    filters = jnp.asarray(mel_filters(RATE_HZ, N_FFT, n_mels))
    mel = jnp.einsum("BAF,FM->BAM", power, filters, precision=jax.lax.Precision.HIGHEST)
    log_mel = jnp.log10(jnp.maximum(mel, _FLOOR))
    real = (jnp.arange(num_frames) < len_frames[:, None])[..., None]
    loudest = jnp.max(jnp.where(real, log_mel, math.log10(_FLOOR)), axis=(1, 2), keepdims=True)
    scaled = (jnp.maximum(log_mel, loudest - _RANGE) + 4.0) / 4.0
    return jnp.where(real, scaled, 0.0), len_frames


def _mask_and_pad(waves: jax.Array, lens: jax.Array, num_frames: int) -> jax.Array:
    """Zeros the padding, fills up the last hop with zeros, reflects the start.

    waves: float32[B, L]; lens: int32[B]. Returns: float32[B, num_frames * HOP + N_FFT].
    """
    waves = jnp.where(jnp.arange(waves.shape[1]) < lens[:, None], waves, 0.0)
    # At least a half window of samples, zeros if need be, must exist to be reflected.
    size = max(num_frames * HOP, N_FFT // 2 + 1)
    waves = jnp.pad(waves, ((0, 0), (0, size - waves.shape[1])))
    waves = jnp.pad(waves, ((0, 0), (N_FFT // 2, 0)), mode="reflect")
    return jnp.pad(waves, ((0, 0), (0, N_FFT // 2)))


def _mirror(padded: jax.Array, lens: jax.Array) -> jax.Array:
    """Reflects the end of each row of `_mask_and_pad` in the zeros behind it."""
    edge = N_FFT // 2
    at = jnp.arange(edge)
    last = lens[:, None] + edge - 1
    mirrored = jnp.take_along_axis(padded, last - 1 - at, axis=1)
    return padded.at[jnp.arange(len(lens))[:, None], last + 1 + at].set(mirrored)


def power_spectrogram(
    waves: jax.Array, *, n_fft: int = N_FFT, hop: int = HOP, window: np.ndarray | None = None
) -> jax.Array:
    """Squared magnitudes of the windowed Fourier transform, without any padding of the ends.

    waves: float32[B, L]; window: float[n_fft], a periodic Hann window if None.
    Returns: float32[B, 1 + (L - n_fft) // hop, 1 + n_fft // 2].
    """
    window = hann(n_fft) if window is None else window
    framed = frames(waves, n_fft, hop) * jnp.asarray(window, jnp.float32)
    return jax.lax.platform_dependent(framed, tpu=_power_by_products, default=_power_by_fft)


def _power_by_fft(framed: jax.Array) -> jax.Array:
    spectrum = jnp.fft.rfft(framed)
    return jnp.real(spectrum) ** 2 + jnp.imag(spectrum) ** 2


def _power_by_products(framed: jax.Array) -> jax.Array:
    """The transform as two matrices: XLA takes a minute to compile the FFT of 30 s for a TPU."""
    size = framed.shape[-1]
    turns = np.outer(np.arange(size), np.arange(1 + size // 2)) % size
    angles = 2 * np.pi * turns / size
    real, imag = (
        jnp.matmul(framed, part.astype(np.float32), precision=jax.lax.Precision.HIGHEST)
        for part in (np.cos(angles), np.sin(angles))
    )
    return real**2 + imag**2


def frames(waves: jax.Array, size: int, hop: int) -> jax.Array:
    """Overlapping frames, cut by reshapes and slices: no gather.

    waves: [B, L]. Returns: [B, 1 + (L - size) // hop, size].
    """
    num_frames = 1 + (waves.shape[1] - size) // hop
    if num_frames < 1:
        raise ValueError(f"a wave of {waves.shape[1]} samples holds no frame of {size}")
    step = math.gcd(size, hop)
    stride, num_blocks = hop // step, size // step
    num_used = (num_frames - 1) * stride + num_blocks
    blocks = waves[:, : num_used * step].reshape(waves.shape[0], num_used, step)
    last = (num_frames - 1) * stride + 1
    return jnp.concatenate([blocks[:, i : i + last : stride] for i in range(num_blocks)], axis=-1)


def hann(size: int) -> np.ndarray:
    """The periodic Hann window (torch.hann_window). Returns: float32[size]."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)).astype(np.float32)


@functools.lru_cache(maxsize=16)
def mel_filters(
    rate_hz: int, n_fft: int, n_mels: int, max_hz: float | None = None, min_hz: float = 0.0
) -> np.ndarray:
    """Triangular filters on the Slaney scale, each of unit area (librosa.filters.mel, transposed).

    Returns: float32[1 + n_fft // 2, n_mels]; shared between callers, do not write to it.
    """
    max_hz = rate_hz / 2 if max_hz is None else max_hz
    edges_hz = _mel_to_hz(np.linspace(_hz_to_mel(min_hz), _hz_to_mel(max_hz), n_mels + 2))
    bins_hz = np.linspace(0.0, rate_hz / 2, 1 + n_fft // 2)[:, None]
    rising = (bins_hz - edges_hz[:-2]) / (edges_hz[1:-1] - edges_hz[:-2])
    falling = (edges_hz[2:] - bins_hz) / (edges_hz[2:] - edges_hz[1:-1])
    filters = np.maximum(0.0, np.minimum(rising, falling)) * 2.0 / (edges_hz[2:] - edges_hz[:-2])
    filters = filters.astype(np.float32)
    filters.flags.writeable = False
    return filters


# Slaney's Auditory Toolbox: linear below 1 kHz (200/3 Hz a mel), then 27 mels per factor of 6.4.
_LINEAR_HZ_PER_MEL = 200.0 / 3.0
_LOG_STEP = math.log(6.4) / 27.0
_LOG_FROM_HZ = 1000.0
_LOG_FROM_MEL = _LOG_FROM_HZ / _LINEAR_HZ_PER_MEL


def _hz_to_mel(hz: float) -> float:
    if hz < _LOG_FROM_HZ:
        return hz / _LINEAR_HZ_PER_MEL
    return _LOG_FROM_MEL + math.log(hz / _LOG_FROM_HZ) / _LOG_STEP


def _mel_to_hz(mels: np.ndarray) -> np.ndarray:
    logarithmic = _LOG_FROM_HZ * np.exp(_LOG_STEP * (mels - _LOG_FROM_MEL))
    return np.where(mels < _LOG_FROM_MEL, mels * _LINEAR_HZ_PER_MEL, logarithmic)
