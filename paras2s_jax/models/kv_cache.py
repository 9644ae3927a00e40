"""What the layers of a decoder share in one call, and the keys and values that they keep.

A cache holds them heads first, {"k", "v"}: [layers, B, K, S, H], as attention multiplies them. A
layer writes its new tokens into it before it reads: a decode step then changes one slot of each
layer in place, and all that a token sees of its own sequence is one array.
"""

import jax
import jax.numpy as jnp
from flax import struct

from paras2s_jax.models.layers import rope_angles
from paras2s_jax.models.qwen2_config import Qwen2Config


def make_cache(config: Qwen2Config, num_layers: int, rows: int, size: int, dtype) -> dict:
    """Empty cache {"k", "v"}: dtype[layers, B, K, S, H]."""
    shape = (num_layers, rows, config.num_key_value_heads, size, config.width_per_head)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def num_slots(cache: dict) -> int:
    """S of a cache whose layer axis is the first one or a tuple."""
    return cache["k"][0].shape[-2]


def with_room(kv: dict, room: int) -> dict:
    """Keys and values of a call, as a cache with `room` more slots; per layer or stacked."""

    def pad(x):
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, room), (0, 0)])

    return jax.tree.map(pad, kv)


def write(cache: dict, new: dict, layer: jax.Array | None, at: jax.Array) -> dict:
    """Puts new tokens [B, K, T, H] into the slots from `at` of a layer.

    layer: int32[], or None if the cache is that of one layer, [B, K, S, H].
    """
    lead = () if layer is None else (layer,)

    def put(cached, new):
        new = new.astype(cached.dtype).reshape((1,) * len(lead) + new.shape)
        return jax.lax.dynamic_update_slice(cached, new, (*lead, 0, 0, at, 0))

    return jax.tree.map(put, cache, new)


def read(cache: dict, layer: jax.Array | None) -> dict:
    """Keys and values of one layer, [B, K, S, H]; layer: as `write` has it."""
    if layer is None:
        return cache
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), cache)


class View(struct.PyTreeNode):
    """Rotary angles, and the visibility of keys.

    cos, sin: float32[B, T, 1, H // 2]; mask: bool[B or 1, T, S], of the sequence's own keys, which
    are the call's T tokens, or the cache if there is one; cache_index: int32[], the slot of the
    call's first token; prefix_mask: bool[P, 1, S].
    """

    cos: jax.Array
    sin: jax.Array
    mask: jax.Array
    cache_index: jax.Array | None = None
    prefix_mask: jax.Array | None = None


def make_view(
    config: Qwen2Config,
    x: jax.Array,
    *,
    mask: jax.Array | None = None,
    positions: jax.Array | None = None,
    cache: dict | None = None,
    cache_index: jax.Array | None = None,
    prefix_mask: jax.Array | None = None,
) -> View:
    """Angles and masks of one call on x: [B, T, D].

    mask: bool or int[B, T], which of the call's own tokens are real, or with a cache [B, S], which
    of its slots are, the call's own included (default all). positions: int32[B, T], or
    int32[3, B, T] if the config has an mrope_section, by default cache_index + 0, 1, 2, …, padding
    included (only differences matter).
    """
    steps = x.shape[1]
    first = 0 if cache_index is None else cache_index
    own = first + jnp.arange(steps)
    cos, sin = rope_angles(
        own[None] if positions is None else positions,
        config.width_per_head,
        config.rope_theta,
        config.rope_scaling,
        config.mrope_section,
    )
    slots = jnp.arange(steps if cache is None else num_slots(cache))
    seen = (slots <= own[:, None])[None]
    if mask is not None:
        seen = seen & mask.astype(bool)[:, None, :]
    if prefix_mask is not None:
        prefix_mask = prefix_mask.astype(bool)[:, None, :]
    return View(cos, sin, seen, cache_index, prefix_mask)
