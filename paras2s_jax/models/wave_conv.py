"""Convolutions over waves and over time, as wav2vec 2.0 (arXiv 2006.11477) and its kin have them.

Frame t of the stack hears the samples [t * hop, t * hop + receptive_field), so a frame that lies
within a clip does not depend on what follows the clip.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from paras2s_jax.models import axes
from paras2s_jax.models.layers import KERNEL_INIT, LayerNorm
from paras2s_jax.models.placement import constrain

NORMS = ("group", "layer")


def num_frames(num_samples, kernels: Sequence[int], strides: Sequence[int]):
    """Frames that the stack makes of so many samples (an int or an array of them)."""
    for kernel, stride in zip(kernels, strides, strict=True):
        num_samples = (num_samples - kernel) // stride + 1
    return num_samples


def receptive_field(kernels: Sequence[int], strides: Sequence[int]) -> int:
    """Samples that one frame hears: 400 (25 ms) for wav2vec 2.0."""
    field = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        field = (field - 1) * stride + kernel
    return field


def mean_over_time(x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Mean of the real frames. x: float[B, A, D]; mask: bool[B, A]. Returns: float32[B, D]."""
    x = x.astype(jnp.float32)
    if mask is None:
        return jnp.mean(x, axis=1)
    count = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
    return jnp.sum(jnp.where(mask[..., None], x, 0.0), axis=1) / count


class ChannelNorm(nn.Module):
    """Each channel normalised over the clip's time (torch.nn.GroupNorm with a group a channel)."""

    eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """x: float[B, A, D]; mask: bool[B, A], frames that count. Returns: dtype[B, A, D]."""
        ones = nn.with_logical_partitioning(nn.initializers.ones, (axes.EMBED,))
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, (axes.EMBED,))
        scale = self.param("scale", ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", zeros, (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        x = x - mean_over_time(x, mask)[:, None]
        x = x * jax.lax.rsqrt(mean_over_time(jnp.square(x), mask)[:, None] + self.eps)
        return (x * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(self.dtype)


class WaveConv(nn.Module):
    """Waves -> frames: unpadded convolutions, each with a norm (as `norm` says) and a GELU.

    norm: "group" normalises the first layer alone, each channel over time (wav2vec 2.0 base);
    "layer" normalises every layer over its channels.
    """

    dims: tuple[int, ...]
    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    norm: str = "layer"
    use_bias: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def _conv(self, index: int) -> nn.Conv:
        init = nn.with_logical_partitioning(KERNEL_INIT, (None, None, axes.EMBED))
        return nn.Conv(
            self.dims[index],
            kernel_size=(self.kernels[index],),
            strides=self.strides[index],
            padding="VALID",
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=init,
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, (axes.EMBED,)),
            name=f"conv_{index}",
        )

    @nn.compact
    def __call__(self, waves: jax.Array, mask: jax.Array | None = None):
        """waves: float[B, L]; mask: bool or int [B, L], real samples first, or None (all real).

        A clip shorter than `receptive_field` is heard as if silence followed, so that it has one
        frame; masked, it gives the same frame.

        Returns: (float[B, A, D], bool[B, A] or None), A = num_frames(max(L, receptive_field)).
        """
        least = receptive_field(self.kernels, self.strides)
        lens = None
        if mask is not None:
            waves = jnp.where(mask.astype(bool), waves, 0)
            lens = jnp.maximum(jnp.sum(mask.astype(jnp.int32), axis=1), least)
        x = jnp.pad(waves, ((0, 0), (0, max(0, least - waves.shape[1]))))[..., None]
        real, types = None, (self.dtype, self.param_dtype)
        for index, (kernel, stride) in enumerate(zip(self.kernels, self.strides, strict=True)):
            x = self._conv(index)(x)
            if lens is not None:
                lens = num_frames(lens, (kernel,), (stride,))
                real = jnp.arange(x.shape[1]) < lens[:, None]
            if self.norm == "layer":
                x = LayerNorm(1e-5, *types, name=f"norm_{index}")(x)
            elif index == 0:
                x = ChannelNorm(1e-5, *types, name="norm_0")(x, real)
            x = nn.gelu(x, approximate=False)
        return constrain(x, (axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_EMBED)), real


def fold_weight_norm(direction: jax.Array, length: jax.Array) -> jax.Array:
    """The kernel of a weight-normed convolution (torch's weight_norm with dim=2).

    direction: float[k, in, out]; length: float[k, 1, 1], of each tap. Returns: float32[k, in, out].
    """
    direction = direction.astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(jnp.square(direction), axis=(1, 2), keepdims=True))
    return direction * (length.astype(jnp.float32) / norm)


class SameConv(nn.Module):
    """A grouped convolution over time that keeps the length: kernel // 2 zeros precede a clip.

    use_weight_norm: the kernel is kept as "direction" and "length" (`fold_weight_norm`).
    """

    kernel: int
    groups: int
    use_weight_norm: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    kernel_init: Callable = KERNEL_INIT

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: float[B, A, D]. Returns: dtype[B, A, D]."""
        width = x.shape[-1]
        init = nn.with_logical_partitioning(self.kernel_init, (None, None, axes.EMBED))
        shape = (self.kernel, width // self.groups, width)
        if self.use_weight_norm:
            direction = self.param("direction", init, shape, self.param_dtype)
            ones = nn.with_logical_partitioning(nn.initializers.ones, (None, None, None))
            length = self.param("length", ones, (self.kernel, 1, 1), self.param_dtype)
            kernel = fold_weight_norm(direction, length)
        else:
            kernel = self.param("kernel", init, shape, self.param_dtype)
        init = nn.with_logical_partitioning(nn.initializers.zeros, (axes.EMBED,))
        bias = self.param("bias", init, (width,), self.param_dtype)
        before = self.kernel // 2
        x = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(1,),
            padding=[(before, self.kernel - 1 - before)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=self.groups,
        )
        return x + bias.astype(self.dtype)
