"""What chunk-wise detokenizing is made of: prefix, stream state, plan, cross-fade and noise."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from paras2s_jax.models import axes
from paras2s_jax.models.flow_matching import FRAMES_PER_CODE

# Of the prefix from one run of chunks to the next: enough that the release's chunks are one run.
WINDOW_GROWTH = 16


class Prefix(struct.PyTreeNode):
    """Frames that later ones attend to; the newest lie at the end.

    k, v: [depth, B, max_kv, N, H], keys rotated. length: int32[], how many are filled.
    position: int32[], of the next frame; grows on when old frames leave the window.
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array
    position: jax.Array

    @property
    def cache(self) -> dict:
        return {"k": self.k, "v": self.v}

    @property
    def mask(self) -> jax.Array:
        """bool[1, max_kv]."""
        size = self.k.shape[2]
        return (jnp.arange(size) >= size - self.length)[None]

    def append(self, kv: dict, size: int | None = None) -> "Prefix":
        """Takes over keys and values of T more frames, [depth, B, T, N, H]; drops the oldest.

        size: slots of the result, by default as many as before.
        """
        size, new = self.k.shape[2] if size is None else size, kv["k"].shape[2]

        def join(old, x):
            return _resized(jnp.concatenate([old, x.astype(old.dtype)], axis=2), size)

        return Prefix(
            join(self.k, kv["k"]),
            join(self.v, kv["v"]),
            jnp.minimum(self.length + new, size),
            self.position + new,
        )

    def resized(self, size: int) -> "Prefix":
        """The same with `size` slots, not fewer than are filled."""
        return self.replace(k=_resized(self.k, size), v=_resized(self.v, size))

    def restart(self, num_kept: int, limit: int, voice: "Prefix | None" = None) -> "Prefix":
        """Back to the voice prompt, or to nothing, if two more such chunks would pass `limit`."""
        full = self.position + 2 * num_kept > limit
        if voice is None:
            voice = self.replace(length=jnp.int32(0), position=jnp.int32(0))
        return jax.tree.map(lambda new, old: jnp.where(full, new, old), voice, self)


def _resized(x: jax.Array, size: int) -> jax.Array:
    """The newest of [depth, B, S, N, H], or all of them behind empty slots."""
    spare = size - x.shape[2]
    if spare >= 0:
        return jnp.pad(x, ((0, 0), (0, 0), (spare, 0), (0, 0), (0, 0)))
    return x[:, :, -spare:]


class StreamState(struct.PyTreeNode):
    """What a stream carries from chunk to chunk; all rows are at the same point.

    held: int32[B, look-ahead or 0] codes to be solved anew. pre_mel: float32[B, q, M] and
    pre_wav: float32[B, n], not yet returned; empty before the first chunk. voice: the prefix
    after the voice prompt, to which a long stream returns; None without one.
    """

    prefix: Prefix
    held: jax.Array
    pre_mel: jax.Array
    pre_wav: jax.Array
    voice: Prefix | None = None


def frame_mask(len_codes: jax.Array, num_codes: int) -> jax.Array:
    """bool[B, 4 * num_codes], True for frames of real codes. len_codes: int32[B]."""
    return jnp.arange(FRAMES_PER_CODE * num_codes) < FRAMES_PER_CODE * len_codes[:, None]


def chunk_plan(
    num_codes: int, first: int, chunk: int, look_ahead: int
) -> list[tuple[int, int, int]]:
    """What the vocoder reads and gives out of an answer that goes on, chunk by chunk.

    Returns: (begin, end, given) in frames for each chunk: it reads begin … end, and given frames
    are heard from begin on, which is where the next chunk's begin lies.
    """
    count = max(-(-(num_codes - first) // chunk), 0)  # After the first chunk.
    plan, begin, left = [], 0, 0
    for number in range(count + 1):
        end = FRAMES_PER_CODE * (first - look_ahead + number * chunk)
        given, left = hand_over(left, end - begin)
        plan.append((begin, end, given))
        begin += given
    return plan


def window_plan(count: int, first_kept: int, kept: int, max_kv: int) -> list[tuple[int, int, int]]:
    """How far back chunks 1 … count look: a program for each run of chunks, not for each chunk.

    first_kept, kept: frames that the first chunk and each later one leave to the prefix.
    Returns: (first chunk, end, slots of the prefix) of each run: as many as the prefix fills, and
    the next chunk's. In a few runs, because every one is compiled by itself.
    """

    def filled(number):
        return min(max_kv, first_kept + (min(number, count) - 1) * kept)

    runs, begin = [], 1
    while begin <= count:
        size = min(max(WINDOW_GROWTH * filled(begin), filled(begin + 1)), filled(count))
        end = begin + 1
        while end <= count and filled(end + 1) <= size:
            end += 1
        runs.append((begin, end, size))
        begin = end
    return runs


def hand_over(num_before: int, size: int) -> tuple[int, int]:
    """How much of a piece is given out, and how much waits for the next one.

    num_before: what of the piece was held back last time, 0 in the first piece; in samples or,
    where they come out whole, in frames.
    """
    given = 2 * num_before if 0 < 2 * num_before < size else size // 2
    return given, size - given


def cross_fade(before: jax.Array, wave: jax.Array, size: jax.Array | int | None = None):
    """Fades from the old rendering to the new one over the first half of `size` samples.

    By the halves of a periodic Hamming window of that size, whose sum is 1.08.
    before, wave: float32[B, n] and [B, L]; before has half of `size` samples or more. size: int or
    int32[], by default L. Returns: as wave.
    """
    length = wave.shape[1]
    size = length if size is None else size
    before = jnp.pad(before[:, :length], ((0, 0), (0, max(length - before.shape[1], 0))))
    at = jnp.arange(length)
    half = size // 2

    def window(at):
        return 0.54 - 0.46 * jnp.cos(2 * np.pi * (at / size))

    faded = before * window(size - half + at) + wave * window(at)
    return jnp.where(at < half, faded, wave)


def by_length(function: Callable, lens: jax.Array, rows, size: int | None):
    """function(rows), `size` rows at a time, those of like lengths together; the last may be fewer.

    lens: int32[B]; rows, and what the function returns: pytrees of [B, …]. size None: all at once.
    """
    num_rows = len(lens)
    if size is None or size >= num_rows:
        return function(rows)
    order = jnp.argsort(-lens, stable=True)
    count = -(-num_rows // size)
    # Spare rows repeat the shortest one.
    taken = jnp.pad(order, (0, count * size - num_rows), mode="edge").reshape(count, size)

    def batch(chosen):
        return function(jax.tree.map(lambda x: _spread(x[chosen]), rows))

    made = jax.lax.map(batch, taken)
    place = jnp.argsort(order)
    return jax.tree.map(lambda y: _spread(y.reshape(-1, *y.shape[2:])[place]), made)


def _spread(x: jax.Array) -> jax.Array:
    return nn.with_logical_constraint(x, (axes.ACT_BATCH,) + (None,) * (x.ndim - 1))


def row_keys(rng: jax.Array | None, rows: int) -> jax.Array:
    """Keys [B] of the rows, from one key, from keys [B], or from nothing (key 0)."""
    rng = jax.random.key(0) if rng is None else rng
    if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        rng = jax.random.wrap_key_data(rng)
    return rng if rng.ndim else jax.vmap(lambda row: jax.random.fold_in(rng, row))(jnp.arange(rows))


def draw_noise(keys: jax.Array, number: jax.Array, num_codes: int, num_mels: int) -> jax.Array:
    """Noise of chunk `number`, code by code, so that it does not depend on how many follow.

    keys: [B]. Returns: float32[B, 4 * num_codes, num_mels].
    """

    def of_code(key, code):
        return jax.random.normal(jax.random.fold_in(key, code), (FRAMES_PER_CODE, num_mels))

    def of_row(key):
        key = jax.random.fold_in(key, number)
        noise = jax.vmap(of_code, in_axes=(None, 0))(key, jnp.arange(num_codes))
        return noise.reshape(-1, num_mels)

    return jax.vmap(of_row)(keys)
