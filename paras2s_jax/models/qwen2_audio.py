"""Qwen2-Audio (arXiv 2407.10759): Whisper-like audio tower, linear projector, Qwen2 LM.

Arithmetic follows transformers' modeling_qwen2_audio.py. Audios enter the text in its slots (audio
tokens), in two layouts. Called as the reference is, an audio owns as many slots as it has
embeddings. Called with `audio_embeds`, every audio owns the same number, and slots past an audio's
end are masked and take no position: shapes are static, and yet a row does not depend on its
padding.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

from paras2s_jax.models import axes
from paras2s_jax.models.generate import GREEDY, Generated
from paras2s_jax.models.generate import generate as generate_text
from paras2s_jax.models.layers import Dense
from paras2s_jax.models.lora import NO_LORA, LoRA
from paras2s_jax.models.qwen2 import Qwen2Config, Qwen2LM
from paras2s_jax.models.sampling import Sampling
from paras2s_jax.models.whisper import WhisperEncoder
from paras2s_jax.models.whisper_layers import WhisperConfig

POOL = 2  # Encoder frames averaged into one embedding: 50 Hz -> 25 Hz.

# What transformers assumes where a config.json is silent (Qwen2AudioEncoderConfig).
_AUDIO_DEFAULTS = {
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "num_mel_bins": 128,
    "max_source_positions": 1500,
}


@dataclass(frozen=True)
class Qwen2AudioConfig:
    """Sizes of tower and LM, and the id that marks an audio slot in the text."""

    audio: WhisperConfig
    text: Qwen2Config
    audio_token_index: int = 151_646

    @classmethod
    def from_json(cls, path: str | Path) -> "Qwen2AudioConfig":
        """Reads a transformers config.json, which leaves out values equal to the defaults.

        Raises:
            ValueError: it lacks the part of the tower or of the LM.
        """
        values: Mapping = json.loads(Path(path).read_text())
        for key in ("audio_config", "text_config"):
            if key not in values:
                raise ValueError(f"{path}: key {key} missing; is this a Qwen2-Audio config?")
        return cls(
            audio=pick(WhisperConfig, _AUDIO_DEFAULTS | values["audio_config"]),
            text=text_config(values["text_config"], f"{path}: text_config"),
            audio_token_index=values.get("audio_token_index", cls.audio_token_index),
        )


def pick(cls, values: Mapping):
    """The dataclass from those of the values that it has a field for."""
    return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


def text_config(values: Mapping, where: str) -> Qwen2Config:
    """The LM's part of a config; the head of an audio model is never tied, whatever it says."""
    return Qwen2Config.from_dict({**values, "tie_word_embeddings": False}, where)


class Qwen2Audio(nn.Module):
    """Text and any number of audios -> logits of the next text token.

    lora applies to the LM, audio_lora to the tower (Dense names q_proj, k_proj, v_proj, out_proj,
    fc1, fc2) and to the projector (linear). mask_inputs=False lets the tower's convolutions see the
    mel of the padding, as transformers does.
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
            lora_rank=self.audio_lora.rank_of("linear"),
            lora_alpha=self.audio_lora.alpha,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        self.language_model = self.text_model()

    @nn.nowrap
    def text_model(self) -> Qwen2LM:
        """The LM alone; its variables are the subtrees "language_model"."""
        types = (self.dtype, self.param_dtype)
        return Qwen2LM(self.config.text, self.lora, *types, self.scan_unroll, self.remat)

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
        """Puts the audios into the text's slots, in order; each owns S of its row's.

        Arguments as in __call__. Returns: (float[B, T, D], bool[B, T]).
        """
        rows = len(input_ids)
        if audio_embeds is not None:
            # A row's audios, one after the other, are as good as one long one here.
            audio_embeds = audio_embeds.reshape(rows, 1, -1, audio_embeds.shape[-1])
            audio_mask = audio_mask.reshape(rows, 1, -1)
        owned = None if audio_embeds is None else jnp.full((rows, 1), audio_embeds.shape[2])
        return self._place(input_ids, audio_embeds, audio_mask, owned, mask)

    def merge(
        self,
        input_ids: jax.Array,
        input_features: jax.Array,
        attention_mask: jax.Array | None = None,
        feature_attention_mask: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Puts the audios into the slots of all rows in turn; each owns what it fills.

        Arguments as in __call__. Returns: (float[B, T, D], bool[B, T]).
        """
        num_audios, _, num_frames = input_features.shape
        if feature_attention_mask is None:
            lens = jnp.full(num_audios, num_frames)
        else:
            lens = jnp.sum(feature_attention_mask.astype(bool), axis=1)
        embeds, real = self.audio_embeds(input_features.transpose(0, 2, 1), lens)
        owned = jnp.sum(real, axis=1)[None]
        shape = input_ids.shape
        mask = None if attention_mask is None else attention_mask.reshape(1, -1)
        ids = input_ids.reshape(1, -1)
        embeds, mask = self._place(ids, embeds[None], real[None], owned, mask)
        return embeds.reshape(*shape, -1), mask.reshape(shape)

    def _place(self, input_ids, audio_embeds, audio_mask, owned, mask):
        """input_ids, mask: [R, T]; audio_embeds: [R, n, S, D]; audio_mask: [R, n, S].

        owned: int32[R, n], how many slots of the row each of its audios takes.
        """
        embeds = self.language_model.embed(input_ids)
        mask = jnp.ones(input_ids.shape, bool) if mask is None else mask.astype(bool)
        if audio_embeds is None:
            return embeds, mask
        rows, _, size, width = audio_embeds.shape
        is_slot = input_ids == self.config.audio_token_index
        audio, frame, exists = slot_sources(is_slot, owned)
        source = audio * size + jnp.clip(frame, 0, size - 1)
        audio_embeds = audio_embeds.reshape(rows, -1, width).astype(embeds.dtype)
        heard = jnp.take_along_axis(audio_embeds, source[..., None], axis=1)
        # Slots without an audio (there should be none) are masked, not filled with another's end.
        is_real = exists & jnp.take_along_axis(audio_mask.reshape(rows, -1), source, axis=1)
        embeds = jnp.where(is_slot[..., None], heard, embeds)
        return embeds, mask & jnp.where(is_slot, is_real, True)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        input_features: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        feature_attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        *,
        audio_embeds: jax.Array | None = None,
        audio_mask: jax.Array | None = None,
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
          input_features: float[n, M, A], log-mel of all rows' audios in order; of n's slots in
            the text, an audio owns num_slots of its length.
          attention_mask: bool or int[B, T], which ids are real; padding may stand anywhere.
          feature_attention_mask: bool or int[n, A], which frames are real, at the front.
          position_ids: int32[B, T], by default the number of real positions before each.
          inputs_embeds: float[B, T, D] instead of ids and audios: what `merge` or `embed` gave.
          audio_embeds: float[B, n, S, D] (or [B, n * S, D]) instead of input_features: the row's
            n audios in order, each with S slots.
          audio_mask: bool[B, n, S] (or [B, n * S]), which of these are real.
          prefix, prefix_mask, emit: see Qwen2LM.

        Returns:
          logits: float32[B, T, V].
          out: "mask" bool[B, T], all that was attended to; "hidden" float[B, T, D]; "kv".

        Raises:
          ValueError: audios are given in two ways, or none of input_ids and inputs_embeds is.
        """
        ways = [input_features is not None, audio_embeds is not None, inputs_embeds is not None]
        if sum(ways) > 1:
            raise ValueError("give one of input_features, audio_embeds and inputs_embeds")
        if inputs_embeds is not None:
            embeds, mask = inputs_embeds, attention_mask
            mask = jnp.ones(embeds.shape[:2], bool) if mask is None else mask.astype(bool)
        elif input_ids is None:
            raise ValueError("give input_ids or inputs_embeds")
        elif input_features is not None:
            embeds, mask = self.merge(
                input_ids, input_features, attention_mask, feature_attention_mask
            )
        else:
            embeds, mask = self.embed(input_ids, audio_embeds, audio_mask, attention_mask)
        if position_ids is None:
            position_ids = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
            if prefix_mask is not None:
                sizes = jnp.sum(prefix_mask, axis=1)
                position_ids += jnp.repeat(sizes, len(mask) // len(prefix_mask))[:, None]
        logits, out = self.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=position_ids,
            prefix=prefix,
            prefix_mask=prefix_mask,
            emit=emit,
        )
        return logits, out | {"mask": mask}

    def init_all(self, mel: jax.Array, input_ids: jax.Array):
        """Touches every parameter; use with `init`. mel: float[B, A, M]; input_ids: int32[B, T]."""
        embeds, mask = self.audio_embeds(mel, jnp.full(len(mel), mel.shape[1]))
        return self(input_ids, audio_embeds=embeds, audio_mask=mask)


def slot_sources(is_slot: jax.Array, owned: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which audio and which of its embeddings each slot takes: audio by audio, none skipped.

    is_slot: bool[R, T]; owned: int32[R, n], how many slots each audio takes.
    Returns: audio int32[R, T], frame int32[R, T], and bool[R, T], False at slots after the last
    audio. At other positions the numbers mean nothing, but are in range.
    """
    number = jnp.cumsum(is_slot, axis=1) - 1
    ends = jnp.cumsum(owned, axis=1)
    # The audio of slot number i is the first that ends after i.
    audio = jnp.sum(number[..., None] >= ends[:, None], axis=-1)
    exists = audio < owned.shape[1]
    audio = jnp.minimum(audio, owned.shape[1] - 1)
    frame = number - jnp.take_along_axis(ends - owned, audio, axis=1)
    return audio, jnp.maximum(frame, 0), exists


def generate(
    model: Qwen2Audio,
    variables: Mapping,
    input_ids: jax.Array,
    input_features: jax.Array | None = None,
    attention_mask: jax.Array | None = None,
    feature_attention_mask: jax.Array | None = None,
    *,
    max_new_tokens: int,
    eos_token_ids: tuple[int, ...],
    sampling: Sampling = GREEDY,
    rng: jax.Array | None = None,
) -> Generated:
    """The text that follows; greedy unless `sampling` says otherwise. Arguments as in __call__."""
    inputs_embeds, mask = _merged(
        model, variables, input_ids, input_features, attention_mask, feature_attention_mask
    )
    return generate_text(
        model.text_model(),
        {kind: tree["language_model"] for kind, tree in variables.items()},
        inputs_embeds=inputs_embeds,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos_token_ids,
        sampling=sampling,
        rng=rng,
    )


@functools.partial(jax.jit, static_argnums=0)
def _merged(model, variables, input_ids, input_features, attention_mask, feature_attention_mask):
    if input_features is None:
        return model.apply(variables, input_ids, mask=attention_mask, method="embed")
    return model.apply(
        variables,
        input_ids,
        input_features,
        attention_mask,
        feature_attention_mask,
        method="merge",
    )
