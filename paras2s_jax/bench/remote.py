"""Systems behind a chat server: speech models, and the pipeline that reads and does not listen."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.audio.synth import Delivery
from paras2s_jax.data.answers import AnswerStore
from paras2s_jax.data.endpoint import CallFailure, ChatClient, Reply, audio_part
from paras2s_jax.data.records import Query, Response

ASSISTANT = "You are a friendly voice assistant. Answer in one or two short spoken sentences."
# Of the topline: what a system that listens perfectly would know (paper section 4).
INFORMED = (
    "The user sounds like this: {style}. Let your words suit that, without saying that you noticed."
)


@dataclasses.dataclass
class ChatSystem:
    """A speech model behind /v1/chat/completions: audio in, audio out.

    instructions: system prompt, "" for none. voice: as the server knows it. extra: further options
    of each request (temperature, seed). Answers are kept per query, so that only what is missing
    or failed is asked for again.
    """

    name: str
    client: ChatClient
    instructions: str = ASSISTANT
    voice: str = "alloy"
    num_samples: int = 1
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def respond(self, queries: Sequence[Query], root: Path, out_dir: Path) -> list[Response]:
        """See `systems.System`. Raises EndpointError where the server will answer nothing."""
        store = AnswerStore(
            out_dir,
            {
                "system": self.name,
                "model": self.client.endpoint.model,
                "instructions": self.instructions,
                "voice": self.voice,
                "extra": dict(self.extra),
            },
        )
        units, todo = store.plan(queries, self.num_samples)
        bodies = (self._body(query, sample, Path(root)) for query, sample in todo)
        for (query, sample), reply in _asked(self, todo, bodies):
            _keep(store, Response(query.id, self.name, sample, "", ""), reply)
        return [store.answer(query.id, sample) for query, sample in units]

    def _body(self, query: Query, sample: int, root: Path) -> dict[str, Any]:
        wave = wave_lib.load(wave_lib.inside(root, query.wav))
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        return {
            "messages": [*system, {"role": "user", "content": [audio_part(wave)]}],
            "modalities": ["text", "audio"],
            "audio": {"voice": self.voice, "format": "wav"},
            "seed": sample,
            **self.extra,
        }


class Synthesizer(Protocol):
    """As `audio.synth.Synthesizer`."""

    name: str
    rate_hz: int

    def speak(self, text: str, delivery: Delivery) -> np.ndarray: ...


# Queries and their waves float32[L] -> the words that a recogniser hears in each.
Hear = Callable[[Sequence[Query], Sequence[np.ndarray]], Sequence[str]]


@dataclasses.dataclass
class PipelineSystem:
    """Recogniser -> text LLM -> speech synthesis.

    Deaf to style (paper section 4, Whisper-GPT-TTS), or with `informed` the topline: the words and
    the true style go to the LLM, and `delivery` speaks in the tone that suits the style.

    hear: of a recogniser; hearer: its name. delivery: query -> how its answer is spoken.
    """

    name: str
    client: ChatClient
    hear: Hear
    hearer: str
    synthesizer: Synthesizer
    delivery: Callable[[Query], Delivery]
    informed: bool = False
    num_samples: int = 1
    temperature: float = 0.7

    def respond(self, queries: Sequence[Query], root: Path, out_dir: Path) -> list[Response]:
        """See `systems.System`. Raises EndpointError where the server will answer nothing."""
        store = AnswerStore(
            out_dir,
            {
                "system": self.name,
                "model": self.client.endpoint.model,
                "hearer": self.hearer,
                "synthesizer": self.synthesizer.name,
                "informed": self.informed,
                "temperature": self.temperature,
                "instructions": [ASSISTANT, INFORMED],
            },
        )
        units, todo = store.plan(queries, self.num_samples)
        asked = list({query.id: query for query, _ in todo}.values())
        waves = [wave_lib.load(wave_lib.inside(root, query.wav)) for query in asked]
        words = dict(zip((query.id for query in asked), self.hear(asked, waves), strict=True))
        bodies = [self._body(query, words[query.id], sample) for query, sample in todo]
        for (query, sample), reply in _asked(self, todo, bodies):
            self._speak(store, query, Response(query.id, self.name, sample, "", ""), reply)
        return [store.answer(query.id, sample) for query, sample in units]

    def _body(self, query: Query, words: str, sample: int) -> dict[str, Any]:
        informed = " " + INFORMED.format(style=query.style) if self.informed else ""
        return {
            "messages": [
                {"role": "system", "content": ASSISTANT + informed},
                {"role": "user", "content": words},
            ],
            "temperature": self.temperature,
            "seed": sample,
        }

    def _speak(self, store: AnswerStore, query: Query, response: Response, reply) -> None:
        error = failure_of(reply)
        text = "" if error else reply.text.strip()
        if error or not text:
            store.fail(dataclasses.replace(response, error=error or "the reply has no words"))
            return
        try:
            wave = self.synthesizer.speak(text, self.delivery(query))
        except wave_lib.AudioError as problem:
            store.fail(dataclasses.replace(response, text=text, error=str(problem)))
            return
        store.add(dataclasses.replace(response, text=text), wave, self.synthesizer.rate_hz)


def _asked(
    system: ChatSystem | PipelineSystem,
    todo: Sequence[tuple[Query, int]],
    bodies: Iterable[Mapping[str, Any]],
) -> Iterator[tuple[tuple[Query, int], Reply | CallFailure]]:
    """((query, sample), reply) as replies come in, with a progress bar."""
    with tqdm(total=len(todo), desc=f"{system.name}: respond", unit="answer") as bar:
        for index, reply in system.client.chat_many(bodies):
            yield todo[index], reply
            bar.update()


def failure_of(reply: Reply | CallFailure) -> str:
    """Why a reply is no answer, "" where it is one."""
    if isinstance(reply, CallFailure):
        return f"{reply.kind}: {reply.message}"
    return f"refused: {reply.refusal}" if reply.refusal else ""


def _keep(store: AnswerStore, response: Response, reply: Reply | CallFailure) -> None:
    """Stores the speech in a reply, or why there is none."""
    error = failure_of(reply)
    if not error and reply.audio is None:
        error = f"the reply has no audio, only the words {reply.text[:80]!r}"
    if error:
        store.fail(dataclasses.replace(response, error=error))
        return
    try:
        wave = wave_lib.decode(reply.audio, "the audio of the reply", wave_lib.RATE_HZ)
    except wave_lib.AudioError as problem:
        store.fail(dataclasses.replace(response, text=reply.text, error=str(problem)))
        return
    store.add(dataclasses.replace(response, text=reply.text), wave)
