"""Two answers to one query side by side: a language model says which is better.

Each pair is put to it in both orders; what a liking for the first place earns in one order it loses
in the other (`bench.arena`).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic

from paras2s_jax.data.endpoint import CallFailure, ChatClient, Reply
from paras2s_jax.judge.endpoint_score import response_format_of
from paras2s_jax.judge.interfaces import Failure, Heard, Score
from paras2s_jax.judge.ledger import digest
from paras2s_jax.judge.score_prompt import ScorePrompt, fence, without_block

PROMPTS_DIR, VERSION = Path(__file__).parent / "duel_prompts", "1"
Winner = Literal["first", "second", "tie"]
# Who wins, as the first one's share of the game: what `Score.score` is of a duel.
SHARES: dict[Winner, float] = {"first": 1.0, "tie": 0.5, "second": 0.0}
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


class EndpointComparer:
    """Asks a chat server for the outcome of each duel, many at a time; otherwise as a Scorer.

    Args:
        client: of the server; its model's name is the comparer's.
        rubrics: what counts in each dimension.
        response_format, max_tokens: as of EndpointScorer.

    Raises:
        FileNotFoundError: there is no such version.
    """

    def __init__(
        self,
        client: ChatClient,
        rubrics: ScorePrompt,
        *,
        version: str = VERSION,
        response_format: str = "json_schema",
        max_tokens: int = 300,
    ):
        self._client, self._rubrics = client, rubrics
        self._instructions = (PROMPTS_DIR / f"{version}.txt").read_text(encoding="utf-8")
        self._options = {"temperature": 0.0, "max_completion_tokens": max_tokens}
        self._options |= response_format_of(response_format, SCHEMA)
        self.name, self.version = client.endpoint.model, f"duel{version}"

    @property
    def settings_hash(self) -> str:
        """Of the prompt and the options."""
        return digest([self._instructions, self._rubrics.digest, self._options])

    def score(
        self, duels: Sequence[Duel], repeat: int = 0
    ) -> Iterator[tuple[int, Score | Failure]]:
        """(index, the first one's share of the game) of every duel, as replies come in.

        Raises:
            EndpointError: the server will answer nothing; what it answered has been given out.
        """
        for index, reply in self._client.chat_many(self._body(duel, repeat) for duel in duels):
            yield index, _outcome(reply)

    def _body(self, duel: Duel, repeat: int) -> dict[str, Any]:
        first, second = duel.first, duel.second
        answers = {
            name: {"answer_words": heard.transcript_out, "answer_tone": heard.tone_out}
            for name, heard in (("first", first), ("second", second))
        }
        data = {"query_words": first.transcript_in, "query_style": first.style_in, **answers}
        system = f"{self._instructions}\n{self._rubrics.rubrics[first.dimension]}"
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": fence(data, "Which answer is better?")},
        ]
        return {"messages": messages, "seed": repeat, **self._options}


def _outcome(reply: Reply | CallFailure) -> Score | Failure:
    if isinstance(reply, CallFailure):
        return Failure(f"{reply.kind}: {reply.message}", raw=reply.raw)
    raw = {"reply": reply.text, "tokens": [reply.tokens_in, reply.tokens_out]}
    if reply.refusal:
        return Failure(f"refused: {reply.refusal}", raw=raw)
    return parse_winner(reply.text, raw=raw)


def parse_winner(text: str, raw: object = None) -> Score | Failure:
    """A reply -> the first one's share; anything but the JSON asked for is a Failure."""
    try:
        reply = _Reply.model_validate_json(without_block(text))
    except pydantic.ValidationError as error:
        return Failure(
            f"the reply is not the JSON asked for ({error.errors()[0]['msg']})", raw=raw or text
        )
    return Score(SHARES[reply.winner], None, None, reply.reason, raw=raw)
