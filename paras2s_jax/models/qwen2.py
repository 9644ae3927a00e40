"""Qwen2 decoder (arXiv 2407.10671): scanned layers, functional KV cache, shared prefix.

Keys that a query may see come in up to three segments under one softmax: a *prefix* shared
by the G answers to one prompt (read only), a *cache* of earlier steps, and the call's own
tokens. The cache is read inside the layer scan and written once after it, so that a decode
step moves one token per layer, not the cache.
"""

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from paras2s_jax.models import axes
from paras2s_jax.models.layers import (
    Dense,
    RMSNorm,
    Segment,
    attend_segments,
    make_embed,
    rope,
    rope_angles,
)
from paras2s_jax.models.lora import NO_LORA, LoRA
from paras2s_jax.models.qwen2_config import Qwen2Config

REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def make_cache(config: Qwen2Config, num_layers: int, rows: int, size: int, dtype) -> dict:
    """Empty cache {"k", "v"}: dtype[layers, B, S, K, H]."""
    shape = (num_layers, rows, size, config.num_key_value_heads, config.width_per_head)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


class View(struct.PyTreeNode):
    """What all layers share in one call: rotary angles and the visibility of each segment.

    cos, sin: float32[B, T, 1, H // 2]; own_mask: bool[B or 1, T, T]; cache_mask: bool[1, 1, S];
    prefix_mask: bool[P, 1, S].
    """

    cos: jax.Array
    sin: jax.Array
    own_mask: jax.Array
    cache_mask: jax.Array | None = None
    prefix_mask: jax.Array | None = None


class Qwen2Attention(nn.Module):
    """Grouped-query attention with rotary positions; in Qwen2 q, k, v have a bias, o has none."""

    config: Qwen2Config
    lora: LoRA = NO_LORA
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def _dense(self, name: str, features: int, kernel_axes, use_bias: bool) -> Dense:
        return Dense(
            features,
            use_bias=use_bias,
            kernel_axes=kernel_axes,
            lora_rank=self.lora.rank_of(name),
            lora_alpha=self.lora.alpha,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )

    @nn.compact
    def __call__(self, x, view: View, cache=None, prefix=None):
        """x: float[B, T, D]. Returns: (float[B, T, D], own keys and values [B, T, K, H])."""
        c = self.config
        rows, steps, _ = x.shape
        heads, kv_heads, width = c.num_attention_heads, c.num_key_value_heads, c.width_per_head

        def project(name, heads, axis):
            y = self._dense(name, heads * width, (axes.EMBED, axis), c.attention_bias)(x)
            return y.reshape(rows, steps, heads, width)

        q = rope(project("q_proj", heads, axes.HEADS), view.cos, view.sin)
        k = rope(project("k_proj", kv_heads, axes.KV_HEADS), view.cos, view.sin)
        v = project("v_proj", kv_heads, axes.KV_HEADS)
        q = nn.with_logical_constraint(q, (axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_HEADS, None))
        kv_axes = (axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_KV_HEADS, None)
        k = nn.with_logical_constraint(k, kv_axes)
        v = nn.with_logical_constraint(v, kv_axes)
        segments = [Segment(k, v, view.own_mask)]
        if cache is not None:
            segments.insert(0, Segment(cache["k"], cache["v"], view.cache_mask))
        if prefix is not None:
            segments.insert(0, Segment(prefix["k"], prefix["v"], view.prefix_mask))
        y = attend_segments(q, segments).reshape(rows, steps, heads * width)
        y = self._dense("o_proj", c.hidden_size, (axes.HEADS, axes.EMBED), False)(y)
        return y, {"k": k, "v": v}


class Qwen2MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    config: Qwen2Config
    lora: LoRA = NO_LORA
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def _dense(self, name: str, features: int, kernel_axes) -> Dense:
        return Dense(
            features,
            use_bias=False,
            kernel_axes=kernel_axes,
            lora_rank=self.lora.rank_of(name),
            lora_alpha=self.lora.alpha,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )

    @nn.compact
    def __call__(self, x):
        """x: float[B, T, D]. Returns: float[B, T, D]."""
        c = self.config
        gate = self._dense("gate_proj", c.intermediate_size, (axes.EMBED, axes.MLP))(x)
        up = self._dense("up_proj", c.intermediate_size, (axes.EMBED, axes.MLP))(x)
        hidden = nn.silu(gate) * up
        hidden = nn.with_logical_constraint(hidden, (axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_MLP))
        return self._dense("down_proj", c.hidden_size, (axes.MLP, axes.EMBED))(hidden)


class Qwen2DecoderLayer(nn.Module):
    """Pre-norm block. emit: which per-layer arrays to return, of "kv" and "input"."""

    config: Qwen2Config
    lora: LoRA = NO_LORA
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    emit: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x, cache, prefix, view: View):
        """x: float[B, T, D]. Returns: (float[B, T, D], {name: array for name in emit})."""
        eps, types = self.config.rms_norm_eps, (self.dtype, self.param_dtype)
        emitted = {"input": x} if "input" in self.emit else {}
        y = RMSNorm(eps, *types, name="input_layernorm")(x)
        attention = Qwen2Attention(self.config, self.lora, *types, name="self_attn")
        y, kv = attention(y, view, cache, prefix)
        x = x + y
        y = RMSNorm(eps, *types, name="post_attention_layernorm")(x)
        x = x + Qwen2MLP(self.config, self.lora, *types, name="mlp")(y)
        x = nn.with_logical_constraint(x, (axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_EMBED))
        if "kv" in self.emit:
            emitted["kv"] = kv
        return x, emitted


class Qwen2Stack(nn.Module):
    """`num_layers` decoder layers under one lax.scan; parameters have a leading layer axis.

    unrolled: the layers one by one, each with parameters of its own (unroll_variables). Compiles
    longer, but in a decoding loop no step cuts its weights and keys out of stacked arrays, which
    on a CPU costs more than to multiply with them. Layer axes of caches, prefixes and outputs
    are tuples then.
    """

    config: Qwen2Config
    num_layers: int
    lora: LoRA = NO_LORA
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    scan_unroll: int = 1
    remat: str = "none"
    unrolled: bool = False

    @nn.compact
    def __call__(
        self,
        x,
        view: View,
        *,
        cache=None,
        cache_index=None,
        prefix=None,
        emit: tuple[str, ...] = (),
    ):
        """Runs the layers over x: float[B, T, D].

        cache: {"k", "v"} of [layers, B, S, K, H] or None; cache_index: int32[], how many of
        its S slots are filled: the T new tokens are written there. prefix: as cache, with P
        rows and P dividing B.
        Returns: (float[B, T, D], out) with out["cache"] (updated) if a cache is given,
        out["kv"] [layers, B, T, K, H] and out["input"] [layers, B, T, D] if named in emit.
        """
        layer = Qwen2DecoderLayer
        if self.remat != "none":
            layer = nn.remat(layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        inner_emit = emit if cache is None else tuple({*emit, "kv"})
        fields = (self.config, self.lora, self.dtype, self.param_dtype, inner_emit)
        if self.unrolled:
            layers = [layer(*fields, name=f"layers_{i}") for i in range(self.num_layers)]
            x, out = _one_by_one(layers, x, cache, prefix, view)
        else:
            stack = nn.scan(
                layer,
                variable_axes={"params": 0, "lora": 0},
                split_rngs={"params": True},
                in_axes=(0, 0, nn.broadcast),
                length=self.num_layers,
                unroll=min(self.scan_unroll, self.num_layers),
                metadata_params={nn.PARTITION_NAME: axes.LAYERS},
            )
            x, out = stack(*fields, name="layers")(x, cache, prefix, view)
        if cache is not None:
            out["cache"] = jax.tree.map(functools.partial(_write, at=cache_index), cache, out["kv"])
        return x, out


def _one_by_one(layers, x, cache, prefix, view: View):
    """What the scan over layers does, without it: emitted arrays are tuples over layers."""
    emitted = []
    for i, layer in enumerate(layers):
        cached, shared = (
            None if kv is None else {name: value[i] for name, value in kv.items()}
            for kv in (cache, prefix)
        )
        x, out = layer(x, cached, shared, view)
        emitted.append(out)
    return x, jax.tree.map(lambda *leaves: leaves, *emitted)


def _write(cached: jax.Array, new: jax.Array, at) -> jax.Array:
    """Puts the keys or values [..., T, K, H] of new tokens into the slots from `at`."""
    start = (0,) * (cached.ndim - 3) + (at, 0, 0)
    return jax.lax.dynamic_update_slice(cached, new.astype(cached.dtype), start)


def unroll_variables(variables: Mapping) -> dict:
    """Variables of a model with scanned layers -> of the same model with unrolled=True."""
    made = {}
    for key, value in variables.items():
        if key == "layers":
            for i in range(len(jax.tree.leaves(value)[0])):
                made[f"layers_{i}"] = jax.tree.map(lambda x, i=i: x[i], value)
        else:
            made[key] = unroll_variables(value) if isinstance(value, Mapping) else value
    return made


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

    mask: bool or int[B, T], which of the call's own tokens are real (default all; a call that
    writes to a cache must have real tokens only). positions: int32[B, T], or int32[3, B, T] if the
    config has an mrope_section, by default cache_index + 0, 1, 2, …, padding included (only
    differences matter).
    """
    steps = x.shape[1]
    if positions is None:
        start = 0 if cache_index is None else cache_index
        positions = (start + jnp.arange(steps))[None]
    cos, sin = rope_angles(
        positions,
        config.width_per_head,
        config.rope_theta,
        config.rope_scaling,
        config.mrope_section,
    )
    own_mask = jnp.tril(jnp.ones((steps, steps), bool))[None]
    if mask is not None:
        own_mask = own_mask & mask.astype(bool)[:, None, :]
    cache_mask = None
    if cache is not None:
        cache_mask = (jnp.arange(_num_slots(cache)) < cache_index)[None, None]
    if prefix_mask is not None:
        prefix_mask = prefix_mask.astype(bool)[:, None, :]
    return View(cos, sin, own_mask, cache_mask, prefix_mask)


def _num_slots(cache: dict) -> int:
    """Size of a cache whose layer axis is the first one or a tuple."""
    k = cache["k"]
    return k[0].shape[1] if isinstance(k, tuple) else k.shape[2]


class Qwen2LM(nn.Module):
    """Qwen2 language model (Hugging Face: Qwen2ForCausalLM). unrolled: see Qwen2Stack."""

    config: Qwen2Config
    lora: LoRA = NO_LORA
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    scan_unroll: int = 1
    remat: str = "none"
    unrolled: bool = False

    def setup(self):
        c, types = self.config, (self.dtype, self.param_dtype)
        self.embed_tokens = make_embed(c.vocab_size, c.hidden_size, *types)
        self.stack = Qwen2Stack(
            c,
            c.num_hidden_layers,
            self.lora,
            *types,
            self.scan_unroll,
            self.remat,
            self.unrolled,
        )
        self.norm = RMSNorm(c.rms_norm_eps, *types)
        if not c.tie_word_embeddings:
            self.lm_head = Dense(
                c.vocab_size,
                use_bias=False,
                kernel_axes=(axes.EMBED, axes.VOCAB),
                lora_rank=self.lora.rank_of("lm_head"),
                lora_alpha=self.lora.alpha,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                out_dtype=jnp.float32,
            )

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens: int32[B, T]. Returns: float[B, T, D]."""
        return self.embed_tokens(tokens)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden: float[..., D], after the final norm. Returns: float32[..., V]."""
        if self.config.tie_word_embeddings:
            return self.embed_tokens.attend(hidden).astype(jnp.float32)
        return self.lm_head(hidden)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        *,
        inputs_embeds: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        cache: dict | None = None,
        cache_index: jax.Array | None = None,
        prefix: dict | None = None,
        prefix_mask: jax.Array | None = None,
        emit: tuple[str, ...] = (),
    ):
        """Logits of input_ids: int32[B, T] or of inputs_embeds: float[B, T, D] (give one).

        attention_mask: bool or int[B, T] (nonzero = real) and position_ids: int32[B, T] or
        int32[3, B, T], see make_view; cache, cache_index, prefix, emit: see Qwen2Stack;
        prefix_mask: bool or int[P, S]. To decode after ragged prompts: run them once with
        emit=("kv",), then pass out["kv"] and their mask as prefix, positions counted from each
        prompt's length, and a cache for the new tokens.
        Returns: (float32[B, T, V], out) with out["hidden"] float[B, T, D] and Qwen2Stack's.
        """
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds.astype(self.dtype)
        x = nn.with_logical_constraint(x, (axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_EMBED))
        view = make_view(
            self.config,
            x,
            mask=attention_mask,
            positions=position_ids,
            cache=cache,
            cache_index=cache_index,
            prefix_mask=prefix_mask,
        )
        x, out = self.stack(x, view, cache=cache, cache_index=cache_index, prefix=prefix, emit=emit)
        out["hidden"] = self.norm(x)
        logits = self.logits(out["hidden"])
        logits = nn.with_logical_constraint(logits, (axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_VOCAB))
        return logits, out

    def init_cache(self, rows: int, size: int) -> dict:
        """Empty cache for `size` tokens of `rows` rows."""
        cache = make_cache(self.config, self.config.num_hidden_layers, rows, size, self.dtype)
        return {name: tuple(x) for name, x in cache.items()} if self.unrolled else cache


def last_real(values: jax.Array, mask: jax.Array) -> jax.Array:
    """The value at each row's last real position. values: [B, T, …]; mask: bool[B, T] -> [B, …]."""
    last = jnp.max(jnp.where(mask, jnp.arange(mask.shape[1]), 0), axis=1)
    return values[jnp.arange(len(values)), last]
