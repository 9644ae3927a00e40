"""Two answers to one query side by side: a language model says which is better.

Each pair is put to it in both orders; what a liking for the first place earns in one order it loses
in the other (`bench.arena`).
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic

from paras2s_jax.data.endpoint import ChatClient
from paras2s_jax.judge.endpoint_score import response_format_of, score_of
from paras2s_jax.judge.interfaces import Failure, Heard, Score
from paras2s_jax.judge.ledger import digest, params_digest
from paras2s_jax.judge.next_token import NextToken, Tokenizer
from paras2s_jax.judge.score_prompt import ScorePrompt, fence, without_block
from paras2s_jax.models.qwen2 import Qwen2LM

PROMPTS_DIR, VERSION = Path(__file__).parent / "duel_prompts", "1"
Winner = Literal["first", "second", "tie"]
# Who wins, as the first one's share of the game: what `Score.score` is of a duel.
SHARES: dict[Winner, float] = {"first": 1.0, "tie": 0.5, "second": 0.0}
# What a reply would begin with, up to the winner, for a model that needs to write nothing.
REPLY_START = '{"winner": "'
SCHEMA = {
    "name": "comparison",
    "strict": True,
    "schema": {
        "type": "object",
        "properties": {
            "reason": {"type": "string"},
            "winner": {"type": "string", "enum": list(SHARES)},
        },
        "required": ["reason", "winner"],
        "additionalProperties": False,
    },
}


class _Reply(pydantic.BaseModel):
    """The JSON that is asked for."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)
    reason: str
    winner: Winner


@dataclasses.dataclass(frozen=True)
class Duel:
    """Two answers to one query, in the order in which they are shown."""

    first: Heard
    second: Heard

    @property
    def identity(self) -> dict[str, Any]:
        """See interfaces.Item."""
        return {"first": self.first.identity, "second": self.second.identity}


@dataclasses.dataclass(frozen=True)
class DuelPrompt:
    """Instructions of one version, with what counts in each dimension."""

    version: str
    instructions: str
    rubrics: ScorePrompt

    @classmethod
    def load(cls, version: str, rubrics: ScorePrompt) -> "DuelPrompt":
        """Raises FileNotFoundError where there is no such version."""
        path = PROMPTS_DIR / f"{version}.txt"
        if not path.is_file():
            known = sorted(found.stem for found in PROMPTS_DIR.glob("*.txt"))
            raise FileNotFoundError(
                f"there is no duel prompt version {version!r} in {PROMPTS_DIR}; there are "
                f"{', '.join(known)}"
            )
        return cls(version, path.read_text(encoding="utf-8"), rubrics)

    @property
    def digest(self) -> str:
        """Hash of all texts and of the schema."""
        return digest([self.instructions, self.rubrics.digest, SCHEMA])

    def messages(self, duel: Duel) -> list[dict[str, str]]:
        """Chat messages about one duel."""
        first, second = duel.first, duel.second
        answers = {
            name: {"answer_words": heard.transcript_out, "answer_tone": heard.tone_out}
            for name, heard in (("first", first), ("second", second))
        }
        data = {"query_words": first.transcript_in, "query_style": first.style_in, **answers}
        return [
            {
                "role": "system",
                "content": f"{self.instructions}\n{self.rubrics.rubrics[first.dimension]}",
            },
            {"role": "user", "content": fence(data, "Which answer is better?")},
        ]


class EndpointComparer:
    """Asks a chat server for the outcome of each duel, many at a time; otherwise as a Scorer.

    Args:
        client: of the server; its model's name is the comparer's.
        response_format, max_tokens: as of EndpointScorer.
    """

    def __init__(
        self,
        client: ChatClient,
        prompt: DuelPrompt,
        *,
        response_format: str = "json_schema",
        max_tokens: int = 300,
    ):
        self._client, self._prompt = client, prompt
        self._options = {"temperature": 0.0, "max_completion_tokens": max_tokens}
        self._options |= response_format_of(response_format, SCHEMA)
        self.name, self.version = client.endpoint.model, f"duel{prompt.version}"

    @property
    def settings_hash(self) -> str:
        """Of the prompt and the options."""
        return digest([self._prompt.digest, self._options])

    def score(
        self, duels: Sequence[Duel], repeat: int = 0
    ) -> Iterator[tuple[int, Score | Failure]]:
        """(index, the first one's share of the game) of every duel, as replies come in.

        Raises:
            EndpointError: the server will answer nothing; what it answered has been given out.
        """
        options = {"seed": repeat, **self._options}
        bodies = ({"messages": self._prompt.messages(duel), **options} for duel in duels)
        for index, reply in self._client.chat_many(bodies):
            yield index, score_of(reply, parse_winner)


class LocalComparer:
    """The winner that a language model of ours finds likeliest, reading the same prompt.

    Args:
        model, params, tokenizer: of `convert.from_pretrained`.
        name: of the model in tables.
        batch_size, max_tokens: see NextToken, with what it raises.
    """

    def __init__(
        self,
        model: Qwen2LM,
        params: Mapping[str, Any],
        tokenizer: Tokenizer,
        prompt: DuelPrompt,
        *,
        name: str,
        batch_size: int = 8,
        max_tokens: int = 2048,
    ):
        self._prompt, self._max_tokens = prompt, max_tokens
        self.name, self.version = name, f"duel{prompt.version}-{params_digest(params)[:12]}"
        options = {"name": name, "batch_size": batch_size, "max_tokens": max_tokens}
        self._winner = NextToken(model, params, tokenizer, REPLY_START, tuple(SHARES), **options)

    @property
    def settings_hash(self) -> str:
        """Of the prompt and the options."""
        return digest([self._prompt.digest, REPLY_START, self._max_tokens])

    def score(
        self, duels: Sequence[Duel], repeat: int = 0
    ) -> Iterator[tuple[int, Score | Failure]]:
        """(index, the first one's share of the game) of every duel; repeats are equal."""
        del repeat
        for index, probs in self._winner.read([self._prompt.messages(duel) for duel in duels]):
            yield index, probs if isinstance(probs, Failure) else _likeliest(probs)


def _likeliest(probs: np.ndarray) -> Score:
    winners = list(SHARES)
    shares = {name: round(float(p), 4) for name, p in zip(winners, probs)}
    return Score(SHARES[winners[int(probs.argmax())]], None, None, "likeliest", raw=shares)


def parse_winner(text: str, raw: object = None) -> Score | Failure:
    """A reply -> the first one's share; anything but the JSON asked for is a Failure."""
    try:
        reply = _Reply.model_validate_json(without_block(text))
    except pydantic.ValidationError as error:
        return Failure(
            f"the reply is not the JSON asked for ({error.errors()[0]['msg']})", raw=raw or text
        )
    return Score(SHARES[reply.winner], None, None, reply.reason, raw=raw)
