"""Whisper's configuration and blocks (transformers: modeling_whisper.py); see whisper.py."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from paras2s_jax.models import axes
from paras2s_jax.models.layers import (
    KERNEL_INIT,
    Dense,
    LayerNorm,
    Segment,
    attend,
    attend_segments,
)
from paras2s_jax.models.lora import NO_LORA, LoRA
from paras2s_jax.models.placement import constrain
from paras2s_jax.models.qwen2 import REMAT_POLICIES

# Settings of a config.json that no released Whisper changes.
_ONLY = {
    "activation_function": "gelu",
    "scale_embedding": False,
    "use_weighted_layer_sum": False,
}


@dataclass(frozen=True)
class WhisperConfig:
    """Sizes; names follow Hugging Face's config.json. Decoder and classifier may be unused."""

    d_model: int
    encoder_layers: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    num_mel_bins: int = 80
    max_source_positions: int = 1500
    vocab_size: int = 51_865
    decoder_layers: int = 0
    decoder_attention_heads: int = 1
    decoder_ffn_dim: int = 0
    max_target_positions: int = 448
    classifier_proj_size: int = 256

    @classmethod
    def from_json(cls, path: str | Path) -> "WhisperConfig":
        """Reads config.json (also one that nests these keys under "encoder").

        Raises ValueError, naming the key, where it asks for what is not implemented.
        """
        values: Mapping = json.loads(Path(path).read_text())
        values = values.get("encoder", values)
        names = [field.name for field in fields(cls)]
        missing = [name for name in names[:4] if name not in values]
        if missing:
            raise ValueError(f"{path}: keys missing from the config: {', '.join(missing)}")
        for key, only in _ONLY.items():
            if values.get(key, only) != only:
                raise ValueError(f"{path}: {key} {values[key]!r} is not supported, only {only!r}")
        return cls(**{name: values[name] for name in names if name in values})


def sinusoids(length: int, width: int) -> np.ndarray:
    """Whisper's position table, sines then cosines (whisper/model.py). float32[length, width]."""
    step = np.log(10_000.0) / (width // 2 - 1)
    angles = np.arange(length)[:, None] * np.exp(-step * np.arange(width // 2))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def sinusoid_init(_key, shape, dtype):
    """Initialises a position table with `sinusoids`."""
    return jnp.asarray(sinusoids(*shape), dtype)


def mel_conv(
    width: int, stride: int, padding: tuple[int, int], dtype, param_dtype, name: str
) -> nn.Conv:
    """Convolution over time with three taps; padding: zeros before and after."""
    return nn.Conv(
        width,
        kernel_size=(3,),
        strides=stride,
        padding=(padding,),
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=nn.with_logical_partitioning(KERNEL_INIT, (None, axes.FEATURES, axes.EMBED)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, (axes.EMBED,)),
        name=name,
    )


class Attention(nn.Module):
    """Multi-head attention to a source, to given keys, or to a cache and the own tokens.

    key_bias: whether the keys have a bias, which Whisper does without.
    """

    num_heads: int
    lora: LoRA = NO_LORA
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    key_bias: bool = False

    def _dense(self, name: str, features: int, kernel_axes) -> Dense:
        return Dense(
            features,
            use_bias=name != "k_proj" or self.key_bias,
            kernel_axes=kernel_axes,
            lora_rank=self.lora.rank_of(name),
            lora_alpha=self.lora.alpha,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )

    @nn.compact
    def __call__(self, x, source, *, mask=None, kv=None, cache=None, cache_mask=None):
        """x: float[B, T, D]; source: float[B, S, D], unused if kv ([B, S, N, H] each) is given.

        mask: bool[B or 1, T or 1, S]; cache: as kv, seen before the source under one softmax
        with cache_mask. Returns: (float[B, T, D], {"k", "v"} of the source).
        """
        width = x.shape[-1]

        def project(name, inputs):
            y = self._dense(name, width, (axes.EMBED, axes.HEADS))(inputs)
            y = y.reshape(*y.shape[:2], self.num_heads, width // self.num_heads)
            return constrain(y, (axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_HEADS, None))

        q = project("q_proj", x)
        if kv is None:
            kv = {"k": project("k_proj", source), "v": project("v_proj", source)}
        if cache is None:
            y = attend(q, kv["k"], kv["v"], None if mask is None else mask[:, None])
        else:
            y = attend_segments(
                q,
                [
                    Segment(seen["k"].swapaxes(1, 2), seen["v"].swapaxes(1, 2), seen_mask)
                    for seen, seen_mask in ((cache, cache_mask), (kv, mask))
                ],
            )
        y = y.reshape(*y.shape[:2], width)
        return self._dense("out_proj", width, (axes.HEADS, axes.EMBED))(y), kv


class FeedForward(nn.Module):
    """fc2(gelu(fc1(x))), with the exact GELU."""

    hidden_size: int
    lora: LoRA = NO_LORA
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        """x: float[B, T, D]. Returns: float[B, T, D]."""

        def dense(name, features, kernel_axes):
            return Dense(
                features,
                kernel_axes=kernel_axes,
                lora_rank=self.lora.rank_of(name),
                lora_alpha=self.lora.alpha,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=name,
            )

        hidden = dense("fc1", self.hidden_size, (axes.EMBED, axes.MLP))(x)
        hidden = nn.gelu(hidden, approximate=False)
        hidden = constrain(hidden, (axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_MLP))
        return dense("fc2", x.shape[-1], (axes.MLP, axes.EMBED))(hidden)


class EncoderLayer(nn.Module):
    """Pre-norm block. emit: whether to return its output per layer as well."""

    config: WhisperConfig
    lora: LoRA = NO_LORA
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    emit: bool = False

    @nn.compact
    def __call__(self, x, mask):
        """x: float[B, T, D]; mask: bool[B or 1, T or 1, T], what each query sees, or None."""
        c, types = self.config, (self.dtype, self.param_dtype)
        y = LayerNorm(1e-5, *types, name="self_attn_layer_norm")(x)
        attention = Attention(c.encoder_attention_heads, self.lora, *types, name="self_attn")
        x = x + attention(y, y, mask=mask)[0]
        y = LayerNorm(1e-5, *types, name="final_layer_norm")(x)
        x = x + FeedForward(c.encoder_ffn_dim, self.lora, *types, name="mlp")(y)
        x = constrain(x, (axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_EMBED))
        return x, x if self.emit else None


class DecoderLayer(nn.Module):
    """Pre-norm block with cross attention. emit: whether to return its keys and values."""

    config: WhisperConfig
    lora: LoRA = NO_LORA
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    emit: bool = False

    @nn.compact
    def __call__(self, x, cache, cross_kv, encoded, masks):
        """x: float[B, T, D]; cache, cross_kv: {"k", "v"} of [B, S, N, H] or None.

        encoded: float[B, S, D], needed unless cross_kv is given; masks: {"own", "cache", "cross"}.
        """
        c, types = self.config, (self.dtype, self.param_dtype)
        heads = c.decoder_attention_heads
        y = LayerNorm(1e-5, *types, name="self_attn_layer_norm")(x)
        attention = Attention(heads, self.lora, *types, name="self_attn")
        y, kv = attention(y, y, mask=masks["own"], cache=cache, cache_mask=masks["cache"])
        x = x + y
        y = LayerNorm(1e-5, *types, name="encoder_attn_layer_norm")(x)
        attention = Attention(heads, self.lora, *types, name="encoder_attn")
        y, cross_kv = attention(y, encoded, mask=masks["cross"], kv=cross_kv)
        x = x + y
        y = LayerNorm(1e-5, *types, name="final_layer_norm")(x)
        x = x + FeedForward(c.decoder_ffn_dim, self.lora, *types, name="mlp")(y)
        x = constrain(x, (axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_EMBED))
        return x, {"kv": kv, "cross_kv": cross_kv} if self.emit else None


def scan_layers(layer, num_layers: int, scan_unroll: int, remat: str, in_axes):
    """The layer class under one lax.scan, parameters stacked on a leading axis."""
    if remat != "none":
        layer = nn.remat(layer, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return nn.scan(
        layer,
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=num_layers,
        unroll=max(1, min(scan_unroll, num_layers)),
        metadata_params={nn.PARTITION_NAME: axes.LAYERS},
    )
