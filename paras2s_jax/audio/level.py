"""A clip's level set to zero mean and unit variance, as encoders of raw waves want it."""

import jax
import jax.numpy as jnp


def standardize(waves: jax.Array, lens: jax.Array | None = None, *, eps: float = 1e-7) -> jax.Array:
    """Zero mean and unit variance of every clip; jit-able.

    eps is added to the variance: 1e-7 is transformers' Wav2Vec2FeatureExtractor with do_normalize,
    1e-5 is funasr's F.layer_norm over a whole wave (emotion2vec with normalize: true).

    Args:
      waves: float[B, L].
      lens: int32[B] in samples, or None: what lies past a clip's length is not counted.

    Returns:
      float32[B, L], 0 past the lengths; silence stays silence.
    """
    waves = waves.astype(jnp.float32)
    if lens is None:
        lens = jnp.full(waves.shape[0], waves.shape[1])
    real = jnp.arange(waves.shape[1]) < lens[:, None]
    count = jnp.maximum(lens, 1)[:, None]
    mean = jnp.sum(waves, axis=1, where=real, keepdims=True) / count
    # Centred first, for the sake of the digits of a quiet wave on a large offset.
    waves = jnp.where(real, waves - mean, 0.0)
    return waves * jax.lax.rsqrt(jnp.sum(jnp.square(waves), axis=1, keepdims=True) / count + eps)
