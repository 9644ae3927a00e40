"""Kimi-Audio's flow-matching detokenizer: speech codes -> mel frames (50 Hz).

A diffusion transformer (DiT, arXiv 2212.09748) gives the velocity that carries noise to a mel
spectrogram; `euler` follows it. Arithmetic of Kimi-Audio's DiTPrefix and its ODE wrapper.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import yaml
from flax import struct

from paras2s_jax.models import axes
from paras2s_jax.models.layers import Dense, attend, make_embed, rope, rope_angles
from paras2s_jax.models.placement import constrain
from paras2s_jax.models.whisper_layers import scan_layers

FRAMES_PER_CODE = 4  # 12.5 Hz codes, 50 Hz frames.
TIME_DIM = 256  # Of the sinusoidal time features.
LN_EPS = 1e-6
SIGMA_MIN = 1e-4
CACHE_TIME = 999  # Of the pass over solved frames that fills the cache.
# What else a released config.yaml may say under model.dit; other values mean another network.
_ONLY = {"use_rope": True, "position_embedding_type": "skip", "ffn_type": "vanilla_mlp"}


@dataclass(frozen=True)
class FlowMatchingConfig:
    """Sizes; names follow model.dit in the released config.yaml, mel_* and normalize_mel its top.

    semantic_vocab_size: codes; the embedding has one row more, the unconditional one.
    max_seq_len: positions (frames) that the network was trained for.
    """

    hidden_size: int
    depth: int
    num_heads: int
    semantic_vocab_size: int
    input_size: int = 80
    mlp_ratio: float = 4.0
    max_seq_len: int = 4096
    rope_base: float = 10_000.0
    normalize_mel: bool = False
    mel_mean: float = 0.0
    mel_std: float = 1.0

    @classmethod
    def from_yaml(cls, path: str | Path) -> "FlowMatchingConfig":
        """Reads config.yaml as released. Raises ValueError on missing or unsupported values."""
        values = yaml.safe_load(Path(path).read_text())
        try:
            dit = values["model"]["dit"]
        except (KeyError, TypeError):
            raise ValueError(f"{path}: no model.dit; is it a detokenizer's config.yaml?") from None
        names = ("hidden_size", "depth", "num_heads", "semantic_vocab_size", "input_size")
        missing = [f"model.dit.{name}" for name in names if name not in dit]
        normalized = values.get("normalize_mel", False)
        if normalized:
            missing += [name for name in ("mel_mean", "mel_std") if name not in values]
        if missing:
            raise ValueError(f"{path}: keys missing from the config: {', '.join(missing)}")
        rotary = dit.get("rope_params", {})
        found = {name: dit.get(name) for name in _ONLY}
        found["rope_params.rope_interpolation_factor"] = rotary.get("rope_interpolation_factor", 1)
        wanted = _ONLY | {"rope_params.rope_interpolation_factor": 1}
        wrong = [f"{name}={found[name]!r}" for name in wanted if found[name] != wanted[name]]
        if wrong:
            raise ValueError(f"{path}: model.dit has {', '.join(wrong)}; supported is {wanted}")
        positions = (dit.get("max_seq_len", 4096), rotary.get("max_position_embeddings", 4096))
        return cls(
            **{name: dit[name] for name in names},
            mlp_ratio=dit.get("mlp_ratio", 4.0),
            max_seq_len=min(positions),
            rope_base=rotary.get("rope_base", 10_000.0),
            normalize_mel=normalized,
            mel_mean=values["mel_mean"] if normalized else 0.0,
            mel_std=values["mel_std"] if normalized else 1.0,
        )

    @property
    def width_per_head(self) -> int:
        return self.hidden_size // self.num_heads

    def normalize(self, mel: jax.Array) -> jax.Array:
        """Log-mel of the vocoder -> what the network works on."""
        return (mel - self.mel_mean) / self.mel_std

    def denormalize(self, x: jax.Array) -> jax.Array:
        """The inverse of `normalize`."""
        return x * self.mel_std + self.mel_mean


class View(struct.PyTreeNode):
    """What all blocks share in one call.

    condition: float[B, S, D], SiLU of time and code. cos, sin: float32[B or 1, T, 1, H // 2];
    mask: bool[B, 1, 1, C + T] of the cache and the own frames, or None: all.
    """

    condition: jax.Array
    cos: jax.Array
    sin: jax.Array
    mask: jax.Array | None


def time_frequencies() -> np.ndarray:
    """exp(-ln(10000) i / 128), of exponents rounded to float32 as in the reference.

    A time of up to 1000 multiplies them, so that their last bits are seen in the velocity.
    """
    half = TIME_DIM // 2
    exponents = np.float32(-np.log(10_000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    return np.exp(exponents.astype(np.float64)).astype(np.float32)


def time_features(t: jax.Array) -> jax.Array:
    """Cosines, then sines (DiT: TimestepEmbedder). t: int32[B]. Returns: float32[B, TIME_DIM]."""
    angles = t[:, None].astype(jnp.float32) * time_frequencies()
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def modulated_norm(x: jax.Array, shift: jax.Array, scale: jax.Array, dtype) -> jax.Array:
    """Layer norm without parameters, in float32, then * (1 + scale) + shift (adaptive norm).

    x: float[B, S, r, D], the r frames of each code side by side; shift, scale: float[B, S, D].
    Returns: dtype[B, S, r, D].
    """
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + LN_EPS)
    shift, scale = (y[:, :, None].astype(jnp.float32) for y in (shift, scale))
    return (x * (1.0 + scale) + shift).astype(dtype)


class DiTAttention(nn.Module):
    """Bidirectional attention over the cache and the own frames."""

    config: FlowMatchingConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, cache, view: View):
        """x: float[B, S, r, D]; cache: {"k", "v"} of [B, C, N, H] or None.

        Returns: (float[B, S, r, D], own keys (rotated) and values [B, S * r, N, H]).
        """
        c, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        rows, num_codes, repeat, width = x.shape
        inner = c.num_heads * c.width_per_head
        project = Dense(3 * inner, kernel_axes=(axes.EMBED, axes.HEADS), name="qkv", **types)
        qkv = project(x).reshape(rows, num_codes * repeat, 3, c.num_heads, c.width_per_head)
        qkv = constrain(qkv, (axes.ACT_BATCH, axes.ACT_LEN, None, axes.ACT_HEADS, None))
        q, k, v = (qkv[:, :, i] for i in range(3))
        q, k = (rope(_even_then_odd(y), view.cos, view.sin) for y in (q, k))
        seen = {"k": k, "v": v}
        if cache is not None:
            # A copy, but a small one: a flash kernel sees one sequence, and no scores are stored.
            seen = jax.tree.map(
                lambda a, x: jnp.concatenate([a.astype(x.dtype), x], 1), cache, seen
            )
        y = attend(q, seen["k"], seen["v"], view.mask).reshape(rows, num_codes, repeat, inner)
        y = Dense(width, kernel_axes=(axes.HEADS, axes.EMBED), name="proj", **types)(y)
        return y, {"k": k, "v": v}


def _even_then_odd(x: jax.Array) -> jax.Array:
    """Turns the pairs (2i, 2i + 1) that DiTPrefix rotates into the pairs of `rope`.

    Queries and keys are reordered alike, which no product of the two notices.
    """
    return jnp.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by time and code (adaLN).

    emit: which per-block arrays to return, of "kv", "attn_out" and "block_out".
    """

    config: FlowMatchingConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    emit: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x, cache, view: View):
        """x: float[B, S, r, D]. Returns: (float[B, S, r, D], {name: array for name in emit})."""
        c, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width = c.hidden_size
        # Once per code, not per frame: the condition is the same for all frames of a code.
        modulate = Dense(
            6 * width, kernel_axes=(axes.EMBED, axes.MLP), name="adaLN_modulation", **types
        )
        modulation = jnp.split(modulate(view.condition), 6, axis=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        attention = DiTAttention(c, **types, name="attn")
        attn_out, kv = attention(modulated_norm(x, shift1, scale1, self.dtype), cache, view)
        x = x + gate1[:, :, None] * attn_out
        y = modulated_norm(x, shift2, scale2, self.dtype)
        inner = int(width * c.mlp_ratio)
        y = Dense(inner, kernel_axes=(axes.EMBED, axes.MLP), name="fc1", **types)(y)
        y = nn.gelu(y, approximate=True)
        y = constrain(y, (axes.ACT_BATCH, axes.ACT_LEN, None, axes.ACT_MLP))
        y = Dense(width, kernel_axes=(axes.MLP, axes.EMBED), name="fc2", **types)(y)
        x = x + gate2[:, :, None] * y
        x = constrain(x, (axes.ACT_BATCH, axes.ACT_LEN, None, axes.ACT_EMBED))
        emitted = {"kv": kv, "attn_out": attn_out, "block_out": x}
        return x, {name: emitted[name] for name in self.emit}


class FlowMatchingDiT(nn.Module):
    """The velocity of mel frames, given codes and time (Kimi-Audio: DiTPrefix)."""

    config: FlowMatchingConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    scan_unroll: int = 1
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        condition: jax.Array,
        t: jax.Array,
        position_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        cache: dict | None = None,
        cache_mask: jax.Array | None = None,
        emit: tuple[str, ...] = (),
    ):
        """One evaluation of the velocity.

        Args:
          x: float[B, T, M], normalised mel frames on their way.
          condition: int32[B, S], codes; S divides T, each code stands for T // S frames: S = T
            as in the reference, or S = T / 4 for codes at 12.5 Hz, which computes the adaptive
            norms once per code.
          t: int32[B] or [1], 0 … 1000.
          position_ids: int32[B or 1, T], by default 0, 1, 2, …
          mask: bool[B, T], which frames are real, by default all.
          cache: {"k", "v"} of [depth, B, C, N, H], earlier frames, or None.
          cache_mask: bool[B or 1, C].
          emit: of "kv", "attn_out" (before the gate) and "block_out".

        Returns:
          (velocity float32[B, T, M], out): out["t_emb"] float[B or 1, D]; if named in emit
          out["kv"] as cache with C = T, out["attn_out"] and out["block_out"] [depth, B, T, D].
        """
        c, types = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        (rows, steps, _), (_, num_codes) = x.shape, condition.shape
        if steps % num_codes:
            raise ValueError(f"{num_codes} codes do not divide {steps} frames")
        width = c.hidden_size
        t_emb = Dense(width, kernel_axes=(None, axes.MLP), name="t_fc1", **types)(time_features(t))
        t_emb = Dense(width, kernel_axes=(axes.MLP, axes.EMBED), name="t_fc2", **types)(
            nn.silu(t_emb)
        )
        embed = make_embed(
            c.semantic_vocab_size + 1, width, *types.values(), name="semantic_token_embedding"
        )
        time_and_code = nn.silu(t_emb[:, None] + embed(condition))
        if position_ids is None:
            position_ids = jnp.arange(steps)[None]
        cos, sin = rope_angles(position_ids, c.width_per_head, c.rope_base)
        if cache is not None:
            own = jnp.ones((rows, steps), bool) if mask is None else mask
            past = jnp.broadcast_to(cache_mask, (rows, cache_mask.shape[1]))
            mask = jnp.concatenate([past, own], axis=1)
        view = View(time_and_code, cos, sin, None if mask is None else mask[:, None, None])
        enter = Dense(width, kernel_axes=(axes.FEATURES, axes.EMBED), name="input_linear", **types)
        h = enter(x).reshape(rows, num_codes, steps // num_codes, width)
        stack = scan_layers(DiTBlock, c.depth, self.scan_unroll, self.remat, (0, nn.broadcast))
        h, emitted = stack(c, *types.values(), emit, name="blocks")(h, cache, view)
        modulate = Dense(
            2 * width, kernel_axes=(axes.EMBED, axes.MLP), name="final_modulation", **types
        )
        shift, scale = jnp.split(modulate(time_and_code), 2, axis=-1)
        h = modulated_norm(h, shift, scale, self.dtype)
        leave = Dense(
            c.input_size,
            kernel_axes=(axes.EMBED, axes.FEATURES),
            out_dtype=jnp.float32,
            name="final_linear",
            **types,
        )
        velocity = leave(h).reshape(rows, steps, c.input_size)
        for name in {"attn_out", "block_out"} & set(emit):
            emitted[name] = emitted[name].reshape(c.depth, rows, steps, width)
        return velocity, {"t_emb": t_emb} | emitted


@functools.lru_cache(maxsize=16)
def time_points(ode_steps: int, solver: str) -> tuple[np.ndarray, np.ndarray]:
    """When a solver evaluates the velocity, and how far it goes each time.

    solver: "neural_ode_euler", the release's (the last point only ends the last step), or
    "naive_euler" (equal steps of (1 - SIGMA_MIN) / ode_steps from every point).
    Returns: (t int32[E], step float32[E]), E = ode_steps - 1 or ode_steps.
    """
    points = np.linspace(0.0, 1.0, ode_steps, dtype=np.float32)
    t = (points * np.float32(1000)).astype(np.int32)
    if solver == "neural_ode_euler":
        return t[:-1], np.diff(points)
    if solver == "naive_euler":
        return t, np.full(ode_steps, (1.0 - SIGMA_MIN) / ode_steps, np.float32)
    raise ValueError(f"unknown ODE solver {solver!r}; known are neural_ode_euler, naive_euler")


def euler(
    velocity: Callable,
    noise: jax.Array,
    ode_steps: int = 30,
    solver: str = "neural_ode_euler",
    keep_last: bool = False,
) -> tuple[jax.Array, dict | None]:
    """Follows the velocity from noise to a solution; all evaluations are one compiled loop.

    velocity: (x, t int32[1]) -> (float32[B, T, M], out); noise: float32[B, T, M].
    keep_last: whether the last evaluation runs apart from the loop, so that its `out` survives.
    Returns: (float32[B, T, M], out of the last evaluation or None).
    """
    t, step = (jnp.asarray(x) for x in time_points(ode_steps, solver))

    def advance(i, x):
        v, out = velocity(x, t[i][None])
        return x + step[i] * v, out

    looped = len(t) - keep_last
    x = jax.lax.fori_loop(0, looped, lambda i, x: advance(i, x)[0], noise.astype(jnp.float32))
    return advance(looped, x) if keep_last else (x, None)
