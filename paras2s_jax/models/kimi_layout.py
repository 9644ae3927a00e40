"""Kimi-Audio's configuration, and where its tokens go: prompts and response streams.

Layout rules: the released prompt manager (MoonshotAI/Kimi-Audio 2607d51, prompt_manager.py).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from paras2s_jax.data.tiktoken_vocabulary import SPECIAL_OFFSETS
from paras2s_jax.models.qwen2 import Qwen2Config

STACKS = ("trunk", "text_tail", "audio_tail")


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens; the release keeps them in one block (see special_ids)."""

    msg_end: int
    user_msg_start: int
    assistant_msg_start: int
    media_begin: int
    media_end: int
    kimia_text_blank: int
    kimia_text_eos: int
    kimia_user_msg_start: int
    kimia_assistant_msg_start: int
    kimia_speech_ct_id: int
    kimia_speech_ctd_id: int
    pad: int


def special_ids(first: int, pad: int) -> SpecialIds:
    """Special ids at the released distances from the block's first id (BOS; 151643 there)."""
    names = [field.name for field in fields(SpecialIds) if field.name != "pad"]
    return SpecialIds(
        **{name: first + SPECIAL_OFFSETS[f"<|im_{name}|>"] for name in names},
        pad=pad,
    )


@dataclass(frozen=True)
class KimiAudioConfig:
    """Sizes and ids; names follow the released config.json. Defaults: Kimi-Audio-7B-Instruct.

    bos_token_id is the first id of the special block. rope_theta has no default that the
    release confirms: it is read from config.json.
    """

    vocab_size: int = 168_448
    hidden_size: int = 3584
    intermediate_size: int = 18_944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    bos_token_id: int = 151_643
    pad_token_id: int = 152_063
    kimia_mimo_layers: int = 6
    kimia_mimo_audiodelaytokens: int = 6
    kimia_mimo_transformer_from_layer_index: int = 21
    kimia_token_offset: int = 152_064
    kimia_adaptor_input_dim: int = 5120

    def __post_init__(self):
        if not 0 <= self.kimia_mimo_transformer_from_layer_index < self.num_hidden_layers - 1:
            raise ValueError(
                "KimiAudioConfig: kimia_mimo_transformer_from_layer_index = "
                f"{self.kimia_mimo_transformer_from_layer_index} must leave at least one of the "
                f"{self.num_hidden_layers} layers to the text tail"
            )

    @classmethod
    def from_json(cls, path: str | Path) -> "KimiAudioConfig":
        """Reads config.json; keys that do not bear on the arithmetic are passed over.

        Raises:
            ValueError: the file is no JSON, lacks a key, or places a special id elsewhere.
        """
        try:
            values: Mapping = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not readable as JSON ({error})") from error
        names = [field.name for field in fields(cls)]
        missing = [name for name in names if name not in values]
        if missing:
            raise ValueError(
                f"{path}: keys missing from the config: {', '.join(missing)}; write them into it, "
                "no default is safe (without rope_theta the reference assumes 10000)"
            )
        config = cls(**{name: values[name] for name in names})
        for name in ("media_begin", "media_end"):
            told, placed = values.get(f"kimia_{name}"), getattr(config.special, name)
            if told not in (None, placed):
                raise ValueError(
                    f"{path}: kimia_{name} is {told}, but special ids that start at bos_token_id "
                    f"{config.bos_token_id} have it at {placed}"
                )
        return config

    @cached_property
    def special(self) -> SpecialIds:
        return special_ids(self.bos_token_id, self.pad_token_id)

    @property
    def num_codes(self) -> int:
        return self.vocab_size - self.kimia_token_offset

    @property
    def delay(self) -> int:
        """Steps by which the audio stream starts after the text stream."""
        return self.kimia_mimo_audiodelaytokens

    @property
    def stack_sizes(self) -> dict[str, int]:
        """Layers per stack. The branch leaves after layer index 21: 22 shared layers."""
        trunk = self.kimia_mimo_transformer_from_layer_index + 1
        sizes = (trunk, self.num_hidden_layers - trunk, self.kimia_mimo_layers)
        return dict(zip(STACKS, sizes, strict=True))

    @property
    def decoder(self) -> Qwen2Config:
        return Qwen2Config(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            rope_theta=self.rope_theta,
            rms_norm_eps=self.rms_norm_eps,
        )


class Prompt(struct.PyTreeNode):
    """Prompts without the closing kimia_assistant_msg_start, right-padded.

    That token is the first input of every response (at position = prompt length), so that
    ragged prompts need no gather. audio_ids, text_ids: int32[P, T]; features: float[P, T, Fin]
    at their positions; continuous_mask (features count here), mask (real): bool[P, T].
    """

    audio_ids: jax.Array
    text_ids: jax.Array
    features: jax.Array
    continuous_mask: jax.Array
    mask: jax.Array

    @property
    def length(self) -> jax.Array:
        """int32[P]."""
        return jnp.sum(self.mask, axis=-1, dtype=jnp.int32)


def audio_prompt(
    config: KimiAudioConfig, codes: jax.Array, len_codes: jax.Array, features: jax.Array
) -> Prompt:
    """Prompt of one spoken user message that asks for text and speech; jit-able.

    codes: int32[P, S]; len_codes: int32[P]; features: float[P, S, Fin], one per code.
    Returns: Prompt with T = S + 5: user start, media_begin, codes, media_end, ctd, msg_end.
    """
    ids = config.special
    place = jnp.arange(codes.shape[1] + 5)[None]
    end = 2 + len_codes[:, None]
    shifted = jnp.pad(codes, ((0, 0), (2, 3))) + config.kimia_token_offset
    audio_ids = jnp.full(shifted.shape, ids.pad, jnp.int32)
    audio_ids = jnp.where(place < end, shifted, audio_ids)
    for where, value in (
        (place == 0, ids.kimia_user_msg_start),
        (place == 1, ids.media_begin),
        (place == end, ids.media_end),
        (place == end + 1, ids.kimia_speech_ctd_id),
        (place == end + 2, ids.msg_end),
    ):
        audio_ids = jnp.where(where, value, audio_ids)
    return Prompt(
        audio_ids=audio_ids.astype(jnp.int32),
        text_ids=jnp.full(shifted.shape, ids.kimia_text_blank, jnp.int32),
        features=jnp.pad(features, ((0, 0), (2, 3), (0, 0))),
        continuous_mask=(place >= 2) & (place < end),
        mask=place < end + 3,
    )


def response_streams(
    config: KimiAudioConfig,
    text_ids: jax.Array,
    len_text: jax.Array,
    codes: jax.Array,
    len_codes: jax.Array,
    steps: int,
) -> dict[str, jax.Array]:
    """Inputs, targets and masks of known answers, as the generate loop would have made them.

    text_ids: int32[..., Tt], len_text: int32[...], codes: int32[..., Ta], len_codes:
    int32[...]; steps R; what does not fit is cut. The text stream is tokens, text_eos, blanks;
    the audio stream is `delay` blanks, codes, msg_end; the answer ends with the audio.
    Returns: text_in, audio_in (fed), text_out, audio_out (targets): int32[..., R]; text_mask,
    audio_mask (True where the policy chooses), mask (real steps): bool[..., R].
    """
    ids = config.special
    step = jnp.arange(steps)
    len_text, len_codes = len_text[..., None], len_codes[..., None]
    text_out = jnp.where(step < len_text, _fit(text_ids, steps), ids.kimia_text_blank)
    text_out = jnp.where(step == len_text, ids.kimia_text_eos, text_out)
    end = config.delay + len_codes
    is_code = (step >= config.delay) & (step < end)
    audio_out = _fit(codes, steps, config.delay) + config.kimia_token_offset
    audio_out = jnp.where(is_code, audio_out, ids.kimia_text_blank)
    audio_out = jnp.where(step == end, ids.msg_end, audio_out)
    mask = step <= end
    text_out = jnp.where(mask, text_out, ids.kimia_text_blank)
    return {
        **shifted_inputs(config, text_out, audio_out),
        "text_out": text_out.astype(jnp.int32),
        "audio_out": audio_out.astype(jnp.int32),
        "text_mask": (step <= len_text) & mask,
        "audio_mask": (step >= config.delay) & mask,
        "mask": mask,
    }


def shifted_inputs(config: KimiAudioConfig, text_out: jax.Array, audio_out: jax.Array) -> dict:
    """text_in and audio_in: the streams one step later, opened by the assistant's start."""
    ids = config.special

    def shift(stream, first):
        first = jnp.full((*stream.shape[:-1], 1), first, jnp.int32)
        return jnp.concatenate([first, stream[..., :-1].astype(jnp.int32)], axis=-1)

    return {
        "text_in": shift(text_out, ids.kimia_text_blank),
        "audio_in": shift(audio_out, ids.kimia_assistant_msg_start),
    }


def _fit(x: jax.Array, steps: int, start: int = 0) -> jax.Array:
    """[..., n] -> [..., steps], with `start` zeros before and zeros or a cut after."""
    x = x[..., : max(steps - start, 0)]
    tail = steps - start - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(min(start, steps), max(tail, 0))])


def prompt_layout(
    config: KimiAudioConfig, messages: Sequence[Mapping], output_type: str = "both"
) -> dict[str, list]:
    """Token layout of a conversation, the closing kimia_assistant_msg_start included.

    messages: {"role": "user"|"assistant", "message_type": "text"|"audio", "content": ids or
    codes}; output_type: "both" or "text". Returns: audio_ids, text_ids, is_continuous_mask,
    and feature_frames: the number of codes of each audio message.
    """
    ids = config.special
    start = {"user": ids.kimia_user_msg_start, "assistant": ids.kimia_assistant_msg_start}
    closing = {"text": ids.kimia_speech_ct_id, "both": ids.kimia_speech_ctd_id}[output_type]
    audio, text, heard, frames = [], [], [], []

    def put(audio_ids, text_ids=None, is_heard=False):
        audio.extend(audio_ids)
        text.extend(text_ids or [ids.kimia_text_blank] * len(audio_ids))
        heard.extend([is_heard] * len(audio_ids))

    roles = [message["role"] for message in messages]
    for i, message in enumerate(messages):
        content = list(message["content"])
        is_audio = message["message_type"] == "audio"
        if i == 0 or roles[i] != roles[i - 1]:
            put([start[roles[i]]])
        if is_audio:
            put([ids.media_begin])
            put([code + config.kimia_token_offset for code in content], is_heard=True)
            put([ids.media_end])
            frames.append(len(content))
        elif content:
            put([ids.kimia_text_blank] * len(content), content)
        if i + 1 == len(messages) or roles[i + 1] != roles[i]:
            put([closing, ids.msg_end] if is_audio else [ids.msg_end])
    put([ids.kimia_assistant_msg_start])
    return {
        "audio_ids": audio,
        "text_ids": text,
        "is_continuous_mask": heard,
        "feature_frames": frames,
    }


def place_features(
    config: KimiAudioConfig, audio_ids: jax.Array, features: Sequence[jax.Array]
) -> jax.Array:
    """Puts feature k between the k-th media_begin and media_end of every row; jit-able.

    Frames that exceed the segment are cut (modeling_moonshot_kimia.py, forward, for one row).

    audio_ids: int32[B, T]; features: float[B, n_k, Fin] each; a row without a k-th segment
    leaves feature k out. Returns: float[B, T, Fin], zero outside of the segments.
    """
    begins = audio_ids == config.special.media_begin
    opened = jnp.cumsum(begins, axis=1)
    closed = jnp.cumsum(audio_ids == config.special.media_end, axis=1)
    place = jnp.arange(audio_ids.shape[1])
    frame = place - jax.lax.cummax(jnp.where(begins, place, -1), axis=1) - 1
    placed = jnp.zeros((*audio_ids.shape, config.kimia_adaptor_input_dim), jnp.float32)
    for k, feature in enumerate(features):
        num_frames = feature.shape[1]
        if not num_frames:
            continue
        here = (opened == k + 1) & (closed == k) & (frame >= 0) & (frame < num_frames)
        frames = jnp.take_along_axis(feature, jnp.clip(frame, 0, num_frames - 1)[..., None], axis=1)
        placed = jnp.where(here[..., None], frames, placed)
    return placed


def collate_prompts(
    config: KimiAudioConfig,
    layouts: Sequence[Mapping[str, Sequence]],
    features: Sequence[Sequence[np.ndarray]],
    size: int | None = None,
) -> Prompt:
    """Pads layouts (prompt_layout) to one Prompt, without their closing assistant start.

    features: per layout, one float[n, Fin] per audio message. size: T, default the longest.
    """
    size = size or max(len(layout["audio_ids"]) - 1 for layout in layouts)
    shape = (len(layouts), size)
    audio_ids = np.full(shape, config.special.pad, np.int32)
    text_ids = np.full(shape, config.special.kimia_text_blank, np.int32)
    heard, mask = np.zeros(shape, bool), np.zeros(shape, bool)
    for row, (layout, feature) in enumerate(zip(layouts, features, strict=True)):
        n = len(layout["audio_ids"]) - 1
        if n > size:
            raise ValueError(f"collate_prompts: prompt {row} has {n} tokens, size is {size}")
        audio_ids[row, :n] = layout["audio_ids"][:-1]
        text_ids[row, :n] = layout["text_ids"][:-1]
        heard[row, :n] = layout["is_continuous_mask"][:-1]
        mask[row, :n] = True
        for name in ("media_begin", "media_end"):
            found = int(np.sum(audio_ids[row] == getattr(config.special, name)))
            if found != len(feature):
                raise ValueError(
                    f"collate_prompts: prompt {row} has {len(feature)} features for {found} {name} "
                    "tokens; give one feature array per audio message"
                )
    none = np.zeros((0, config.kimia_adaptor_input_dim), np.float32)
    stacked = [
        _stack([feature[k] if k < len(feature) else none for feature in features])
        for k in range(max(map(len, features)))
    ]
    placed = jax.jit(place_features, static_argnums=0)(config, audio_ids, stacked)
    return Prompt(*(jnp.asarray(x) for x in (audio_ids, text_ids, placed, heard, mask)))


def _stack(features: Sequence[np.ndarray]) -> np.ndarray:
    """float[n_row, Fin] each -> float32[B, longest, Fin], padded with zeros."""
    longest = max(map(len, features))
    padded = [np.pad(x, ((0, longest - len(x)), (0, 0))) for x in features]
    return np.stack(padded).astype(np.float32)
