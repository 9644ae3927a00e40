"""Describes the tone of an answer in a word or two, by an audio language model (paper section 2).

Any Qwen2Audio will do: Qwen2-Audio-7B-Instruct, or Audio-Reasoner, which thinks before it replies.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from paras2s_jax.data.audio_chat import AudioChat
from paras2s_jax.judge.interfaces import Failure
from paras2s_jax.judge.ledger import digest, params_digest
from paras2s_jax.judge.tone_prompt import VERSION, parse_tone, tone_prompt
from paras2s_jax.models.qwen2_audio import Qwen2Audio, generate

# Prompts are padded to whole multiples of this, so that few lengths are compiled.
_TEXT_STEP = 64


class ToneCaptioner:
    """Waves -> tones in free words, batched.

    Args:
        model, variables: of a Qwen2Audio.
        processor: of the same checkpoint.
        max_new_tokens: a reasoning model needs about a thousand.
        prompt_version: of the question.
        max_dur_s: what the model hears of an audio; longer waves are refused by the judge.
        batch_size: waves per call.
    """

    def __init__(
        self,
        model: Qwen2Audio,
        variables: Mapping[str, Any],
        processor: AudioChat,
        *,
        max_new_tokens: int = 16,
        prompt_version: str = VERSION,
        max_dur_s: float = 30.0,
        batch_size: int = 8,
    ):
        self._model, self._variables, self._processor = model, variables, processor
        self._batch_size, self._prompt = batch_size, tone_prompt(prompt_version)
        self.max_dur_s = max_dur_s
        self.model_id = f"tone-captioner-{params_digest(variables)[:12]}"
        self.settings = {"prompt": digest(self._prompt)[:12], "max_new_tokens": max_new_tokens}

    def caption(self, waves: Sequence[np.ndarray]) -> Iterator[tuple[int, str | Failure]]:
        """waves: float32[L] each, at 16 kHz. Yields: (index, tone in lower case, or a Failure with
        the reply that names none)."""
        for start in range(0, len(waves), self._batch_size):
            yield from enumerate(self._caption(waves[start : start + self._batch_size]), start)

    def _caption(self, waves: Sequence[np.ndarray]) -> list[str | Failure]:
        text = self._processor.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "audio", "audio": None},
                        {"type": "text", "text": self._prompt},
                    ],
                }
            ],
            add_generation_prompt=True,
        )
        # A last, smaller batch is filled with copies of its first wave: its shape is compiled.
        filled = [*waves, *[waves[0]] * (self._batch_size - len(waves))]
        inputs = self._processor([text] * len(filled), filled, text_multiple=_TEXT_STEP)
        # A reply ends with its turn, or with the whole text, which is what pads it.
        tokenizer = self._processor.tokenizer
        out = generate(
            self._model,
            self._variables,
            **inputs,
            max_new_tokens=self.settings["max_new_tokens"],
            eos_token_ids=(tokenizer.eos_token_id, tokenizer.pad_token_id),
        )
        replies = self._processor.batch_decode(out.tokens, np.asarray(out.lens))
        ended = np.asarray(out.finished)
        return [
            parse_tone(reply) if done else Failure("the reply does not end", raw=reply)
            for reply, done in zip(replies[: len(waves)], ended, strict=False)
        ]
