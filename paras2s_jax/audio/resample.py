"""Band-limited resampling on the device, for batches of waves that never leave it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

ZERO_CROSSINGS = 32  # Of the windowed sinc, to either side.
KAISER_BETA = 9.0  # About 90 dB below the stop band's edge.
ROLLOFF = 0.93  # Half the height is reached at this share of the lower Nyquist frequency.


def resample_rows(
    waves: jax.Array, lens: jax.Array, from_hz: int, to_hz: int
) -> tuple[jax.Array, jax.Array]:
    """Resamples padded rows by a rational factor (polyphase filter, one strided convolution).

    Args:
      waves: float32[B, L]; samples past `lens` count as silence.
      lens: int32[B].
      from_hz: rate of waves.
      to_hz: rate of the result.

    Returns:
      waves: float32[B, ceil(L * to_hz / from_hz)], 0 past lens.
      lens: int32[B], ceil(lens * to_hz / from_hz).
    """
    if from_hz == to_hz:
        return waves, lens
    common = math.gcd(from_hz, to_hz)
    up, down = to_hz // common, from_hz // common
    length = -(-waves.shape[1] * up // down)
    waves = jnp.where(jnp.arange(waves.shape[1]) < lens[:, None], waves, 0.0)
    phases, before = _phases(up, down)
    steps = -(-length // up)
    # The last frame begins at (steps - 1) * down and is len(phases) long.
    after = max((steps - 1) * down + len(phases) - before - waves.shape[1], 0)
    out = jax.lax.conv_general_dilated(
        waves[..., None],
        jnp.asarray(phases)[:, None],
        window_strides=(down,),
        padding=[(before, after)],
        dimension_numbers=("NWC", "WIO", "NWC"),
        precision=jax.lax.Precision.HIGHEST,
    )
    out = out[:, :steps].reshape(waves.shape[0], -1)[:, :length]
    lens = -(-lens * up // down)
    return jnp.where(jnp.arange(length) < lens[:, None], out, 0.0), lens


@functools.lru_cache(maxsize=16)
def _phases(up: int, down: int) -> tuple[np.ndarray, int]:
    """Filters of the `up` outputs that fall on `down` inputs.

    Returns: (float32[taps, up], how many inputs lie before the first output's own).
    """
    cutoff = min(1.0, up / down) * ROLLOFF
    reach = math.ceil(ZERO_CROSSINGS / cutoff)
    taps = np.arange(-reach, reach + down)
    distance = taps[:, None] - np.arange(up) * down / up
    inside = np.clip(1 - np.square(distance / (reach + 1)), 0, None)
    window = np.i0(KAISER_BETA * np.sqrt(inside)) / np.i0(KAISER_BETA) * (inside > 0)
    phases = cutoff * np.sinc(cutoff * distance) * window
    return (phases / phases.sum(axis=0)).astype(np.float32), reach
