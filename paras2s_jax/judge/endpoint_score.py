"""Words and names -> a score of 1..5 by a language model behind an OpenAI-compatible server."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from paras2s_jax.data.endpoint import CallFailure, ChatClient, Reply
from paras2s_jax.judge.interfaces import Failure, Heard, Score
from paras2s_jax.judge.ledger import digest
from paras2s_jax.judge.score_prompt import SCHEMA, ScorePrompt, parse_score

# How the JSON is asked for: by schema, as any JSON, or by the prompt alone, for older servers.
FORMATS = ("json_schema", "json_object", "none")


def response_format_of(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a request that ask for JSON. Raises ValueError on an unknown name."""
    if name not in FORMATS:
        raise ValueError(f"response_format {name!r}: choose one of {FORMATS}")
    if name == "json_schema":
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    return {"response_format": {"type": "json_object"}} if name == "json_object" else {}


class EndpointScorer:
    """Asks a chat server for each score, many at a time.

    Args:
        client: of the server; its model's name is the scorer's.
        prompt: instructions and rubrics.
        response_format: one of FORMATS.
        temperature: 0 for the likeliest reply; repeats need more to differ.
        max_tokens: of a reply; a model that reasons first needs more.
    """

    def __init__(
        self,
        client: ChatClient,
        prompt: ScorePrompt,
        *,
        response_format: str = "json_schema",
        temperature: float = 0.0,
        max_tokens: int = 300,
    ):
        self._client, self._prompt = client, prompt
        self._options = {"temperature": temperature, "max_completion_tokens": max_tokens}
        self._options |= response_format_of(response_format, SCHEMA)
        self.name, self.version = client.endpoint.model, f"prompt{prompt.version}"

    @property
    def settings_hash(self) -> str:
        """Of the prompt and the options; not of the server's address, which changes no score."""
        return digest([self._prompt.digest, self._options])

    def body(self, heard: Heard, repeat: int = 0) -> dict[str, Any]:
        """The request for one pair; repeats differ in their seed."""
        return {"messages": self._prompt.messages(heard), "seed": repeat, **self._options}

    def score(
        self, heard: Sequence[Heard], repeat: int = 0
    ) -> Iterator[tuple[int, Score | Failure]]:
        """(index, answer) of every item, as replies come in.

        Raises:
            EndpointError: the server will answer nothing; what it answered has been given out.
        """
        bodies = [self.body(item, repeat) for item in heard]
        for index, reply in self._client.chat_many(bodies):
            yield index, score_of(reply)


def score_of(
    reply: Reply | CallFailure, parse: Callable[..., Score | Failure] = parse_score
) -> Score | Failure:
    """The score in a server's reply, with the reply beside it. parse: (text, raw=) -> score."""
    if isinstance(reply, CallFailure):
        return Failure(f"{reply.kind}: {reply.message}", raw=reply.raw)
    raw = {"reply": reply.text, "tokens": [reply.tokens_in, reply.tokens_out]}
    if reply.refusal:
        return Failure(f"refused: {reply.refusal}", raw=raw)
    if reply.finish_reason == "length":
        return Failure("the reply was cut off; raise max_tokens", raw=raw)
    return parse(reply.text, raw=raw)
