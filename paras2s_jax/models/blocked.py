"""Attention a head and a block of queries at a time, so that scores stay in a CPU's caches.

Scores are made again for the backward pass, as in FlashAttention (arXiv 2205.14135, algorithm 4);
all keys of a head are seen at once.
"""

import functools

import jax
import jax.numpy as jnp

# Queries at a time: 512 scores of 1500 keys are 3 MB.
QUERY_BLOCK = 512


def attend(q, k, v, mask=None, scale: float | None = None, bias=None) -> jax.Array:
    """Softmax attention, heads first; the softmax is float32.

    q: float[B, N, T, H]; k, v: float[B, K, S, H]; mask: bool[B or 1, N or 1, T or 1, S] or None;
    bias: float[B or 1, N, T, S], added to the scaled scores, or None. Returns: as q. A query
    without any visible key gets a finite, meaningless value, and gives keys no gradient.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if bias is None:
        return _attend(float(scale), q, k, v, mask)
    return _forward(scale, q, k, v, mask, bias)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale, q, k, v, mask):
    return _forward(scale, q, k, v, mask)[0]


def _attend_forward(scale, q, k, v, mask):
    out, lse = _forward(scale, q, k, v, mask)
    return out, (q, k, v, mask, out, lse)


def _forward(scale, q, k, v, mask, bias=None):
    """Returns: (the result, log of each query's sum of exponentials float32[B * N * count, T'])."""
    shape, group = q.shape, q.shape[1] // k.shape[1]
    (q, mask, bias), grid = _query_blocks(q, mask, bias)

    def one(index):
        keys = (index[0], index[1] // group)
        scores = _scores(scale, q[index], k[keys], bias, index)
        if mask is not None:
            scores = jnp.where(_block(mask, index), scores, jnp.finfo(jnp.float32).min)
        highest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        mixed = _dot(weights.astype(v.dtype), v[keys], 1, 0) / total
        return mixed.astype(q.dtype), (highest + jnp.log(total))[:, 0]

    out, lse = jax.lax.map(one, grid)
    return _joined(out, shape), lse


def _attend_backward(scale, kept, g_out):
    q, k, v, mask, out, lse = kept
    shape, group = q.shape, q.shape[1] // k.shape[1]
    # What the softmax takes off the slope of all of a query's scores.
    offset = jnp.sum(out.astype(jnp.float32) * g_out, axis=-1, keepdims=True)
    (q, mask, g_out, offset), grid = _query_blocks(q, mask, g_out, offset)

    def one(inputs):
        index, lse = inputs
        keys = (index[0], index[1] // group)
        probs = jnp.exp(_scores(scale, q[index], k[keys]) - lse[:, None])
        if mask is not None:
            probs = jnp.where(_block(mask, index), probs, 0.0)
        slope = probs * (_dot(g_out[index], v[keys], 1, 1) - offset[index])
        slope, probs = slope.astype(q.dtype), probs.astype(v.dtype)
        g_q = scale * _dot(slope, k[keys], 1, 0)
        return g_q, scale * _dot(slope, q[index], 0, 0), _dot(probs, g_out[index], 0, 0)

    g_q, *g_kv = jax.lax.map(one, (grid, lse))

    def sum_queries(g):
        return jnp.sum(g.reshape(*k.shape[:2], -1, *k.shape[2:]), axis=2)

    g_k, g_v = map(sum_queries, g_kv)
    return _joined(g_q, shape).astype(q.dtype), g_k.astype(k.dtype), g_v.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def _scores(scale, q, k, bias=None, index=()) -> jax.Array:
    """q: float[T', H]; k: float[S, H]. Returns: float32[T', S]."""
    scores = _dot(q * scale, k, 1, 1)
    return scores if bias is None else scores + _block(bias, index)


def _dot(x, y, x_axis: int, y_axis: int) -> jax.Array:
    """Sums products over an axis of either; in float32."""
    axes = (((x_axis,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)


def _query_blocks(q, *others):
    """[b, n, T, …] -> [b, n, count, T', …] for each, T filled up; a T of 1 holds for all.

    Returns: (the arrays, or None for None; indices of q's blocks, int32[b * n * count] each).
    """
    count = -(-q.shape[2] // QUERY_BLOCK)

    def split(x):
        if x is None:
            return None
        x = jnp.asarray(x)
        if x.shape[2] == 1:
            return x[:, :, None]
        x = jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % count), (0, 0)])
        return x.reshape(*x.shape[:2], count, -1, x.shape[-1])

    grid = jnp.meshgrid(*map(jnp.arange, (*q.shape[:2], count)), indexing="ij")
    return tuple(map(split, (q, *others))), tuple(index.reshape(-1) for index in grid)


def _block(x: jax.Array, index) -> jax.Array:
    """x[index], where axes of size 1 hold for all."""
    return x[tuple(i if size > 1 else 0 for i, size in zip(index, x.shape))]


def _joined(blocks: jax.Array, shape) -> jax.Array:
    """[b * n * count, T', H] -> [b, n, T, H]."""
    return blocks.reshape(*shape[:2], -1, shape[3])[:, :, : shape[2]]
