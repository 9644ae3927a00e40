"""Qwen2 decoder (arXiv 2407.10671): scanned layers, functional KV cache, shared prefix.

Keys that a query may see come in up to two segments under one softmax: a *prefix* shared by the
G answers to one prompt (read only), and those of the row's own sequence: the call's tokens, or a
cache with them.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from paras2s_jax.models import axes
from paras2s_jax.models.kv_cache import View, make_cache, make_view, read, write
from paras2s_jax.models.layers import (
    Dense,
    RMSNorm,
    Segment,
    attend_segments,
    make_embed,
    matmul_out_first,
    rope,
)
from paras2s_jax.models.lora import NO_LORA, LoRA
from paras2s_jax.models.placement import constrain
from paras2s_jax.models.qwen2_config import Qwen2Config
from paras2s_jax.models.unrolled import unroll_kv

REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class _Part(nn.Module):
    """A part of a layer. out_first: kernels are stored [out, in]."""

    config: Qwen2Config
    lora: LoRA = NO_LORA
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    out_first: bool = False

    def _dense(self, name: str, features: int, kernel_axes, use_bias: bool = False) -> Dense:
        return Dense(
            features,
            use_bias=use_bias,
            kernel_axes=kernel_axes,
            lora_rank=self.lora.rank_of(name),
            lora_alpha=self.lora.alpha,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            out_first=self.out_first,
            name=name,
        )


class Qwen2Attention(_Part):
    """Grouped-query attention with rotary positions; in Qwen2 q, k, v have a bias, o has none."""

    @nn.compact
    def __call__(self, x, view: View, cache=None, layer=None, prefix=None):
        """x: float[B, T, D]; cache, layer: see kv_cache.write; prefix: {"k", "v"} [P, K, S, H].

        Returns: (float[B, T, D], the call's keys and values [B, K, T, H], the cache with them).
        """
        c = self.config
        rows, steps, _ = x.shape
        heads, kv_heads, width = c.num_attention_heads, c.num_key_value_heads, c.width_per_head

        def project(name, heads, axis, act_axis):
            y = self._dense(name, heads * width, (axes.EMBED, axis), c.attention_bias)(x)
            # First as the kernel's columns lie, then as attention wants it, and that before the
            # heads are told apart: their number need not divide over devices.
            y = constrain(y, (axes.ACT_BATCH, axes.ACT_LEN, axis))
            y = constrain(y, (axes.ACT_ATTN_BATCH, axes.ACT_LEN, act_axis))
            return y.reshape(rows, steps, heads, width)

        q = rope(project("q_proj", heads, axes.HEADS, axes.ACT_HEADS), view.cos, view.sin)
        k = rope(project("k_proj", kv_heads, axes.KV_HEADS, axes.ACT_KV_HEADS), view.cos, view.sin)
        v = project("v_proj", kv_heads, axes.KV_HEADS, axes.ACT_KV_HEADS)
        q = constrain(q, (axes.ACT_ATTN_BATCH, axes.ACT_LEN, axes.ACT_HEADS, None))
        kv_axes = (axes.ACT_ATTN_BATCH, axes.ACT_KV_HEADS, axes.ACT_LEN, None)
        own = {
            name: constrain(heads_last.swapaxes(1, 2), kv_axes)
            for name, heads_last in (("k", k), ("v", v))
        }
        seen = own
        if cache is not None:
            cache = write(cache, own, layer, view.cache_index)
            seen = read(cache, layer)
        segments = [Segment(**seen, mask=view.mask)]
        if prefix is not None:
            segments.insert(0, Segment(**prefix, mask=view.prefix_mask))
        y = attend_segments(q, segments).reshape(rows, steps, heads * width)
        y = constrain(y, (axes.ACT_ATTN_BATCH, axes.ACT_LEN, axes.ACT_HEADS))
        y = constrain(y, (axes.ACT_BATCH, axes.ACT_LEN, axes.HEADS))
        y = self._dense("o_proj", c.hidden_size, (axes.HEADS, axes.EMBED))(y)
        return y, own, cache


class Qwen2MLP(_Part):
    """down(silu(gate(x)) * up(x)), no biases."""

    @nn.compact
    def __call__(self, x):
        """x: float[B, T, D]. Returns: float[B, T, D]."""
        c = self.config
        gate = self._dense("gate_proj", c.intermediate_size, (axes.EMBED, axes.MLP))(x)
        up = self._dense("up_proj", c.intermediate_size, (axes.EMBED, axes.MLP))(x)
        hidden = _gated(gate, up)
        hidden = constrain(hidden, (axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_MLP))
        return self._dense("down_proj", c.hidden_size, (axes.MLP, axes.EMBED))(hidden)


@jax.checkpoint
def _gated(gate, up):
    """Only what the products made is kept for the backward pass, not also what follows from it."""
    return nn.silu(gate) * up


class Qwen2DecoderLayer(nn.Module):
    """Pre-norm block. emit: which per-layer arrays to return, of "kv" and "input"."""

    config: Qwen2Config
    lora: LoRA = NO_LORA
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    out_first: bool = False
    emit: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, carry, layer, prefix, view: View):
        """carry: x float[B, T, D], cache; for the rest see Qwen2Attention.

        Returns: (carry, {name: array for name in emit}).
        """
        x, cache = carry
        eps, types = self.config.rms_norm_eps, (self.dtype, self.param_dtype)
        part = (self.config, self.lora, *types, self.out_first)
        emitted = {"input": x} if "input" in self.emit else {}
        y = RMSNorm(eps, *types, name="input_layernorm")(x)
        y, own, cache = Qwen2Attention(*part, name="self_attn")(y, view, cache, layer, prefix)
        x = x + y
        y = RMSNorm(eps, *types, name="post_attention_layernorm")(x)
        x = x + Qwen2MLP(*part, name="mlp")(y)
        x = constrain(x, (axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_EMBED))
        if "kv" in self.emit:
            emitted["kv"] = own
        return (x, cache), emitted


class Qwen2Stack(nn.Module):
    """`num_layers` decoder layers under one lax.scan; parameters have a leading layer axis.

    unrolled: the layers one by one, each with parameters of its own and kernels [out, in] (see
    models/unrolled.py). Layer axes of caches, prefixes and outputs are tuples then.
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
    def __call__(self, x, view: View, *, cache=None, prefix=None, emit: tuple[str, ...] = ()):
        """Runs the layers over x: float[B, T, D].

        cache: {"k", "v"} of [layers, B, K, S, H] or None: the T new tokens are written from slot
        view.cache_index on, and see what it holds up to themselves. prefix: as cache, with P rows
        and P dividing B.
        Returns: (float[B, T, D], out) with out["cache"] (updated) if a cache is given,
        out["kv"] [layers, B, K, T, H] and out["input"] [layers, B, T, D] if named in emit.
        """
        layer = Qwen2DecoderLayer
        if self.remat != "none":
            layer = nn.remat(layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        fields = (self.config, self.lora, self.dtype, self.param_dtype, self.unrolled, emit)
        if self.unrolled:
            layers = [layer(*fields, name=f"layers_{i}") for i in range(self.num_layers)]
            x, cache, out = _one_by_one(layers, x, cache, prefix, view)
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
            numbers = jnp.arange(self.num_layers)
            (x, cache), out = stack(*fields, name="layers")((x, cache), numbers, prefix, view)
        return x, out if cache is None else out | {"cache": cache}


def _one_by_one(layers, x, cache, prefix, view: View):
    """What the scan over layers does, without it: over layers, arrays are tuples."""

    def of(kv, i):
        return None if kv is None else {name: value[i] for name, value in kv.items()}

    caches, emitted = [], []
    for i, layer in enumerate(layers):
        (x, written), out = layer((x, of(cache, i)), None, of(prefix, i), view)
        caches.append(written)
        emitted.append(out)
    cache, out = (jax.tree.map(lambda *leaves: leaves, *each) for each in (caches, emitted))
    return x, cache, out


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
                out_first=self.unrolled,
            )

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens: int32[B, T]. Returns: float[B, T, D]."""
        return self.embed_tokens(tokens)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden: float[..., D], after the final norm. Returns: float32[..., V]."""
        if self.config.tie_word_embeddings and self.unrolled:
            table = self.embed_tokens.embedding.astype(self.dtype)
            rows = hidden.reshape(-1, hidden.shape[-1])
            logits = matmul_out_first(rows, table, preferred_element_type=jnp.float32)
            return logits.reshape(*hidden.shape[:-1], -1)
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

        attention_mask: bool or int[B, T], with a cache [B, S] (nonzero = real), and position_ids:
        int32[B, T] or int32[3, B, T], see make_view; cache, prefix, emit: see Qwen2Stack;
        cache_index: int32[], how many slots are filled; prefix_mask: bool or int[P, S]. To decode
        after ragged prompts: run them once with emit=("kv",), then pass out["kv"] and their mask as
        prefix, positions counted from each prompt's length, and a cache for the new tokens.
        Returns: (float32[B, T, V], out) with out["hidden"] float[B, T, D] and Qwen2Stack's.
        """
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds.astype(self.dtype)
        x = constrain(x, (axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_EMBED))
        view = make_view(
            self.config,
            x,
            mask=attention_mask,
            positions=position_ids,
            cache=cache,
            cache_index=cache_index,
            prefix_mask=prefix_mask,
        )
        x, out = self.stack(x, view, cache=cache, prefix=prefix, emit=emit)
        out["hidden"] = self.norm(x)
        logits = self.logits(out["hidden"])
        logits = constrain(logits, (axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_VOCAB))
        return logits, out

    def init_cache(self, rows: int, size: int) -> dict:
        """Empty cache for `size` tokens of `rows` rows."""
        cache = make_cache(self.config, self.config.num_hidden_layers, rows, size, self.dtype)
        return unroll_kv(cache) if self.unrolled else cache


def last_real(values: jax.Array, mask: jax.Array) -> jax.Array:
    """The value at each row's last real position. values: [B, T, …]; mask: bool[B, T] -> [B, …]."""
    last = jnp.max(jnp.where(mask, jnp.arange(mask.shape[1]), 0), axis=1)
    return values[jnp.arange(len(values)), last]
