"""Qwen2-Audio (arXiv 2407.10759): Whisper-like audio tower, linear projector, Qwen2 LM.

Arithmetic follows transformers' modeling_qwen2_audio.py. Every audio owns a fixed number of slots
(audio tokens) in the text; slots past an audio's end are masked and take no position, so
that the shapes are static and yet a row does not depend on its padding.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

from paras2s_jax.models import axes
from paras2s_jax.models.layers import Dense
from paras2s_jax.models.lora import NO_LORA, LoRA
from paras2s_jax.models.qwen2 import Qwen2Config, Qwen2LM
from paras2s_jax.models.whisper import WhisperEncoder
from paras2s_jax.models.whisper_layers import WhisperConfig

POOL = 2  # Encoder frames averaged into one embedding: 50 Hz -> 25 Hz.

# What transformers assumes where a config.json is silent (Qwen2AudioEncoderConfig, Qwen2Config).
_AUDIO_DEFAULTS = {
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "num_mel_bins": 128,
    "max_source_positions": 1500,
}
_TEXT_DEFAULTS = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-6,
}


@dataclass(frozen=True)
class Qwen2AudioConfig:
    """Sizes of tower and LM, and the id that marks an audio slot in the text."""

    audio: WhisperConfig
    text: Qwen2Config
    audio_token_index: int = 151_646

    @classmethod
    def from_json(cls, path: str | Path) -> "Qwen2AudioConfig":
        """Reads a transformers config.json, which leaves out values equal to the defaults."""
        values: Mapping = json.loads(Path(path).read_text())
        for key in ("audio_config", "text_config"):
            if key not in values:
                raise ValueError(f"{path}: key {key} missing; is this a Qwen2-Audio config?")
        # transformers 5 nests the base of the rotary angles.
        rope = values["text_config"].get("rope_parameters") or {}
        text = _TEXT_DEFAULTS | {k: v for k, v in rope.items() if k == "rope_theta"}
        return cls(
            audio=_pick(WhisperConfig, _AUDIO_DEFAULTS | values["audio_config"]),
            text=_pick(Qwen2Config, text | values["text_config"]),
            audio_token_index=values.get("audio_token_index", cls.audio_token_index),
        )


def _pick(cls, values: Mapping):
    return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


class Qwen2Audio(nn.Module):
    """Text and any number of audios -> logits of the next text token.

    lora applies to the LM, audio_lora to the tower (Dense names q_proj, k_proj, v_proj,
    out_proj, fc1, fc2). mask_inputs=False lets the tower's convolutions see the mel of the
    padding, as transformers does.
    """

    config: Qwen2AudioConfig
    lora: LoRA = NO_LORA
    audio_lora: LoRA = NO_LORA
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    scan_unroll: int = 1
    remat: str = "none"
    mask_inputs: bool = True

    def setup(self):
        c, types = self.config, (self.dtype, self.param_dtype)
        loop = (self.scan_unroll, self.remat)
        self.audio_tower = WhisperEncoder(
            c.audio, self.audio_lora, *types, *loop, POOL, self.mask_inputs
        )
        self.projector = Dense(
            c.text.hidden_size,
            kernel_axes=(axes.FEATURES, axes.EMBED),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        self.language_model = Qwen2LM(c.text, self.lora, *types, *loop)

    def audio_embeds(self, mel: jax.Array, len_frames: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Embeddings of audios, to be computed once per audio wherever it is used.

        Args:
          mel: float[B, A, M] of `whisper_log_mel`.
          len_frames: int32[B].

        Returns:
          embeds: float[B, S, D] with S = ceil(A / 2) // 2 = num_slots(A).
          mask: bool[B, S].
        """
        mask = jnp.arange(mel.shape[1]) < len_frames[:, None]
        encoded, out = self.audio_tower(mel, mask)
        return self.projector(encoded), out["mask"]

    def embed(
        self,
        input_ids: jax.Array,
        audio_embeds: jax.Array | None = None,
        audio_mask: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Puts the audios into the text's slots, in order. Arguments as in __call__.

        Returns: (float[B, T, D], bool[B, T]).
        """
        embeds = self.language_model.embed(input_ids)
        mask = jnp.ones(input_ids.shape, bool) if mask is None else mask
        if audio_embeds is None:
            return embeds, mask
        rows, width = len(input_ids), audio_embeds.shape[-1]
        audio_embeds = audio_embeds.reshape(rows, -1, width).astype(embeds.dtype)
        is_slot = input_ids == self.config.audio_token_index
        # Slots without an audio (there should be none) are masked, not filled with another's end.
        slot = jnp.cumsum(is_slot, axis=1) - 1
        exists = slot < audio_embeds.shape[1]
        slot = jnp.clip(slot, 0, audio_embeds.shape[1] - 1)
        heard = jnp.take_along_axis(audio_embeds, slot[..., None], axis=1)
        is_real = jnp.take_along_axis(audio_mask.reshape(rows, -1), slot, axis=1) & exists
        embeds = jnp.where(is_slot[..., None], heard, embeds)
        return embeds, mask & jnp.where(is_slot, is_real, True)

    def __call__(
        self,
        input_ids: jax.Array,
        audio_embeds: jax.Array | None = None,
        audio_mask: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        prefix: dict | None = None,
        prefix_mask: jax.Array | None = None,
        emit: tuple[str, ...] = (),
    ):
        """Logits of the next token after each position.

        To score G answers to a prompt, run what they share (query audio included) once with
        emit=("kv",), then the rest of all B = P * G rows with prefix=out["kv"] and
        prefix_mask=out["mask"]: row p of the prefix serves rows p * G … p * G + G - 1.

        Args:
          input_ids: int32[B, T] with one audio_token_index per slot.
          audio_embeds: float[B, n, S, D] (or [B, n * S, D]), the row's n audios in order.
          audio_mask: bool[B, n, S] (or [B, n * S]).
          mask: bool[B, T], which ids are real; padding may stand anywhere.
          prefix, prefix_mask, emit: see Qwen2LM.

        Returns:
          logits: float32[B, T, V].
          out: "mask" bool[B, T], all that was attended to; "hidden" float[B, T, D]; "kv".
        """
        embeds, mask = self.embed(input_ids, audio_embeds, audio_mask, mask)
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        if prefix_mask is not None:
            sizes = jnp.sum(prefix_mask, axis=1)
            positions += jnp.repeat(sizes, len(input_ids) // len(prefix_mask))[:, None]
        logits, out = self.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            prefix=prefix,
            prefix_mask=prefix_mask,
            emit=emit,
        )
        return logits, out | {"mask": mask}

    def init_all(self, mel: jax.Array, input_ids: jax.Array):
        """Touches every parameter; use with `init`. mel: float[B, A, M]; input_ids: int32[B, T]."""
        embeds, mask = self.audio_embeds(mel, jnp.full(len(mel), mel.shape[1]))
        return self(input_ids, embeds, mask)


def num_slots(num_frames: int) -> int:
    """Audio slots that `num_frames` mel frames need (_get_feat_extract_output_lengths)."""
    return -(-num_frames // 2) // POOL
