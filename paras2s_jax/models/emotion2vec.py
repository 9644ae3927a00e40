"""emotion2vec (arXiv 2312.15185): the data2vec 2.0 encoder of speech with a head for emotions.

Names and arithmetic follow funasr's models/emotion2vec (model.py, audio.py, base.py, modules.py),
in the layout of the released checkpoints: post-norm blocks, symmetric ALiBi with a learned scale.
Unlike there, padding is hidden from the position convolutions too, so that a padded row equals the
row alone.
"""

import ast
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import yaml

from paras2s_jax.audio.level import standardize
from paras2s_jax.models import axes
from paras2s_jax.models.layers import KERNEL_INIT, Dense, LayerNorm, attend
from paras2s_jax.models.lora import NO_LORA
from paras2s_jax.models.placement import constrain
from paras2s_jax.models.wave_conv import SameConv, WaveConv, mean_over_time
from paras2s_jax.models.whisper_layers import FeedForward, scan_layers

# What funasr adds to the variance of a wave (F.layer_norm's default).
STANDARDIZE_EPS = 1e-5

# What config.yaml may ask for and this module does not have, all alike in the released files.
_ONLY = {
    "layer_norm_first": False,
    "norm_affine": True,
    "learned_alibi": False,
    "conv_pos_pre_ln": False,
}
_NORM_OF_MODE = {"layer_norm": "layer", "default": "group"}


@dataclass(frozen=True)
class Emotion2vecConfig:
    """Names are those of model_conf and model_conf.modalities.audio in config.yaml.

    feature_encoder_spec: (width, kernel, stride) of each convolution. token_list: names of the
    head's outputs (tokens.txt); without any there is no head. prefix: what stands before the
    encoder's keys in a checkpoint.
    """

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    norm_eps: float
    normalize: bool
    prenet_depth: int
    num_extra_tokens: int
    extractor_mode: str
    feature_encoder_spec: tuple[tuple[int, int, int], ...]
    conv_pos_width: int
    conv_pos_groups: int
    conv_pos_depth: int
    use_alibi_encoder: bool
    num_alibi_heads: int
    learned_alibi_scale_per_head: bool
    learned_alibi_scale_per_layer: bool
    token_list: tuple[str, ...] = ()
    prefix: str = ""

    @property
    def conv_pos_kernel(self) -> int:
        return max(3, self.conv_pos_width // self.conv_pos_depth)

    @property
    def alibi_scale_shape(self) -> tuple[int, ...]:
        layers = self.prenet_depth + self.depth if self.learned_alibi_scale_per_layer else 1
        return layers, 1, self.num_alibi_heads if self.learned_alibi_scale_per_head else 1, 1, 1

    @classmethod
    def from_yaml(cls, path: str | Path, token_list: Sequence[str] = ()) -> "Emotion2vecConfig":
        """Reads a released config.yaml.

        Raises ValueError naming file, key and remedy where it is not of an emotion2vec, lacks a
        key, or asks for what the released models do not use.
        """
        whole = yaml.safe_load(Path(path).read_text())
        if not isinstance(whole, Mapping) or whole.get("model") != "Emotion2vec":
            raise ValueError(f"{path}: key model is not Emotion2vec; give an emotion2vec folder")
        conf = whole.get("model_conf") or {}
        values = {**conf, **(conf.get("modalities") or {}).get("audio", {})}
        missing = [f.name for f in fields(cls)[:-2] if f.name not in values]
        if missing:
            raise ValueError(f"{path}: keys missing from model_conf: {', '.join(missing)}")
        for key, only in _ONLY.items():
            if values.get(key, only) != only:
                raise ValueError(f"{path}: {key} {values[key]!r} is not supported, only {only!r}")
        if values["extractor_mode"] not in _NORM_OF_MODE:
            raise ValueError(f"{path}: extractor_mode must be one of {', '.join(_NORM_OF_MODE)}")
        found = {f.name: values[f.name] for f in fields(cls)[:-2]}
        found["feature_encoder_spec"] = _conv_spec(values["feature_encoder_spec"], path)
        # YAML 1.1 takes 1e-05, without a point, for text.
        found["norm_eps"] = float(values["norm_eps"])
        prefix = next((s for s in whole.get("scope_map") or () if s.startswith("d2v_model")), "")
        return cls(**found, token_list=tuple(token_list), prefix=prefix)


def _conv_spec(text: str, path) -> tuple[tuple[int, int, int], ...]:
    """Reads sums and multiples of lists, as '[(512, 10, 5)] + [(512, 3, 2)] * 4'."""

    def read(node):
        match node:
            case ast.BinOp(left, ast.Add(), right):
                return read(left) + read(right)
            case ast.BinOp(left, ast.Mult(), right):
                return read(left) * read(right)
        return ast.literal_eval(node)

    try:
        layers = read(ast.parse(text, mode="eval").body)
        return tuple((int(width), int(kernel), int(stride)) for width, kernel, stride in layers)
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: feature_encoder_spec {text!r} is no list of (width, kernel, stride)"
        ) from error


def alibi_slopes(heads: int) -> np.ndarray:
    """Geometric slopes of attention with linear biases (arXiv 2108.12409). float32[heads].

    For a power of two n, head i has 2 ** (-8 (i + 1) / n); otherwise the heads missing to the
    power below take every other slope of the power above.
    """
    below = 2 ** math.floor(math.log2(heads))
    slopes = 2.0 ** (-8.0 * np.arange(1, below + 1) / below)
    more = 2.0 ** (-8.0 * np.arange(1, 2 * below + 1) / (2 * below))
    return np.concatenate([slopes, more[::2][: heads - below]]).astype(np.float32)


class Block(nn.Module):
    """Post-norm block with a bias on the attention scores (AltBlock)."""

    config: Emotion2vecConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, scale, bias, key_mask):
        """x: float[B, T, D]; key_mask: bool[B, 1, 1, T] or None.

        bias: float32[1, N, T, T] or None; scale: float32[N], by which the layer multiplies it.
        """
        c, types = self.config, (self.dtype, self.param_dtype)
        rows, steps, width = x.shape

        def dense(name, features, kernel_axes):
            return Dense(
                features,
                kernel_axes=kernel_axes,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=name,
            )

        qkv = dense("qkv", 3 * width, (axes.EMBED, axes.HEADS))(x)
        qkv = qkv.reshape(rows, steps, 3, c.num_heads, width // c.num_heads)
        q, k, v = (
            constrain(qkv[:, :, i], (axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_HEADS, None))
            for i in range(3)
        )
        bias = None if bias is None else bias * scale[None, :, None, None]
        y = attend(q, k, v, key_mask, bias=bias).reshape(rows, steps, width)
        y = dense("proj", width, (axes.HEADS, axes.EMBED))(y)
        x = LayerNorm(c.norm_eps, *types, name="norm1")(x + y)
        y = FeedForward(int(width * c.mlp_ratio), NO_LORA, *types, name="mlp")(x)
        x = LayerNorm(c.norm_eps, *types, name="norm2")(x + y)
        return constrain(x, (axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_EMBED)), None


class Emotion2vec(nn.Module):
    """Waves at 16 kHz -> features at 50 Hz, one embedding a clip, scores of emotions."""

    config: Emotion2vecConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    scan_unroll: int = 1
    remat: str = "none"

    @nn.compact
    def __call__(self, source: jax.Array, padding_mask: jax.Array | None = None):
        """Hears source: float[B, L], standardised (STANDARDIZE_EPS) where config.normalize is set.

        padding_mask: bool[B, L], True past a clip's end (as in funasr), or None. A clip of less
        than 25 ms is heard as if silence followed.

        Returns:
          logits: float32[B, tokens], or None without a head.
          out: "x" float[B, A, D], zero where padded; "mask" bool[B, A], True = real, or None;
            "feats" float32[B, D], the mean of the real frames.
        """
        c, types = self.config, (self.dtype, self.param_dtype)
        real = None if padding_mask is None else ~padding_mask.astype(bool)
        x, mask = self._local_features(source, real)
        x = x + self._positions(x, mask)
        extra = self._extra_tokens()
        count = c.num_extra_tokens
        if count:
            x = jnp.concatenate([jnp.broadcast_to(extra, (len(x), *extra.shape[1:])), x], axis=1)
        seen = mask if mask is None else jnp.pad(mask, ((0, 0), (count, 0)), constant_values=True)
        seen = None if seen is None else seen[:, None, None]
        bias, scales = self._alibi(x.shape[1])
        x = LayerNorm(c.norm_eps, *types, name="context_norm")(x)
        in_axes = (0, nn.broadcast, nn.broadcast)
        for name, first, depth in (
            ("prenet", 0, c.prenet_depth),
            ("blocks", c.prenet_depth, c.depth),
        ):
            stack = scan_layers(Block, depth, self.scan_unroll, self.remat, in_axes)
            x, _ = stack(c, *types, name=name)(x, scales[first : first + depth], bias, seen)
        x = x[:, count:]
        x = x if mask is None else jnp.where(mask[..., None], x, 0)
        feats = mean_over_time(x, mask)
        return self._head(feats), {"x": x, "mask": mask, "feats": feats}

    def _local_features(self, source, real):
        c, types = self.config, (self.dtype, self.param_dtype)
        widths, kernels, strides = zip(*c.feature_encoder_spec, strict=True)
        x, mask = WaveConv(
            widths,
            kernels,
            strides,
            _NORM_OF_MODE[c.extractor_mode],
            False,
            *types,
            name="local_encoder",
        )(source.astype(self.dtype), real)
        x = LayerNorm(1e-5, *types, name="project_norm")(x)
        project = Dense(
            c.embed_dim,
            kernel_axes=(axes.FEATURES, axes.EMBED),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="project_features",
        )
        return project(x), mask

    def _positions(self, x, mask):
        """What convolutions over the neighbourhood tell of a frame's position."""
        c = self.config
        for index in range(1, c.conv_pos_depth + 1):
            x = x if mask is None else jnp.where(mask[..., None], x, 0)
            x = SameConv(
                c.conv_pos_kernel,
                c.conv_pos_groups,
                False,
                self.dtype,
                self.param_dtype,
                name=f"positions_{index}",
            )(x).astype(jnp.float32)
            # A layer norm that has no parameters.
            x = x - jnp.mean(x, axis=-1, keepdims=True)
            x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-5)
            x = nn.gelu(x.astype(self.dtype), approximate=False)
        return x

    def _extra_tokens(self):
        c = self.config
        if not c.num_extra_tokens:
            return None
        init = nn.with_logical_partitioning(KERNEL_INIT, (None, None, axes.EMBED))
        shape = (1, c.num_extra_tokens, c.embed_dim)
        return self.param("extra_tokens", init, shape, self.param_dtype).astype(self.dtype)

    def _alibi(self, steps: int):
        """Bias float32[1, N, T, T], 0 at the extra tokens, and scales float32[layers, N]."""
        c = self.config
        layers = c.prenet_depth + c.depth
        if not c.use_alibi_encoder:
            return None, jnp.zeros((layers, c.num_heads))
        init = nn.with_logical_partitioning(nn.initializers.ones, (None,) * 5)
        scale = self.param("alibi_scale", init, c.alibi_scale_shape, self.param_dtype)
        scale = jnp.maximum(scale.astype(jnp.float32)[:, 0, :, 0, 0], 0.0)
        spare = c.num_heads - c.num_alibi_heads
        scale = jnp.broadcast_to(scale, (layers, c.num_alibi_heads))
        scale = jnp.pad(scale, ((0, 0), (0, spare)))
        slopes = np.pad(alibi_slopes(c.num_alibi_heads), (0, spare))
        position = np.arange(steps)
        distance = np.abs(position[:, None] - position).astype(np.float32)
        is_frame = position >= c.num_extra_tokens
        distance = jnp.where(is_frame[:, None] & is_frame, distance, 0.0)
        return -slopes[None, :, None, None] * distance, scale

    def _head(self, feats):
        if not self.config.token_list:
            return None
        return Dense(
            len(self.config.token_list),
            kernel_axes=(axes.EMBED, None),
            dtype=jnp.float32,
            param_dtype=self.param_dtype,
            name="proj",
        )(feats)


@dataclass(frozen=True)
class Emotion2vecProcessor:
    """Waves -> what Emotion2vec takes, as funasr prepares them; labels name its scores."""

    labels: tuple[str, ...]
    do_normalize: bool

    def __call__(self, waves: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """waves: float32[L] each, at 16 kHz.

        Returns: "source" float32[B, L] of the longest, "padding_mask" bool[B, L].
        """
        lens = np.array([len(wave) for wave in waves])
        source = np.zeros((len(waves), lens.max()), np.float32)
        for row, wave in enumerate(waves):
            source[row, : len(wave)] = wave
        if self.do_normalize:
            source = np.asarray(standardize(jnp.asarray(source), lens, eps=STANDARDIZE_EPS))
        padding_mask = np.arange(source.shape[1]) >= lens[:, None]
        return {"source": source, "padding_mask": padding_mask}
