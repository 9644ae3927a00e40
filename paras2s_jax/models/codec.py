"""Speech codecs: waveform <-> 12.5 Hz speech tokens.

Two interfaces cross this file's border: `SpeechTokenizer` (wave -> codes) and `Detokenizer`
(codes -> wave). The embedded codec, `KMeansCodec`, implements both without a network: k-means
over patches of 8 log-mel frames, inverted by fast Griffin-Lim (design §4).
"""

import os
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from paras2s_jax.audio import mel as mel_lib

RATE_HZ = 16_000
HOP = 160  # 10 ms
N_FFT = 640  # Four hops: the squared Hann window overlap-adds to the constant below.
SQUARED_WINDOW_SUM = 1.5
EDGE = (N_FFT - HOP) // 2  # Samples that a frame reaches beyond its own hop, on either side.
N_MELS = 64
PATCH_FRAMES = 8  # 80 ms, hence 12.5 Hz.
PATCH_SAMPLES = PATCH_FRAMES * HOP
PATCH_DIM = PATCH_FRAMES * N_MELS
FLOOR = 3e-4  # Mel magnitude that counts as silence: keeps noise of rounding out of distances.
LOW_BAND_WEIGHT = 1.5  # Of the lowest mel band in the distance; the pitch is heard there.
LOW_BAND_DECAY = 12.0  # Bands over which the extra weight falls by 1/e.
PRINCIPAL_COMPONENTS = 64
LEVEL = 1.4  # Codes are means of logarithms, quieter by about this factor than what they stand for.
MOMENTUM = 0.99  # Alpha of Perraudin et al. 2013, "A fast Griffin-Lim algorithm".
MAX_GAIN = 3.0  # Of the level correction after Griffin-Lim.


class SpeechTokenizer(Protocol):
    """Waveform -> speech tokens."""

    rate_hz: int
    codebook_size: int

    def encode(self, waves: jax.Array, lens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """waves: float32[B, L], lens: int32[B] -> (codes int32[B, S], len_codes int32[B])."""
        ...


class Detokenizer(Protocol):
    """Speech tokens -> waveform."""

    rate_hz: int

    def decode(
        self, codes: jax.Array, len_codes: jax.Array, rng: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """codes: int32[B, S], len_codes: int32[B] -> (waves float32[B, L], lens int32[B])."""
        ...


class KMeansCodec(struct.PyTreeNode):
    """k-means codebook over log-mel patches; a pytree, so it can be an argument of jit.

    codebook: float32[C, PATCH_DIM], natural-log mel magnitudes.
    magnitudes: float32[C, PATCH_FRAMES, F], the linear spectrum that each code stands for.
    num_iters: Griffin-Lim iterations.
    rows_at_once: clips that Griffin-Lim works on at one time, None for all. A few whose spectra
      fit a processor's cache take less than half the time of many that do not.
    """

    codebook: jax.Array
    magnitudes: jax.Array
    num_iters: int = struct.field(pytree_node=False, default=8)
    rows_at_once: int | None = struct.field(pytree_node=False, default=None)
    rate_hz: int = struct.field(pytree_node=False, default=RATE_HZ)

    @property
    def codebook_size(self) -> int:
        return self.codebook.shape[0]

    @classmethod
    def from_codebook(cls, codebook: np.ndarray, **settings) -> "KMeansCodec":
        """codebook: float[C, PATCH_DIM] of `fit_codebook`; settings: the class's other fields."""
        codebook = np.asarray(codebook, np.float32)
        if codebook.ndim != 2 or codebook.shape[1] != PATCH_DIM:
            raise ValueError(f"codebook must be [codes, {PATCH_DIM}], got {codebook.shape}")
        return cls(jnp.asarray(codebook), jnp.asarray(linear_magnitudes(codebook)), **settings)

    def encode(self, waves: jax.Array, lens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Nearest code of every 80 ms.

        Args:
          waves: float32[B, L]; samples past `lens` are ignored.
          lens: int32[B], in samples.

        Returns:
          codes: int32[B, S], S = ceil(L / 1280), 0 past len_codes.
          len_codes: int32[B], ceil(lens / 1280).
        """
        weights = band_weights()
        points, centres = patches(waves, lens) * weights, self.codebook * weights
        norms = 0.5 * jnp.sum(jnp.square(centres), axis=-1)
        dots = jnp.einsum("BSD,CD->BSC", points, centres, precision=jax.lax.Precision.HIGHEST)
        codes = jnp.argmax(dots - norms, axis=-1).astype(jnp.int32)
        len_codes = -(-lens // PATCH_SAMPLES)
        real = jnp.arange(codes.shape[1]) < len_codes[:, None]
        return jnp.where(real, codes, 0), len_codes.astype(jnp.int32)

    def decode(
        self, codes: jax.Array, len_codes: jax.Array, rng: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Waveform of the codes; silent past len_codes, and independent of the padding.

        Args:
          codes: int32[B, S]; ids outside the codebook count as silence.
          len_codes: int32[B].
          rng: unused; the phases start from a fixed guess.

        Returns:
          waves: float32[B, S * 1280], within [-1, 1].
          lens: int32[B], len_codes * 1280.
        """
        rows, steps = codes.shape
        real = jnp.arange(steps) < len_codes[:, None]
        known = real & (codes >= 0) & (codes < self.codebook_size)
        magnitude = self.magnitudes[jnp.where(known, codes, 0)] * known[..., None, None]
        magnitude = magnitude.reshape(rows, steps * PATCH_FRAMES, -1)
        spectra = (magnitude, jnp.repeat(real, PATCH_SAMPLES, axis=1))
        if self.rows_at_once:

            def invert(row):
                return griffin_lim(*(x[None] for x in row), self.num_iters)[0]

            waves = jax.lax.map(invert, spectra, batch_size=self.rows_at_once)
        else:
            waves = griffin_lim(*spectra, self.num_iters)
        return jnp.clip(waves, -1.0, 1.0), (len_codes * PATCH_SAMPLES).astype(jnp.int32)

    def save(self, path: str | Path) -> None:
        """Writes the codebook as float16 safetensors, atomically."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".tmp")
        save_file({"codebook": np.asarray(self.codebook, np.float16)}, partial)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | Path, **settings) -> "KMeansCodec":
        """Reads what `save` wrote; settings: the class's other fields."""
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: no readable codec ({error}); fit one first") from error
        if "codebook" not in tensors:
            raise ValueError(f"{path}: no tensor 'codebook'; is this a codec?")
        return cls.from_codebook(tensors["codebook"], **settings)


def fit_codebook(waves: list[np.ndarray], size: int, seed: int = 0) -> np.ndarray:
    """k-means (k-means++ start) over the patches of the waves; deterministic.

    Clusters are sought in the space of the leading principal components, which is eight times
    smaller and leaves out little but noise; codes are the means of whole patches.

    waves: float32[L] each. Returns: float32[size, PATCH_DIM], rounded to float16 so that a
    saved codec gives the same codes.
    """
    # Takes a second to import, of every command's start.
    from sklearn.cluster import MiniBatchKMeans

    weights = band_weights()
    points = _all_patches(waves) * weights
    if len(points) < size:
        raise ValueError(f"{size} codes need at least as many 80 ms patches, got {len(points)}")
    centre = points.mean(axis=0)
    _, directions = np.linalg.eigh((points - centre).T @ (points - centre))
    directions = directions[:, -PRINCIPAL_COMPONENTS:]
    kmeans = MiniBatchKMeans(
        size,
        n_init=1,
        batch_size=4096,
        max_iter=12,
        reassignment_ratio=0.0,
        random_state=seed,
    )
    labels = kmeans.fit_predict((points - centre) @ directions)
    counts = np.bincount(labels, minlength=size)[:, None]
    sums = np.zeros((size, PATCH_DIM), np.float32)
    np.add.at(sums, labels, points)
    guesses = kmeans.cluster_centers_ @ directions.T + centre
    codebook = np.where(counts > 0, sums / np.maximum(counts, 1), guesses) / weights
    return codebook.astype(np.float16).astype(np.float32)


def _all_patches(waves: list[np.ndarray], batch_size: int = 32) -> np.ndarray:
    """Patches of all the waves: float32[N, PATCH_DIM]; one batch shape, so one compilation."""
    longest = max(len(wave) for wave in waves)
    jitted = jax.jit(patches)
    found = []
    for start in range(0, len(waves), batch_size):
        rows = waves[start : start + batch_size]
        lens = np.zeros(batch_size, np.int32)
        padded = np.zeros((batch_size, longest), np.float32)
        for row, wave in enumerate(rows):
            lens[row] = len(wave)
            padded[row, : len(wave)] = wave
        values = np.asarray(jitted(padded, lens))
        found += [values[row, : -(-lens[row] // PATCH_SAMPLES)] for row in range(len(rows))]
    return np.concatenate(found)


def patches(waves: jax.Array, lens: jax.Array) -> jax.Array:
    """Natural-log mel magnitudes in patches of 80 ms.

    Nothing is normalised per clip: loudness survives, and a patch depends on no sample further
    than 15 ms from it, so that codes of a cut, padded or streamed clip stay the same.

    waves: float32[B, L], ignored past lens: int32[B].
    Returns: float32[B, ceil(L / 1280), PATCH_DIM].
    """
    length = waves.shape[1]
    waves = jnp.where(jnp.arange(length) < lens[:, None], waves, 0.0)
    waves = jnp.pad(waves, ((0, 0), (0, -length % PATCH_SAMPLES)))
    filters = jnp.asarray(mel_lib.mel_filters(RATE_HZ, N_FFT, N_MELS))
    mel = jnp.matmul(jnp.abs(stft(waves)), filters, precision=jax.lax.Precision.HIGHEST)
    return jnp.log(jnp.maximum(mel, FLOOR)).reshape(waves.shape[0], -1, PATCH_DIM)


def band_weights() -> np.ndarray:
    """Weight of each patch entry in the distance: float32[PATCH_DIM]."""
    extra = (LOW_BAND_WEIGHT - 1) * np.exp(-np.arange(N_MELS) / LOW_BAND_DECAY)
    return np.tile(1 + extra, PATCH_FRAMES).astype(np.float32)


def linear_magnitudes(codebook: np.ndarray, num_iters: int = 50) -> np.ndarray:
    """Non-negative linear spectra whose mel magnitudes are nearest to LEVEL times the codebook's.

    Multiplicative updates for the least-squares problem (Lee & Seung 2000, theorem 1, with the
    mel filters as the fixed factor), from the pseudo-inverse.

    codebook: float32[C, PATCH_DIM]. Returns: float32[C, PATCH_FRAMES, N_FFT // 2 + 1].
    """
    filters = np.asarray(mel_lib.mel_filters(RATE_HZ, N_FFT, N_MELS), np.float32)  # [F, M]
    mel = np.exp(codebook.reshape(-1, N_MELS))
    # What lies at the floor is silence and must not hum.
    mel = np.maximum(mel - FLOOR, 0.0)
    spectrum = np.maximum(mel @ np.linalg.pinv(filters), 1e-6)
    numerator, gram = mel @ filters.T, filters @ filters.T
    for _ in range(num_iters):
        spectrum *= numerator / np.maximum(spectrum @ gram, 1e-9)
    return LEVEL * spectrum.reshape(len(codebook), PATCH_FRAMES, -1).astype(np.float32)


def stft(waves: jax.Array) -> jax.Array:
    """float32[B, A * HOP] -> complex64[B, A, F]; each frame is centred on its own hop."""
    padded = jnp.pad(waves, ((0, 0), (EDGE, EDGE)))
    return jnp.fft.rfft(mel_lib.frames(padded, N_FFT, HOP) * mel_lib.hann(N_FFT))


def istft(spectrum: jax.Array) -> jax.Array:
    """complex64[B, A, F] -> float32[B, A * HOP]; inverts `stft` but for the outer 15 ms.

    There, as everywhere, it divides by the sum of all overlapping windows, as if silent frames
    followed: the result does not depend on how many frames of padding there are.
    """
    frames = jnp.fft.irfft(spectrum, n=N_FFT) * mel_lib.hann(N_FFT)
    overlap = N_FFT // HOP
    parts = frames.reshape(*frames.shape[:2], overlap, HOP)
    shifted = [
        jnp.pad(parts[:, :, i], ((0, 0), (i, overlap - 1 - i), (0, 0))) for i in range(overlap)
    ]
    waves = sum(shifted).reshape(frames.shape[0], -1) / SQUARED_WINDOW_SUM
    return waves[:, EDGE:-EDGE]


def griffin_lim(magnitude: jax.Array, real: jax.Array, num_iters: int) -> jax.Array:
    """Waveform with about the given spectrogram (Perraudin et al. 2013, algorithm 2).

    Phases start as those of steady sinusoids at the bin centres, which needs no random numbers
    and fewer iterations than noise. A last gain per frame restores the level, which
    inconsistent phases lower.

    Args:
      magnitude: float32[B, A, F].
      real: bool[B, A * HOP]; the other samples are silent.
      num_iters: how often phases are re-estimated.

    Returns:
      float32[B, A * HOP].
    """
    num_frames, num_bins = magnitude.shape[1:]
    turns = np.outer(np.arange(num_frames), np.arange(num_bins)) * HOP / N_FFT % 1.0
    angles = jnp.broadcast_to(np.exp(2j * np.pi * turns).astype(np.complex64), magnitude.shape)

    def invert(angles):
        return jnp.where(real, istft(magnitude * angles), 0.0)

    def improve(_, carry):
        angles, previous = carry
        spectrum = stft(invert(angles))
        ahead = spectrum + MOMENTUM * (spectrum - previous)
        return ahead / jnp.maximum(jnp.abs(ahead), 1e-9), spectrum

    start = (angles, jnp.zeros_like(angles))
    angles, _ = jax.lax.fori_loop(0, num_iters, improve, start)
    waves = invert(angles)
    wanted = jnp.sum(jnp.square(magnitude), axis=-1)
    found = jnp.sum(jnp.square(jnp.abs(stft(waves))), axis=-1)
    gain = jnp.clip(jnp.sqrt(wanted / jnp.maximum(found, 1e-9)), 0.0, MAX_GAIN)
    return waves * jnp.repeat(gain, HOP, axis=1)
