"""The thinker of Qwen2.5-Omni (arXiv 2503.20215) for text and audio: the reward model.

Arithmetic follows transformers' modeling_qwen2_5_omni.py, of whose thinker all but the vision tower
is here. Audio is heard in windows of 2 * n_window mel frames (2 s as released):
convolutions, positions and attention stop at their borders, so that an audio of any length costs
in proportion to it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

from paras2s_jax.data.audio_chat import num_slots
from paras2s_jax.models import axes
from paras2s_jax.models.layers import KERNEL_INIT, Dense, LayerNorm
from paras2s_jax.models.lora import NO_LORA, LoRA
from paras2s_jax.models.qwen2 import Qwen2Config
from paras2s_jax.models.qwen2_audio import POOL, Qwen2Audio, pick, text_config
from paras2s_jax.models.whisper_layers import (
    EncoderLayer,
    WhisperConfig,
    mel_conv,
    scan_layers,
    sinusoids,
)


@dataclass(frozen=True)
class OmniAudioConfig(WhisperConfig):
    """Sizes of the windowed encoder. n_window: half a window, in mel frames."""

    n_window: int = 100
    output_dim: int = 3584


# What transformers assumes where a config.json is silent (Qwen2_5OmniAudioEncoderConfig,
# Qwen2_5OmniTextConfig, Qwen2_5OmniRotaryEmbedding).
_AUDIO_DEFAULTS = {
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "num_mel_bins": 128,
    "max_source_positions": 1500,
}
_TEXT_DEFAULTS = {
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_theta": 1_000_000.0,
}
_MROPE_SECTION = (16, 24, 24)


@dataclass(frozen=True)
class Qwen2_5OmniConfig:
    """Sizes of the thinker's audio tower and LM, and the id that marks an audio slot.

    is_whole: whether the checkpoint holds the talker and the vocoder too (its keys then begin with
    "thinker."), as the release does.
    """

    audio: OmniAudioConfig
    text: Qwen2Config
    audio_token_index: int = 151_646
    is_whole: bool = True

    @classmethod
    def from_json(cls, path: str | Path) -> "Qwen2_5OmniConfig":
        """Reads the config.json of the whole model, or of a thinker saved alone.

        Raises:
            ValueError: there is no thinker, it lacks a part, or its widths do not fit.
        """
        return cls.from_dict(json.loads(Path(path).read_text()), str(path))

    @classmethod
    def from_dict(cls, values: Mapping, where: str = "config") -> "Qwen2_5OmniConfig":
        """As from_json. Empty parts give the released 7B. where: what an error calls the values."""
        is_whole = "thinker_config" in values
        values = values.get("thinker_config", values)
        for key in ("audio_config", "text_config"):
            if key not in values:
                raise ValueError(f"{where}: key {key} missing; is this a Qwen2.5-Omni config?")
        # The part names a class of its own, which is shaped like Qwen2's.
        given = {**_TEXT_DEFAULTS, **values["text_config"], "model_type": "qwen2"}
        text = text_config(given, f"{where}: text_config")
        if text.mrope_section is None:
            text = replace(text, mrope_section=_MROPE_SECTION)
        config = cls(
            audio=pick(OmniAudioConfig, _AUDIO_DEFAULTS | values["audio_config"]),
            text=text,
            audio_token_index=values.get("audio_token_index", cls.audio_token_index),
            is_whole=is_whole,
        )
        if config.audio.output_dim != config.text.hidden_size:
            raise ValueError(
                f"{where}: audio_config.output_dim {config.audio.output_dim} is not "
                f"text_config.hidden_size {config.text.hidden_size}; audio could not enter the text"
            )
        return config


class OmniAudioEncoder(nn.Module):
    """Log-mel -> 25 Hz embeddings in the LM's width (Qwen2_5OmniAudioEncoder)."""

    config: OmniAudioConfig
    lora: LoRA = NO_LORA
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    scan_unroll: int = 1
    remat: str = "none"

    @nn.compact
    def __call__(self, mel: jax.Array, mask: jax.Array):
        """Encodes mel: float[B, A, M], of which mask: bool[B, A] is real, at the front of a row.

        Returns: (float[B, S, output_dim] with S = num_slots(A), out); out["mask"] bool[B, S].
        """
        c, types = self.config, (self.dtype, self.param_dtype)
        rows, num_frames, _ = mel.shape
        # All windows of all rows side by side: [B * W, 2 * n_window, M].
        window = 2 * c.n_window
        room = ((0, 0), (0, -num_frames % window))
        mask = jnp.pad(mask, room).reshape(-1, window)
        mel = jnp.pad(mel, (*room, (0, 0))).reshape(*mask.shape, -1)
        conv1 = mel_conv(c.d_model, 1, (1, 1), *types, "conv1")
        conv2 = mel_conv(c.d_model, 2, (1, 1), *types, "conv2")
        x = nn.gelu(conv1(_hide(mel, mask)), approximate=False)
        x = nn.gelu(conv2(_hide(x, mask)), approximate=False)
        x = x + jnp.asarray(sinusoids(c.max_source_positions, c.d_model)[: x.shape[1]], x.dtype)
        mask = mask[:, ::2]
        stack = scan_layers(
            EncoderLayer, c.encoder_layers, self.scan_unroll, self.remat, nn.broadcast
        )
        x, _ = stack(c, self.lora, *types, name="layers")(x, mask[:, None])
        # Pairs are taken along the whole audio: with an odd n_window they cross the borders.
        x, mask = x.reshape(rows, -1, c.d_model), mask.reshape(rows, -1)
        steps = num_slots(num_frames)
        x = nn.avg_pool(x, (POOL,), (POOL,))[:, :steps]
        mask = mask[:, POOL - 1 :: POOL][:, :steps]
        x = LayerNorm(1e-5, *types, name="ln_post")(x)
        x = Dense(
            c.output_dim,
            kernel_axes=(axes.FEATURES, axes.EMBED),
            lora_rank=self.lora.rank_of("proj"),
            lora_alpha=self.lora.alpha,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="proj",
        )(x)
        # The checkpoint has it, the thinker does not read it: kept to be exported.
        init = nn.with_logical_partitioning(KERNEL_INIT, (None, axes.EMBED))
        self.param("audio_bos_eos_token", init, (2, c.output_dim), self.param_dtype)
        return _hide(x, mask), {"mask": mask}


def _hide(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Zeros where not real. x: [B, T, …]; mask: bool[B, T]."""
    return jnp.where(mask[..., None], x, 0)


class Qwen2_5OmniThinker(Qwen2Audio):
    """Text and any number of audios -> logits of the next text token.

    Calls, slots, prefixes and generation are those of Qwen2Audio. lora applies to the LM,
    audio_lora to the tower (Dense names q_proj, k_proj, v_proj, out_proj, fc1, fc2, proj).
    position_ids may be int32[3, B, T]; without vision all three are the positions of the text,
    audio slots included (get_rope_index). mask_inputs has no effect: this tower never sees padding.
    """

    config: Qwen2_5OmniConfig

    def setup(self):
        types = (self.dtype, self.param_dtype)
        self.audio_tower = OmniAudioEncoder(
            self.config.audio, self.audio_lora, *types, self.scan_unroll, self.remat
        )
        self.language_model = self.text_model()

    def audio_embeds(self, mel: jax.Array, len_frames: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As Qwen2Audio's; A may be anything."""
        embeds, out = self.audio_tower(mel, jnp.arange(mel.shape[1]) < len_frames[:, None])
        return embeds, out["mask"]
