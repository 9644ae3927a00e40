"""Describes the tone of an answer by an audio language model behind an OpenAI-compatible server."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from paras2s_jax.data.endpoint import CallFailure, ChatClient, Reply, audio_part
from paras2s_jax.judge.interfaces import Failure
from paras2s_jax.judge.ledger import digest
from paras2s_jax.judge.tone_prompt import VERSION, parse_tone, tone_prompt


class EndpointToneCaptioner:
    """Waves -> tones in free words, many calls at a time; see judge.captioner for models of ours.

    Args:
        client: of a server that takes audio; its model's name is the captioner's.
        max_tokens: of a reply; a model that reasons first needs about a thousand.
        max_dur_s: longer waves are refused by the judge.
    """

    def __init__(
        self,
        client: ChatClient,
        *,
        prompt_version: str = VERSION,
        max_tokens: int = 16,
        max_dur_s: float = 30.0,
    ):
        self._client, self._prompt = client, tone_prompt(prompt_version)
        self._options = {"temperature": 0.0, "max_completion_tokens": max_tokens}
        self.max_dur_s, self.model_id = max_dur_s, client.endpoint.model
        self.settings = {"prompt": digest(self._prompt)[:12], **self._options}

    def caption(self, waves: Sequence[np.ndarray]) -> Iterator[tuple[int, str | Failure]]:
        """waves: float32[L] each, at 16 kHz. Yields: (index, tone or Failure) as replies come in.

        Raises:
            EndpointError: the server will answer nothing; what it answered has been given out.
        """
        for index, reply in self._client.chat_many(map(self._body, waves)):
            yield index, _tone_of(reply)

    def _body(self, wave: np.ndarray) -> dict[str, Any]:
        parts = [audio_part(wave), {"type": "text", "text": self._prompt}]
        options = {"modalities": ["text"], **self._options}
        return {"messages": [{"role": "user", "content": parts}], **options}


def _tone_of(reply: Reply | CallFailure) -> str | Failure:
    if isinstance(reply, CallFailure):
        return Failure(f"{reply.kind}: {reply.message}", raw=reply.raw)
    if reply.refusal:
        return Failure(f"refused: {reply.refusal}", raw=reply.text)
    if reply.finish_reason == "length":
        return Failure("the reply was cut off; raise judge.tone_max_new_tokens", raw=reply.text)
    return parse_tone(reply.text)
