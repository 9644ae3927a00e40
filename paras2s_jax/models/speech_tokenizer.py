"""Whisper-VQ: speech -> 12.5 Hz codes, from a block-causal Whisper encoder with a codebook.

Arithmetic: the tokenizer of GLM-4-Voice (THUDM/GLM-4-Voice eb00ce9, WhisperVQEncoder and
extract_speech_token), which Kimi-Audio listens with. Of the encoder's layers only those in front
of the codebook exist.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from paras2s_jax.audio.mel import HOP, RATE_HZ, whisper_log_mel
from paras2s_jax.models import axes
from paras2s_jax.models.layers import KERNEL_INIT
from paras2s_jax.models.lora import NO_LORA
from paras2s_jax.models.whisper import PIECE_SAMPLES, as_mask
from paras2s_jax.models.whisper_layers import (
    EncoderLayer,
    WhisperConfig,
    mel_conv,
    scan_layers,
    sinusoid_init,
)

CONV_STRIDE = 2  # Mel frames per encoder frame.
TAPS_BEFORE = (2, 0)  # Zeros around a convolution of three taps that sees no future.

# Settings of the release whose alternatives exist only in its training code.
_ONLY = {
    "activation_function": "gelu",
    "scale_embedding": False,
    "pooling_type": "avg",
    "encoder_causal_convolution": True,
    "encoder_causal_attention": False,
    "quantize_causal_encoder": False,
    "quantize_encoder_only": True,
}


@dataclass(frozen=True)
class SpeechTokenizerConfig:
    """Sizes; names follow the config.json of the release.

    quantize_position: how many layers there are; states are pooled and quantised after them.
    quantize_causal_block_size: frames of 20 ms that see each other, and all blocks before.
    """

    d_model: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    quantize_position: int
    quantize_vocab_size: int
    quantize_causal_block_size: int
    num_mel_bins: int = 128
    max_source_positions: int = 1500
    pooling_kernel_size: int = 4

    @property
    def tower(self) -> WhisperConfig:
        """The layers as those of a Whisper encoder."""
        return WhisperConfig(
            self.d_model,
            self.quantize_position,
            self.encoder_attention_heads,
            self.encoder_ffn_dim,
            self.num_mel_bins,
            self.max_source_positions,
        )

    @classmethod
    def from_json(cls, path: str | Path) -> "SpeechTokenizerConfig":
        """Reads config.json (also one that nests these keys under "encoder").

        Raises ValueError, naming file and key, if one is missing or asks for another model.
        """
        values: Mapping = json.loads(Path(path).read_text())
        values = values.get("encoder", values)
        names = [field.name for field in fields(cls)]
        missing = [name for name in names[:6] if name not in values]
        if missing:
            raise ValueError(
                f"{path}: keys missing from the config: {', '.join(missing)}; is this the folder "
                "of a speech tokenizer?"
            )
        only = _ONLY | {"pooling_position": values["quantize_position"]}
        for key, value in only.items():
            if values.get(key, value) != value:
                raise ValueError(f"{path}: {key} {values[key]!r} is not supported, only {value!r}")
        return cls(**{name: values[name] for name in names if name in values})


class WhisperVQEncoder(nn.Module):
    """Log-mel -> codes and their embeddings."""

    config: SpeechTokenizerConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    scan_unroll: int = 1
    remat: str = "none"

    def __call__(
        self,
        input_features: jax.Array,
        attention_mask: jax.Array | None = None,
        emit: tuple[str, ...] = (),
    ):
        """As `encode`, with the names and layouts of the reference.

        input_features: float[B, M, A]; attention_mask: [B, A], mel frames, int or bool.
        """
        return self.encode(jnp.swapaxes(input_features, 1, 2), as_mask(attention_mask), emit)

    @nn.compact
    def encode(self, mel: jax.Array, mask: jax.Array | None = None, emit: tuple[str, ...] = ()):
        """Quantises mel: float[B, A, M] with mask: bool[B, A] or None (all frames real).

        Real frames are those on the left. The mask hides keys only: a code whose 80 ms end
        behind the last real frame averages over states of padding, as in the reference.

        Returns:
          codes: int32[B, S], S = ceil(ceil(A / 2) / 4).
          out: "token_mask" bool[B, S], which codes are real; "last_hidden" [B, S, D], their
            embeddings with positions added; "pooled" float32[B, S, D], what was quantised;
            "pre_pool" [B, ceil(A / 2), D]; "conv2" likewise, before its GELU; "layer_out"
            [layers, B, ceil(A / 2), D] if named in emit.
        """
        c, types = self.config, (self.dtype, self.param_dtype)
        steps, kernel = -(-mel.shape[1] // CONV_STRIDE), c.pooling_kernel_size
        if steps > c.max_source_positions:
            limit = CONV_STRIDE * c.max_source_positions
            raise ValueError(f"{mel.shape[1]} mel frames exceed the encoder's {limit}: cut them")
        conv1 = mel_conv(c.d_model, 1, TAPS_BEFORE, *types, "conv1")
        conv2 = mel_conv(c.d_model, CONV_STRIDE, TAPS_BEFORE, *types, "conv2")
        convolved = conv2(nn.gelu(conv1(mel), approximate=False))
        x = nn.gelu(convolved, approximate=False)
        x = x + self._table("embed_positions", c.max_source_positions)[:steps]
        mask = jnp.ones(mel.shape[:2], bool) if mask is None else mask
        mask = mask[:, ::CONV_STRIDE]
        stack = scan_layers(
            EncoderLayer, c.quantize_position, self.scan_unroll, self.remat, nn.broadcast
        )
        layers = stack(c.tower, NO_LORA, *types, "layer_out" in emit, name="layers")
        x, layer_out = layers(x, block_causal(mask, c.quantize_causal_block_size))
        codes, embedded, pooled = self._quantise(x)
        table = self._table("embed_positions2", c.max_source_positions // kernel)
        out = {
            "token_mask": mask[:, ::kernel],
            "last_hidden": embedded + table[: codes.shape[1]],
            "pooled": pooled,
            "pre_pool": x,
            "conv2": convolved,
        }
        return codes, out | ({"layer_out": layer_out} if "layer_out" in emit else {})

    def _table(self, name: str, length: int) -> jax.Array:
        init = nn.with_logical_partitioning(sinusoid_init, (None, axes.EMBED))
        table = self.param(name, init, (length, self.config.d_model), self.param_dtype)
        return table.astype(self.dtype)

    def _quantise(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x: float[B, T, D]. Returns: codes, their embeddings, and the pooled states."""
        c = self.config
        init = nn.with_logical_partitioning(KERNEL_INIT, (axes.VOCAB, axes.EMBED))
        shape = (c.quantize_vocab_size, c.d_model)
        codebook = self.param("codebook", init, shape, self.param_dtype)
        centres = codebook.astype(jnp.float32)
        x = x.astype(jnp.float32)
        # Zeros that fill up the last pool count in its average.
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % c.pooling_kernel_size), (0, 0)))
        pooled = jnp.mean(x.reshape(len(x), -1, c.pooling_kernel_size, c.d_model), axis=2)
        dots = jnp.einsum("BSD,VD->BSV", pooled, centres, precision=jax.lax.Precision.HIGHEST)
        # The nearest centre: |x - c|^2 = |x|^2 - 2 (x c - |c|^2 / 2).
        nearness = dots - 0.5 * jnp.sum(jnp.square(centres), axis=-1)
        codes = jnp.argmax(nearness, axis=-1).astype(jnp.int32)
        return codes, codebook[codes].astype(self.dtype), pooled


def block_causal(mask: jax.Array, block_size: int) -> jax.Array:
    """What each frame sees: the real ones of its own block and of all before it.

    mask: bool[B, T]. Returns: bool[B, T, T].
    """
    block = jnp.arange(mask.shape[1]) // block_size
    return (block[None, :] <= block[:, None])[None] & mask[:, None, :]


class WhisperVQTokenizer(struct.PyTreeNode):
    """A WhisperVQEncoder with its variables as a `models.codec.SpeechTokenizer`.

    pieces_at_once: pieces of 30 s that are encoded at one time, None for all.
    """

    variables: Any
    model: WhisperVQEncoder = struct.field(pytree_node=False)
    pieces_at_once: int | None = struct.field(pytree_node=False, default=None)
    rate_hz: int = struct.field(pytree_node=False, default=RATE_HZ)

    @property
    def codebook_size(self) -> int:
        return self.model.config.quantize_vocab_size

    def boxed(self) -> "WhisperVQTokenizer":
        """Shapes, types and logical axes instead of variables; makes no arrays."""
        features = jax.ShapeDtypeStruct((1, self.model.config.num_mel_bins, 8), jnp.float32)
        made = jax.eval_shape(self.model.init, jax.random.key(0), features)
        return self.replace(variables={"params": made["params"]})

    def encode(self, waves: jax.Array, lens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Codes of whole clips, in pieces of 30 s that know nothing of each other.

        Each row gets the codes that the reference gives the clip alone. Matmuls run at full
        float32 precision wherever they run, for a code is a decision.

        Args:
          waves: float32[B, L] at 16 kHz; samples past `lens` are ignored.
          lens: int32[B], in samples.

        Returns:
          codes: int32[B, ceil(L / 1280)], 0 past len_codes.
          len_codes: int32[B], ceil(lens / 1280).
        """
        hop = HOP * CONV_STRIDE * self.model.config.pooling_kernel_size
        length = waves.shape[1]
        pieces, real, ends = cut_pieces(waves, lens, hop)

        def run(batch):
            pieces, real, ends = batch
            mel, _ = whisper_log_mel(pieces, ends, self.model.config.num_mel_bins, mirror_ends=True)
            mask = HOP * jnp.arange(mel.shape[1]) < real[:, None]
            return self.model.apply(self.variables, mel, mask, method="encode")[0]

        with jax.default_matmul_precision("float32"):
            if self.pieces_at_once is None:
                codes = run((pieces, real, ends))
            else:

                def run_one(piece):
                    return run(jax.tree.map(lambda x: x[None], piece))[0]

                batch = (pieces, real, ends)
                codes = jax.lax.map(run_one, batch, batch_size=self.pieces_at_once)
        codes = codes.reshape(len(waves), -1)[:, : -(-length // hop)]
        len_codes = -(-lens // hop)
        is_real = jnp.arange(codes.shape[1]) < len_codes[:, None]
        return jnp.where(is_real, codes, 0), len_codes.astype(jnp.int32)


def cut_pieces(
    waves: jax.Array, lens: jax.Array, hop: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Pieces of 30 s, n for each row, as the reference batches those of one clip.

    A clip of one piece is padded to a whole number of hops, the pieces of a longer one to 30 s.

    waves: float32[B, L]; lens: int32[B].
    Returns: float32[B * n, P], silent past the real samples, int32[B * n]; and the padded
      length of each, int32[B * n], 0 for pieces behind the end.
    """
    length = waves.shape[1]
    size = PIECE_SAMPLES if length > PIECE_SAMPLES else -(-length // hop) * hop
    waves = jnp.where(jnp.arange(length) < lens[:, None], waves, 0.0)
    pieces = jnp.pad(waves, ((0, 0), (0, -length % size))).reshape(-1, size)
    count = len(pieces) // len(waves)
    real = jnp.clip(lens[:, None] - size * jnp.arange(count), 0, size)
    is_long = (lens > PIECE_SAMPLES)[:, None] & (real > 0)
    ends = jnp.where(is_long, size, -(-real // hop) * hop)
    return pieces, real.reshape(-1), ends.reshape(-1)
