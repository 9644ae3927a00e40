"""BigVGAN's anti-aliased periodic activation: up 2x, snake, down 2x (NVIDIA's Activation1d).

All arrays are [B, T, C]. With `lens`, a row does not depend on its padding.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

TAPS = 12  # Of the low-pass filters.
REACH = TAPS // 4  # Samples that the upsampler sees to either side.
EPS = 1e-9


def lowpass_filter() -> np.ndarray:
    """Kaiser-windowed sinc at a quarter of the (doubled) rate, of sum 1. Returns: float32[TAPS].

    The half width, 0.3 of that rate, sets the attenuation, and that the window (BigVGAN:
    kaiser_sinc_filter1d, by Kaiser's formulas).
    """
    cutoff, half_width = 0.25, 0.3
    attenuation = 2.285 * (TAPS // 2 - 1) * math.pi * 4 * half_width + 7.95
    if attenuation > 50:
        beta = 0.1102 * (attenuation - 8.7)
    else:
        beta = 0.5842 * (attenuation - 21) ** 0.4 + 0.07886 * (attenuation - 21)
    time = np.arange(TAPS) - TAPS / 2 + 0.5
    taps = np.kaiser(TAPS, beta) * 2 * cutoff * np.sinc(2 * cutoff * time)
    return (taps / taps.sum()).astype(np.float32)


def is_real(x: jax.Array, lens: jax.Array) -> jax.Array:
    """bool[B, T, 1] of x: [B, T, C] and lens: int32[B]."""
    return (jnp.arange(x.shape[1]) < lens[:, None])[..., None]


def silence_rest(x: jax.Array, lens: jax.Array | None) -> jax.Array:
    """Zeros each row's padding. x: [B, T, C]; lens: int32[B] or None."""
    return x if lens is None else jnp.where(is_real(x, lens), x, 0)


def hold_last(x: jax.Array, lens: jax.Array | None) -> jax.Array:
    """Repeats each row's last real sample over its padding. x: [B, T, C]; lens: int32[B] | None."""
    if lens is None:
        return x
    last = jnp.take_along_axis(x, jnp.maximum(lens - 1, 0)[:, None, None], axis=1)
    return jnp.where(is_real(x, lens), x, last)


def upsample(x: jax.Array, taps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Doubles the rate; the ends are held. x: float32[B, T, C]; taps: float32[TAPS, C].

    Returns: samples 2t and samples 2t + 1 of the result, float32[B, T, C] each. They stay apart:
    what comes next works on either, and `downsample` takes them so.
    """
    steps = x.shape[1]
    x = jnp.pad(x, ((0, 0), (REACH, REACH), (0, 0)), mode="edge")

    def phase(offset, first_tap):
        parts = (x[:, offset + j : offset + j + steps] * taps[first_tap - 2 * j] for j in range(6))
        return 2 * sum(parts)

    return phase(0, TAPS - 1), phase(1, TAPS - 2)


def downsample(even: jax.Array, odd: jax.Array, taps: jax.Array) -> jax.Array:
    """Halves the rate of a signal given as its even and odd samples. Returns: float32[B, T, C]."""
    steps = even.shape[1]
    first, last = even[:, :1], odd[:, -1:]

    def extend(x, before, after):
        left, right = jnp.repeat(first, before, axis=1), jnp.repeat(last, after, axis=1)
        return jnp.concatenate([left, x, right], axis=1)

    # Tap k meets sample 2t + k - 5: the even samples t - 2 … t + 3, the odd ones t - 3 … t + 2.
    even, odd = extend(even, REACH - 1, REACH), extend(odd, REACH, REACH - 1)
    return sum(
        even[:, j : j + steps] * taps[2 * j + 1] + odd[:, j : j + steps] * taps[2 * j]
        for j in range(TAPS // 2)
    )


def snake_beta(x: jax.Array, alpha: jax.Array, beta: jax.Array, logscale: bool) -> jax.Array:
    """x + sin(a x)^2 / b per channel; a and b are exponentials of the parameters if logscale."""
    if logscale:
        alpha, beta = jnp.exp(alpha), jnp.exp(beta)
    return x + jnp.square(jnp.sin(alpha * x)) / (beta + EPS)


def activate(x: jax.Array, weights: Mapping, lens: jax.Array | None, logscale: bool) -> jax.Array:
    """Snake at the doubled rate, computed in float32; the padding of the result is silent.

    x: float[B, T, C]; weights: alpha, beta [C], up, down [TAPS, C]. Returns: as x.
    """
    w = {name: value.astype(jnp.float32) for name, value in weights.items()}
    even, odd = (
        snake_beta(y, w["alpha"], w["beta"], logscale)
        for y in upsample(hold_last(x.astype(jnp.float32), lens), w["up"])
    )
    if lens is not None:
        # The last real sample of the doubled rate is an odd one.
        odd = hold_last(odd, lens)
        even = jnp.where(is_real(even, lens), even, odd)
    return silence_rest(downsample(even, odd, w["down"]), lens).astype(x.dtype)
