"""Log-probabilities of given tokens under a large vocabulary, without its logits for all of them.

Logits are made for some positions at a time, again in the backward pass. On a mesh every device
loops over its own rows: the head is gathered once before the loop, and its gradient is summed on
each device and reduced once after it. Where there is room for all of them, probabilities are kept
for the backward pass instead.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from paras2s_jax.models import axes
from paras2s_jax.models.attention import target
from paras2s_jax.models.placement import active_spec, axes_of

# Positions at a time on a CPU whose logits are kept: 256 of a large vocabulary fit its caches.
CPU_CHUNK = 256


def token_logp(
    hidden: jax.Array,
    kernel: jax.Array,
    ids: jax.Array,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
    dtype: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of ids under softmax(hidden @ kernel / temperature), and its entropy.

    hidden: float[B, T, D]; kernel: float[D, V] with the axes embed and vocab; ids: int32[B, T].
    chunk: positions whose float32 logits [., V] a device holds at one time; None: all of its own,
    until the backward pass. dtype: of the factors of the product, by default hidden's; sums are
    float32.
    Returns: two float32[B, T]; the entropy, in nats, has no gradient.
    """
    plan = _plan(hidden, kernel, temperature, chunk, hidden.dtype if dtype is None else dtype)
    return _token_logp(plan, hidden, kernel, ids)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static in one call: settings, and the mesh axes of each array's dimensions."""

    temperature: float
    chunk: int | None
    dtype: Any
    keep: bool
    on_mesh: bool = False
    rows: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()

    def run(self, function: Callable, inputs: str, outputs: str) -> Callable:
        """function on every device, on its part; one letter says what each array is.

        r: leading rows [B, …]; k: the kernel; p: the probabilities that are kept, if any.
        """
        if not self.on_mesh:
            return function
        specs = {
            "r": PartitionSpec(self.rows or None),
            "k": PartitionSpec(self.embed or None, self.vocab or None),
            "p": PartitionSpec(None, self.rows or None, self.vocab or None),
        }
        return jax.shard_map(
            function,
            in_specs=tuple(specs[kind] for kind in inputs),
            out_specs=tuple(specs[kind] for kind in outputs),
            check_vma=False,
        )


def _plan(hidden, kernel, temperature, chunk, dtype) -> _Plan:
    mesh = jax.sharding.get_abstract_mesh()
    keep = chunk is None
    if keep and target()[0] == "cpu":
        chunk = CPU_CHUNK
    plan = _Plan(float(temperature), chunk, jnp.dtype(dtype), keep)
    if mesh.empty or not nn.get_logical_axis_rules():
        return plan
    (rows,) = active_spec(hidden.shape[:1], (axes.ACT_BATCH,))
    embed, vocab = active_spec(kernel.shape, (axes.EMBED, axes.VOCAB))
    vocab = axes_of(vocab)
    # An axis over which the vocabulary is split cannot hold other rows as well.
    rows = tuple(name for name in axes_of(rows) if name not in vocab)
    return dataclasses.replace(plan, on_mesh=True, rows=rows, embed=axes_of(embed), vocab=vocab)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logp(plan: _Plan, hidden, kernel, ids):
    return _forward(dataclasses.replace(plan, keep=False), hidden, kernel, ids)[0]


def _forward(plan: _Plan, hidden, kernel, ids):
    run = plan.run(functools.partial(_local_forward, plan), "rkr", "rrrp")
    logp, entropy, lse, probs = run(hidden, kernel, ids)
    return (logp, entropy), (hidden, kernel, ids, lse, probs)


def _backward(plan: _Plan, kept, grads):
    run = plan.run(functools.partial(_local_backward, plan), "rkrrpr", "rk")
    return *run(*kept, grads[0]), None


_token_logp.defvjp(_forward, _backward)


def _local_forward(plan: _Plan, hidden, kernel, ids):
    head = _gathered(plan, kernel)

    def score(hidden, ids):
        logits = _logits(plan, hidden, head)
        highest = _over(jax.lax.pmax, plan.vocab, jnp.max(logits, axis=-1))
        shifted = logits - highest[:, None]
        weights = jnp.exp(shifted)
        sums = jnp.stack(
            [
                jnp.sum(weights, axis=-1),
                jnp.sum(weights * shifted, axis=-1),
                _chosen(plan, shifted, head, ids),
            ]
        )
        total, mean, chosen = _over(jax.lax.psum, plan.vocab, sums)
        log_total = jnp.log(total)
        found = chosen - log_total, log_total - mean / total, highest + log_total
        kept = (weights / total[:, None]).astype(plan.dtype) if plan.keep else None
        return found, kept

    def body(carry, xs):
        return carry, score(*xs)

    flat = hidden.reshape(-1, hidden.shape[-1]), ids.reshape(-1)
    _, (found, probs) = jax.lax.scan(body, (), _chunks(plan, *flat))
    return *(_rows(x, ids.size).reshape(ids.shape) for x in found), probs


def _local_backward(plan: _Plan, hidden, kernel, ids, lse, probs, grads):
    head = _gathered(plan, kernel)

    def gradient(total, inputs):
        (hidden, ids, lse, grads), probs = inputs
        if probs is None:
            probs = jnp.exp(_logits(plan, hidden, head) - lse[:, None])
        is_chosen = jnp.arange(head.shape[1]) == _local_ids(plan, head, ids)[:, None]
        slope = (is_chosen - probs) * (grads / plan.temperature)[:, None]
        slope = slope.astype(plan.dtype)
        g_hidden = jnp.matmul(slope, head.T, preferred_element_type=jnp.float32)
        g_head = jnp.matmul(hidden.astype(plan.dtype).T, slope, preferred_element_type=jnp.float32)
        return total + g_head, _over(jax.lax.psum, plan.vocab, g_hidden)

    flat = [hidden.reshape(-1, hidden.shape[-1])]
    flat += [x.reshape(-1) for x in (ids, lse, grads)]
    chunks = _chunks(plan, *flat)
    total, g_hidden = jax.lax.scan(gradient, jnp.zeros(head.shape), (chunks, probs))
    g_kernel = _reduced(plan, total).astype(kernel.dtype)
    g_hidden = _rows(g_hidden, ids.size).reshape(hidden.shape)
    return g_hidden.astype(hidden.dtype), g_kernel


def _logits(plan: _Plan, hidden, head) -> jax.Array:
    """hidden: [N, D]; head: [D, v], this device's part. Returns: float32[N, v]."""
    logits = jnp.matmul(hidden.astype(plan.dtype), head, preferred_element_type=jnp.float32)
    return logits / plan.temperature


def _local_ids(plan: _Plan, head, ids) -> jax.Array:
    """Positions of ids in this device's part of the vocabulary; out of range if they are not."""
    return ids - jax.lax.axis_index(plan.vocab) * head.shape[1] if plan.vocab else ids


def _chosen(plan: _Plan, logits, head, ids) -> jax.Array:
    """The logit of each id, 0 on devices that do not have it: float32[N]."""
    at = _local_ids(plan, head, ids)
    inside = (at >= 0) & (at < head.shape[1])
    found = jnp.take_along_axis(logits, jnp.where(inside, at, 0)[:, None], axis=-1)[:, 0]
    return jnp.where(inside, found, 0.0)


def _gathered(plan: _Plan, kernel) -> jax.Array:
    """The kernel's whole columns, for this device's part of the vocabulary, in plan.dtype."""
    kernel = kernel.astype(plan.dtype)
    if not plan.embed:
        return kernel
    return jax.lax.all_gather(kernel, plan.embed, axis=0, tiled=True)


def _reduced(plan: _Plan, total) -> jax.Array:
    """Sum over the devices' rows of a gradient that looks like _gathered, laid as the kernel."""
    others = tuple(name for name in plan.rows if name not in plan.embed)
    # Devices that hold the same rows have computed the same: they must count once.
    copies = [name for name in plan.embed if name not in plan.rows]
    if copies:
        total = total / jax.lax.axis_size(tuple(copies))
    if plan.embed:
        total = jax.lax.psum_scatter(total, plan.embed, scatter_dimension=0, tiled=True)
    return _over(jax.lax.psum, others, total)


def _over(reduce: Callable, names: tuple[str, ...], x: jax.Array) -> jax.Array:
    return reduce(x, names) if names else x


def _chunks(plan: _Plan, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays [N, …] -> [count, n, …] with n of at most plan.chunk; the last rows are zeros."""
    size = arrays[0].shape[0]
    count = 1 if plan.chunk is None else -(-size // plan.chunk)

    def split(x):
        x = jnp.pad(x, [(0, -size % count)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(count, -1, *x.shape[1:])

    return tuple(map(split, arrays))


def _rows(chunks: jax.Array, size: int) -> jax.Array:
    """[count, n, …] -> [N, …]."""
    return chunks.reshape(-1, *chunks.shape[2:])[:size]
