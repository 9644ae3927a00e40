"""The policy between two waveforms: front end, two-stream model, detokenizer. Pure functions.

Nothing here holds parameters: the model's `variables` and the frozen `Frontend` are arguments, so
that every caller may jit, shard or swap them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from paras2s_jax.align.losses import STREAMS
from paras2s_jax.audio.mel import RATE_HZ, whisper_log_mel
from paras2s_jax.audio.resample import resample_rows
from paras2s_jax.data.tokenizer import Tokenizer
from paras2s_jax.models import axes, decode
from paras2s_jax.models.decode import Rollout
from paras2s_jax.models.kimi_audio import KimiAudio, Prompt, audio_prompt, response_streams
from paras2s_jax.models.placement import constrain
from paras2s_jax.models.sampling import Sampling
from paras2s_jax.models.whisper import WhisperEncoder, kimi_features, kimi_speech_features

# Streams end with text_eos or msg_end, one step more than their content.
END_STEPS = 1


class Frontend(struct.PyTreeNode):
    """What surrounds the policy and is never trained here; a pytree, to be an argument of jit.

    encoder: variables of the WhisperEncoder. speech_tokenizer, detokenizer: pytrees with
    `encode` and `decode` as `models.codec.SpeechTokenizer` and `Detokenizer`.
    """

    encoder: Any
    speech_tokenizer: Any
    detokenizer: Any


class Answers(struct.PyTreeNode):
    """Spoken answers of G per prompt.

    codes: int32[P, G, R], 0 past len_codes: int32[P, G]; waves: float32[P, G, L'], silent past
    lens: int32[P, G] samples at 16 kHz.
    """

    codes: jax.Array
    len_codes: jax.Array
    waves: jax.Array
    lens: jax.Array


@dataclasses.dataclass(frozen=True)
class SpeechPolicy:
    """The modules and settings that turn spoken queries into spoken answers.

    Attributes:
        model: the two-stream language model.
        encoder: of the continuous features; its config gives the number of mels.
        max_steps: R, most steps of an answer.
        text, audio: how each stream is sampled.
        pieces_of_30_s: True hears as the released Kimi-Audio does (unmasked, in padded pieces of
            30 s); False masks padding, so that short queries stay cheap.
        logp_chunk: positions whose logits exist at one time in `logp`; None for all.
        halvings: of a rollout's rows, as answers end (decode.generate).
        rollout_options: (name, value) pairs for the compiler of the rollout, of its platform.
    """

    model: KimiAudio
    encoder: WhisperEncoder
    max_steps: int
    text: Sampling
    audio: Sampling
    pieces_of_30_s: bool = False
    logp_chunk: int | None = None
    halvings: int = 0
    rollout_options: tuple[tuple[str, str], ...] = ()

    def boxed(self) -> Any:
        """Shapes, types and logical axes of the model's variables; makes no arrays."""
        ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        return jax.eval_shape(self.model.init, jax.random.key(0), ids, ids)

    def boxed_frontend(self, frontend: Frontend) -> Frontend:
        """The same of the front end; a part without logical axes is given as it is."""
        mel = jax.ShapeDtypeStruct((1, 16, self.encoder.config.num_mel_bins), jnp.float32)
        encoder = jax.eval_shape(self.encoder.init, jax.random.key(0), mel)
        parts = (
            part.boxed() if hasattr(part, "boxed") else part
            for part in (frontend.speech_tokenizer, frontend.detokenizer)
        )
        return Frontend({"params": encoder["params"]}, *parts)

    def prompt(self, frontend: Frontend, waves: jax.Array, lens: jax.Array) -> Prompt:
        """Prompts of spoken queries.

        waves: float32[P, L] at 16 kHz; lens: int32[P] in samples.
        Returns: Prompt of ceil(L / 1280) + 5 positions.
        """
        codes, len_codes = frontend.speech_tokenizer.encode(waves, lens)
        features = self._features(frontend, waves, lens)
        spare = max(codes.shape[1] - features.shape[1], 0)
        features = jnp.pad(features, ((0, 0), (0, spare), (0, 0)))[:, : codes.shape[1]]
        return audio_prompt(self.model.config, codes, len_codes, features)

    def _features(self, frontend: Frontend, waves, lens) -> jax.Array:
        if self.pieces_of_30_s:
            return kimi_speech_features(self.encoder, frontend.encoder, waves, lens)[0]
        mel, len_frames = whisper_log_mel(waves, lens, self.encoder.config.num_mel_bins)
        mask = jnp.arange(mel.shape[1]) < len_frames[:, None]
        encoded, _ = self.encoder.apply(frontend.encoder, mel, mask)
        return kimi_features(encoded, len_frames)[0]

    def demonstration(
        self,
        frontend: Frontend,
        waves: jax.Array,
        lens: jax.Array,
        text_ids: jax.Array,
        len_text: jax.Array,
    ) -> dict[str, jax.Array]:
        """Streams of known answers, long enough for the whole of both.

        waves: float32[B, L'], lens: int32[B]; text_ids: int32[B, Tt], len_text: int32[B].
        Returns: streams (models.kimi_layout.response_streams) of [B, 1, R].
        """
        codes, len_codes = frontend.speech_tokenizer.encode(waves, lens)
        steps = self.model.config.delay + codes.shape[1] + END_STEPS
        streams = response_streams(self.model.config, text_ids, len_text, codes, len_codes, steps)
        return {name: x[:, None] for name, x in streams.items()}

    def rollout(self, variables, prompt: Prompt, rng: jax.Array, group_size: int) -> Rollout:
        """Samples `group_size` answers to each prompt: Rollout of [P, G, R]."""
        return decode.generate(
            self.model,
            variables,
            prompt,
            rng,
            group_size=group_size,
            max_steps=self.max_steps,
            text=self.text,
            audio=self.audio,
            halvings=self.halvings,
        )

    def speak(self, frontend: Frontend, rollout: Rollout, rng: jax.Array) -> Answers:
        """Waveforms of sampled answers. rng is for detokenizers that draw noise."""
        codes, len_codes = decode.codes_of(self.model.config, rollout)
        num_prompts, group_size, steps = codes.shape
        flat = constrain(codes.reshape(-1, steps), (axes.ACT_BATCH, None))
        waves, lens = frontend.detokenizer.decode(flat, len_codes.reshape(-1), rng)
        waves, lens = resample_rows(waves, lens, frontend.detokenizer.rate_hz, RATE_HZ)
        shape = (num_prompts, group_size)
        return Answers(codes, len_codes, waves.reshape(*shape, -1), lens.reshape(shape))

    def logp(self, variables, prompt: Prompt, streams, *, at_temperature: bool) -> dict:
        """Log-probability and entropy of the streams' targets.

        streams: of [P, G, R]. at_temperature: under the distribution that answers are sampled
        from (before top-k), as RL needs; otherwise at temperature 1, as likelihoods need.
        Returns: {"logp": {stream: float32[P, G, R]}, "entropy": {stream: float32[P, G, R]}}.
        """
        temperatures = {"text": 1.0, "audio": 1.0}
        if at_temperature:
            temperatures = {
                "text": self.text.logp_temperature,
                "audio": self.audio.logp_temperature,
            }
        out = decode.stream_logp(
            self.model,
            variables,
            prompt,
            streams,
            text_temperature=temperatures["text"],
            audio_temperature=temperatures["audio"],
            logp_chunk=self.logp_chunk,
        )
        return {
            kind: {stream: out[f"{stream}_{kind}"] for stream in ("text", "audio")}
            for kind in ("logp", "entropy")
        }


def masks_of(streams: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Where the policy chose, per stream that there is: bool[P, G, R]."""
    names = [name for name in STREAMS if f"{name}_mask" in streams]
    return {name: streams[f"{name}_mask"] for name in names}


def texts_of(policy: SpeechPolicy, rollout: Rollout, tokenizer: Tokenizer) -> list[list[str]]:
    """Text streams as strings, [P][G]; control tokens are left out."""
    ids, lens = jax.device_get(decode.text_of(policy.model.config, rollout))
    return [
        [tokenizer.decode(row[:length]) for row, length in zip(group, group_lens, strict=True)]
        for group, group_lens in zip(ids, lens, strict=True)
    ]
