"""Dense (with LoRA), norms, rotary embedding and attention, shared by every model family."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from paras2s_jax.models import axes, blocked
from paras2s_jax.models.attention import SHORT, attend, suits_blocks, target

__all__ = [
    "KERNEL_INIT",
    "LORA_A_INIT",
    "Dense",
    "LayerNorm",
    "RMSNorm",
    "RopeScaling",
    "Segment",
    "attend",
    "attend_segments",
    "make_embed",
    "matmul_out_first",
    "rope",
    "rope_angles",
    "rope_frequencies",
]

Axes = tuple[str | None, ...]

KERNEL_INIT = nn.initializers.normal(0.02)
# torch's kaiming_uniform(a=sqrt(5)) on [r, in]: uniform in +-1/sqrt(in) (peft LoraLayer).
LORA_A_INIT = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


class Dense(nn.Module):
    """Linear map with kernel [in, out] and an optional low-rank adapter (LoRA, arXiv 2106.09685).

    The adapter lives in collection "lora" as a [in, r] and b [r, out], both float32:
    y = x @ kernel + bias + (alpha / r) * (x @ a) @ b. b starts at zero, so that a fresh
    adapter changes nothing. out_first: the kernel is stored [out, in] (see matmul_out_first).
    """

    features: int
    use_bias: bool = True
    kernel_axes: Axes = (axes.EMBED, axes.MLP)
    lora_rank: int = 0
    lora_alpha: float = 16.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    out_dtype: jnp.dtype | None = None
    kernel_init: Callable = KERNEL_INIT
    out_first: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: float[..., in]. Returns: (out_dtype or dtype)[..., out].

        out_dtype=float32 on a bfloat16 head keeps the accumulator's precision in the logits.
        """
        in_axis, out_axis = self.kernel_axes
        width = x.shape[-1]
        order = -1 if self.out_first else 1
        init = nn.with_logical_partitioning(self.kernel_init, self.kernel_axes[::order])
        kernel = self.param("kernel", init, (width, self.features)[::order], self.param_dtype)
        # Two axes only: with more, XLA:CPU transposes activations for the kernel's gradient
        # (3 times the backward time of an MLP).
        lead, x = x.shape[:-1], x.astype(self.dtype).reshape(-1, width)
        multiply = matmul_out_first if self.out_first else jnp.matmul
        y = multiply(x, kernel.astype(self.dtype), preferred_element_type=self.out_dtype)
        if self.use_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, (out_axis,))
            bias = self.param("bias", init, (self.features,), self.param_dtype)
            y = y + bias.astype(y.dtype)
        if self.lora_rank > 0:
            y = y + self._adapter(x, in_axis, out_axis).astype(y.dtype)
        return y.reshape(*lead, self.features)

    def _adapter(self, x, in_axis, out_axis):
        a_init = nn.with_logical_partitioning(LORA_A_INIT, (in_axis, axes.LORA_RANK))
        b_init = nn.with_logical_partitioning(nn.initializers.zeros, (axes.LORA_RANK, out_axis))
        a_shape, b_shape = (x.shape[-1], self.lora_rank), (self.lora_rank, self.features)
        a = self.variable(
            "lora", "a", lambda: a_init(self.make_rng("params"), a_shape, jnp.float32)
        ).value
        b = self.variable(
            "lora", "b", lambda: b_init(self.make_rng("params"), b_shape, jnp.float32)
        ).value
        scale = self.lora_alpha / self.lora_rank
        return scale * ((x @ a.astype(self.dtype)) @ b.astype(self.dtype))


def matmul_out_first(x: jax.Array, kernel: jax.Array, preferred_element_type=None) -> jax.Array:
    """x @ kernel.T, on a CPU as is fastest for a few rows, where reading the kernel is the cost.

    x: float[B, in]; kernel: float[out, in]. Returns: float[B, out].
    """
    if target()[0] != "cpu":
        return jnp.matmul(x, kernel.T, preferred_element_type=preferred_element_type)
    # kernel @ x.T takes 0.9 of the time of x @ kernel.T.T; without the barriers XLA turns it round.
    x = jax.lax.optimization_barrier(x.T)
    y = jnp.matmul(kernel, x, preferred_element_type=preferred_element_type)
    return jax.lax.optimization_barrier(y).T


class RMSNorm(nn.Module):
    """x / rms(x) * scale, computed in float32 (Qwen2RMSNorm, LlamaRMSNorm)."""

    eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: float[..., D]. Returns: dtype[..., D]."""
        init = nn.with_logical_partitioning(nn.initializers.ones, (axes.EMBED,))
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * scale.astype(jnp.float32)).astype(self.dtype)


class LayerNorm(nn.Module):
    """Layer norm with scale and bias, computed in float32 (torch.nn.LayerNorm)."""

    eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: float[..., D]. Returns: dtype[..., D]."""
        ones = nn.with_logical_partitioning(nn.initializers.ones, (axes.EMBED,))
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, (axes.EMBED,))
        scale = self.param("scale", ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", zeros, (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(self.dtype)


def make_embed(num: int, width: int, dtype, param_dtype, name: str | None = None) -> nn.Embed:
    """Token embedding [num, width] with logical axes (vocab, embed)."""
    init = nn.with_logical_partitioning(KERNEL_INIT, (axes.VOCAB, axes.EMBED))
    return nn.Embed(
        num, width, dtype=dtype, param_dtype=param_dtype, embedding_init=init, name=name
    )


class RopeScaling(NamedTuple):
    """How Llama 3.1 stretches rotary wavelengths (transformers: rope type "llama3").

    Wavelengths above original_max_position_embeddings / low_freq_factor are stretched by
    factor, those below original_max_position_embeddings / high_freq_factor not at all.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> jax.Array:
    """Angle per position of each pair. Returns: float32[head_dim // 2].

    Between RopeScaling's two wavelengths, the share of the unstretched frequency rises linearly
    with original_max_position_embeddings / wavelength (_compute_llama3_parameters).
    """
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return frequency
    turns = scaling.original_max_position_embeddings * frequency / (2 * jnp.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequency * (kept + (1.0 - kept) / scaling.factor)


def rope_angles(
    positions: jax.Array,
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    sections: tuple[int, ...] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotary angles (RoFormer, arXiv 2104.09864, sec. 3.2.2).

    positions: int32[B, T], or int32[3, B, T]: a time, a height and a width for each token, of
    which section i of the frequencies takes the one numbered i modulo 3 (multimodal rotary
    embedding, Qwen2-VL, arXiv 2409.12191, sec. 2.1). sections: sizes that sum to head_dim // 2.
    Returns: two float32[B, T, 1, head_dim // 2].
    """
    frequency = rope_frequencies(head_dim, theta, scaling)
    if positions.ndim == 3:
        if sections is None or sum(sections) != head_dim // 2:
            raise ValueError(
                f"positions {positions.shape} need sections that sum to {head_dim // 2}, "
                f"the config has {sections}"
            )
        axis_of = np.repeat(np.arange(len(sections)) % len(positions), sections)
        positions = jnp.moveaxis(positions[axis_of], 0, -1)[:, :, None]
    else:
        positions = positions[..., None, None]
    angles = positions.astype(jnp.float32) * frequency
    return jnp.cos(angles), jnp.sin(angles)


def rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (x_i, x_{i + H/2}): the half-split layout of Llama and Qwen2.

    x: float[B, T, N, H]; cos, sin: float32[B, T, 1, H // 2]. Returns: as x.
    """
    lo, hi = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([lo * cos - hi * sin, hi * cos + lo * sin], axis=-1).astype(x.dtype)


class Segment(NamedTuple):
    """Keys and values that a query sees: of its own sequence, or shared by a group of rows.

    k, v: float[b, K, S, H] where b divides B: row b of the segment serves the B // b
    consecutive query rows from b * (B // b). mask: bool[b or 1, T or 1, S].
    """

    k: jax.Array
    v: jax.Array
    mask: jax.Array


def attend_segments(q: jax.Array, segments: Sequence[Segment], scale: float | None = None):
    """Attention with one softmax over all segments.

    q: float[B, T, N, H]. Returns: as q. Shared keys are repeated on a CPU alone, for more than one
    query; a single segment of many keys, one row per query row, is attended to as `attend` does.
    """
    rows, steps, heads, width = q.shape
    scale = width**-0.5 if scale is None else scale
    if steps > 1:
        if target() == ("cpu", 1) and len(segments) > 1:
            # Copying keys costs less there than to bring scores of several arrays together.
            segments = [_joined(segments, rows)]
        k, v, mask = segments[0]
        if len(segments) == 1 and k.shape[0] == rows:
            if suits_blocks(steps, k.shape[2]):
                out = blocked.attend(q.swapaxes(1, 2), k, v, mask[:, None], scale)
                return out.swapaxes(1, 2)
            if k.shape[2] > SHORT:
                return attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask[:, None], scale)
    scores = [_segment_scores(q * scale, segment) for segment in segments]
    probs = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    out, start = 0.0, 0
    for segment in segments:
        shared, kv_heads, size = segment.k.shape[:3]
        block = jax.lax.slice_in_dim(probs, start, start + size, axis=-1).astype(segment.v.dtype)
        # [B, K, N/K, T, S] -> the rows that share one key row are put side by side.
        block = block.reshape(shared, -1, kv_heads, heads // kv_heads, steps, size).swapaxes(1, 2)
        mixed = jnp.einsum("BKGQTS,BKSH->BKGQTH", block, segment.v)
        out = out + mixed.transpose(0, 2, 4, 1, 3, 5).reshape(rows, steps, heads, width)
        start += size
    return out


def _joined(segments: Sequence[Segment], rows: int) -> Segment:
    """All keys in one segment with a row of its own for each query row."""

    def repeat(x):
        return jnp.repeat(x, rows // x.shape[0], axis=0)

    steps = max(segment.mask.shape[1] for segment in segments)
    masks = [repeat(segment.mask) for segment in segments]
    masks = [jnp.broadcast_to(mask, (rows, steps, mask.shape[2])) for mask in masks]
    k, v = (
        jnp.concatenate([repeat(getattr(segment, name)) for segment in segments], axis=2)
        for name in ("k", "v")
    )
    return Segment(k, v, jnp.concatenate(masks, axis=2))


def _segment_scores(q: jax.Array, segment: Segment) -> jax.Array:
    """q: float[B, T, N, H], scaled. Returns: float32[B, K, N/K, T, S], masked."""
    rows, steps, heads, width = q.shape
    shared, kv_heads, size = segment.k.shape[:3]
    q = q.reshape(shared, rows // shared, steps, kv_heads, heads // kv_heads, width)
    q = q.transpose(0, 3, 1, 4, 2, 5)
    scores = jnp.einsum("BKGQTH,BKSH->BKGQTS", q, segment.k, preferred_element_type=jnp.float32)
    mask = segment.mask[:, None, None, None]
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    return scores.swapaxes(1, 2).reshape(rows, kv_heads, heads // kv_heads, steps, size)
