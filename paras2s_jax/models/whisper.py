"""Whisper (arXiv 2212.04356): encoder, recogniser, audio classifier, Kimi-Audio's features.

Names and arithmetic follow transformers' modeling_whisper.py. Without a mask all positions are
attended to, as there; with one, a row does not depend on its padding.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from paras2s_jax.audio.mel import HOP, RATE_HZ, whisper_log_mel
from paras2s_jax.models import axes
from paras2s_jax.models.layers import KERNEL_INIT, Dense, LayerNorm, make_embed
from paras2s_jax.models.lora import NO_LORA, LoRA
from paras2s_jax.models.placement import constrain
from paras2s_jax.models.whisper_layers import (
    DecoderLayer,
    EncoderLayer,
    WhisperConfig,
    mel_conv,
    scan_layers,
    sinusoid_init,
)

PIECE_SAMPLES = 30 * RATE_HZ  # What the released Whisper encoders always hear.
STACK = 4  # Encoder frames (50 Hz) side by side in one of Kimi-Audio's features (12.5 Hz).
MEL_PER_FEATURE = 2 * STACK


class WhisperEncoder(nn.Module):
    """Log-mel -> 50 Hz hidden states.

    pool: frames averaged before the final norm (2 in Qwen2-Audio). mask_inputs=False masks
    the keys only and lets the convolutions see the padding's mel (Qwen2-Audio in transformers).
    """

    config: WhisperConfig
    lora: LoRA = NO_LORA
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    scan_unroll: int = 1
    remat: str = "none"
    pool: int = 1
    mask_inputs: bool = True

    @nn.compact
    def __call__(self, mel: jax.Array, mask: jax.Array | None = None, emit: tuple[str, ...] = ()):
        """Encodes mel: float[B, A, M] with mask: bool[B, A] or None (all frames real).

        A may be anything up to 2 * max_source_positions.
        Returns: (float[B, ceil(A / 2) // pool, D], out). out has "mask" bool[B, …] of the
        result (zero elsewhere) or None, "after_conv" [B, ceil(A / 2), D] with positions added,
        and "layer_out" [layers, B, ceil(A / 2), D] if named in emit.
        """
        c, types = self.config, (self.dtype, self.param_dtype)
        steps = -(-mel.shape[1] // 2)
        if steps > c.max_source_positions:
            limit = 2 * c.max_source_positions
            raise ValueError(f"{mel.shape[1]} mel frames exceed the encoder's {limit}: cut them")
        hide = (lambda x, m: jnp.where(m[..., None], x, 0)) if self.mask_inputs else _keep
        hide = _keep if mask is None else hide
        conv1 = mel_conv(c.d_model, 1, (1, 1), *types, "conv1")
        conv2 = mel_conv(c.d_model, 2, (1, 1), *types, "conv2")
        x = nn.gelu(conv1(hide(mel, mask)), approximate=False)
        x = nn.gelu(conv2(hide(x, mask)), approximate=False)
        # A step is real if its central mel frame is.
        mask = None if mask is None else mask[:, ::2]
        table = self.param(
            "embed_positions",
            nn.with_logical_partitioning(sinusoid_init, (None, axes.EMBED)),
            (c.max_source_positions, c.d_model),
            self.param_dtype,
        )
        x = after_conv = x + table[:steps].astype(self.dtype)
        stack = scan_layers(
            EncoderLayer, c.encoder_layers, self.scan_unroll, self.remat, nn.broadcast
        )
        layers = stack(c, self.lora, *types, "layer_out" in emit, name="layers")
        x, layer_out = layers(x, None if mask is None else mask[:, None])
        if self.pool > 1:
            x = nn.avg_pool(x, (self.pool,), (self.pool,))
            mask = None if mask is None else mask[:, self.pool - 1 :: self.pool]
        x = LayerNorm(1e-5, *types, name="layer_norm")(x)
        x = x if mask is None else jnp.where(mask[..., None], x, 0)
        out = {"mask": mask, "after_conv": after_conv}
        return x, out | ({"layer_out": layer_out} if "layer_out" in emit else {})


def _keep(x, _mask):
    return x


def as_mask(mask: jax.Array | None) -> jax.Array | None:
    """An attention mask of any type as bool, True = real."""
    return None if mask is None else jnp.asarray(mask).astype(bool)


class WhisperDecoder(nn.Module):
    """Tokens -> logits, seeing the encoder's states; the head is the embedding table."""

    config: WhisperConfig
    lora: LoRA = NO_LORA
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    scan_unroll: int = 1
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        encoded: jax.Array | None = None,
        encoded_mask: jax.Array | None = None,
        token_mask: jax.Array | None = None,
        *,
        cache: dict | None = None,
        cache_index: jax.Array | int = 0,
        cross_kv: dict | None = None,
        emit: bool = False,
    ):
        """Logits of tokens: int32[B, T], given encoded: float[B, S, D] or cross_kv of it.

        encoded_mask: bool[B, S]; token_mask: bool[B, T]; cache: {"k", "v"} of
        [layers, B, slots, N, H], of which cache_index are filled; cross_kv: as cache, all S.
        Returns: (float32[B, T, V], out) with out["hidden"] and, if emit, "kv" (of the T
        tokens) and "cross_kv".
        """
        c, types = self.config, (self.dtype, self.param_dtype)
        steps = tokens.shape[1]
        own = jnp.tril(jnp.ones((steps, steps), bool))[None]
        own = own if token_mask is None else own & token_mask[:, None]
        masks = {
            "own": own,
            "cross": None if encoded_mask is None else encoded_mask[:, None],
            "cache": None if cache is None else _filled(cache, cache_index),
        }
        embed = make_embed(c.vocab_size, c.d_model, *types, name="embed_tokens")
        table = self.param(
            "embed_positions",
            nn.with_logical_partitioning(KERNEL_INIT, (None, axes.EMBED)),
            (c.max_target_positions, c.d_model),
            self.param_dtype,
        )
        positions = jax.lax.dynamic_slice_in_dim(table, cache_index, steps)
        x = embed(tokens) + positions.astype(self.dtype)
        in_axes = (0, 0, nn.broadcast, nn.broadcast)
        stack = scan_layers(DecoderLayer, c.decoder_layers, self.scan_unroll, self.remat, in_axes)
        layers = stack(c, self.lora, *types, emit, name="layers")
        x, emitted = layers(x, cache, cross_kv, encoded, masks)
        x = LayerNorm(1e-5, *types, name="layer_norm")(x)
        logits = embed.attend(x).astype(jnp.float32)
        logits = constrain(logits, (axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_VOCAB))
        return logits, {"hidden": x} | (emitted or {})


def _filled(cache: dict, cache_index) -> jax.Array:
    return (jnp.arange(cache["k"].shape[2]) < cache_index)[None, None]


class WhisperASR(nn.Module):
    """Encoder and decoder (transformers: WhisperForConditionalGeneration)."""

    config: WhisperConfig
    lora: LoRA = NO_LORA
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    scan_unroll: int = 1
    remat: str = "none"

    def setup(self):
        fields = (self.dtype, self.param_dtype, self.scan_unroll, self.remat)
        self.encoder = WhisperEncoder(self.config, self.lora, *fields)
        self.decoder = WhisperDecoder(self.config, self.lora, *fields)

    def __call__(
        self,
        input_features: jax.Array,
        attention_mask: jax.Array | None = None,
        decoder_input_ids: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
    ):
        """As `predict`, with the names and layouts of WhisperForConditionalGeneration.

        input_features: float[B, M, A]; attention_mask: [B, A], mel frames, int or bool. The
        reference ignores it and hears padding as it is: leave it out to get its numbers.
        decoder_input_ids: int32[B, T]; decoder_attention_mask: [B, T], int or bool.
        """
        if decoder_input_ids is None:
            raise ValueError("decoder_input_ids are needed: at least the start of transcript")
        return self.predict(
            jnp.swapaxes(input_features, 1, 2),
            decoder_input_ids,
            as_mask(attention_mask),
            as_mask(decoder_attention_mask),
        )

    def predict(self, mel, tokens, mel_mask=None, token_mask=None):
        """Teacher-forced logits of the next token.

        mel: float[B, A, M]; tokens: int32[B, T]; mel_mask: bool[B, A]; token_mask: bool[B, T].
        Returns: (float32[B, T, V], out) with out["hidden"] and out["encoded"] float[B, S, D].
        """
        encoded, out = self.encoder(mel, mel_mask)
        logits, decoded = self.decoder(tokens, encoded, out["mask"], token_mask)
        return logits, {"encoded": encoded, "hidden": decoded["hidden"]}

    def encode(self, mel, mel_mask=None):
        """Returns: (float[B, S, D], mask bool[B, S] or None)."""
        encoded, out = self.encoder(mel, mel_mask)
        return encoded, out["mask"]

    def decode(self, tokens, encoded=None, encoded_mask=None, **cached):
        """As WhisperDecoder's call."""
        return self.decoder(tokens, encoded, encoded_mask, **cached)


class WhisperForAudioClassification(nn.Module):
    """Encoder, projector, mean over time, classifier (the transformers class of this name)."""

    config: WhisperConfig
    num_labels: int
    lora: LoRA = NO_LORA
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    scan_unroll: int = 1
    remat: str = "none"

    def __call__(self, input_features: jax.Array, attention_mask: jax.Array | None = None):
        """As `classify`, with the layout of transformers: input_features float[B, M, A].

        attention_mask: [B, A], int or bool; the reference has none and hears the padding.
        """
        return self.classify(jnp.swapaxes(input_features, 1, 2), as_mask(attention_mask))

    @nn.compact
    def classify(self, mel: jax.Array, mask: jax.Array | None = None):
        """mel: float[B, A, M]; mask: bool[B, A] or None.

        Returns: (logits float32[B, num_labels], out) with out["pooled"] float[B, projection].
        """
        types = (self.dtype, self.param_dtype)
        encoder = WhisperEncoder(
            self.config, self.lora, *types, self.scan_unroll, self.remat, name="encoder"
        )
        x, out = encoder(mel, mask)
        project = Dense(
            self.config.classifier_proj_size,
            kernel_axes=(axes.EMBED, None),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="projector",
        )
        weights = jnp.ones(x.shape[:2]) if out["mask"] is None else out["mask"]
        weights = weights / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1)
        pooled = jnp.einsum("BTD,BT->BD", project(x), weights.astype(x.dtype))
        head = Dense(
            self.num_labels,
            kernel_axes=(None, None),
            dtype=jnp.float32,
            param_dtype=self.param_dtype,
            name="classifier",
        )
        return head(pooled), {"pooled": pooled}


def kimi_features(encoded: jax.Array, len_frames: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Kimi-Audio's continuous features at 12.5 Hz: four encoder frames side by side.

    Args:
      encoded: float[B, S, D] of WhisperEncoder, 50 Hz.
      len_frames: int32[B], mel frames (100 Hz) of `whisper_log_mel`.

    Returns:
      features: float[B, ceil(S / 4), 4 * D], oldest frame first.
      lens: int32[B], ceil(len_frames / 8).
    """
    rows, steps, width = encoded.shape
    encoded = jnp.pad(encoded, ((0, 0), (0, -steps % STACK), (0, 0)))
    features = encoded.reshape(rows, -1, STACK * width)
    return features, (-(-len_frames // MEL_PER_FEATURE)).astype(jnp.int32)


def kimi_speech_features(
    encoder: WhisperEncoder, variables: dict, waves: jax.Array, lens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Features as the released Kimi-Audio hears them: unmasked, in pieces of 30 s.

    Pieces are normalised and encoded on their own; all but the last are full, so they join.

    Args:
      waves: float32[B, L] at 16 kHz, ignored past lens: int32[B].

    Returns:
      features: float[B, 375 * ceil(L / 480000), 4 * D], meaningless past lens.
      lens: int32[B], ceil(lens / 1280).
    """
    rows, length = waves.shape
    waves = jnp.where(jnp.arange(length) < lens[:, None], waves, 0.0)
    pieces = jnp.pad(waves, ((0, 0), (0, -length % PIECE_SAMPLES))).reshape(-1, PIECE_SAMPLES)
    mel, _ = whisper_log_mel(pieces, None, encoder.config.num_mel_bins)
    encoded, _ = encoder.apply(variables, mel)
    encoded = encoded.reshape(rows, -1, encoded.shape[-1])
    return kimi_features(encoded, -(-lens // HOP))
