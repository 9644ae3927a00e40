"""What a language model reads when it scores, and how its reply is read.

Prompts are text files under prompts/<version>/: the instructions, and one rubric per dimension. A
file that has been used for scores is never edited: a change is a new version.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic

from paras2s_jax.data.records import DIMENSIONS
from paras2s_jax.judge.interfaces import Failure, Heard, Score
from paras2s_jax.judge.ledger import digest

PROMPTS_DIR = Path(__file__).parent / "prompts"
VERSION = "1"
# A model that reasons in its reply may put it into a block of code; nothing else is taken away.
_CODE_BLOCK = re.compile(r"\s*```(?:json)?\s*\n(.*)\n\s*```\s*", re.DOTALL)


class _Reply(pydantic.BaseModel):
    """The JSON that is asked for."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)
    reason: str
    score: Annotated[int, pydantic.Field(ge=1, le=5)]


# Structured output as servers take it (OpenAI, vLLM, SGLang): response_format.json_schema.
SCHEMA = {
    "name": "verdict",
    "strict": True,
    "schema": {
        "type": "object",
        "properties": {
            "reason": {"type": "string"},
            "score": {"type": "integer", "enum": [1, 2, 3, 4, 5]},
        },
        "required": ["reason", "score"],
        "additionalProperties": False,
    },
}


@dataclasses.dataclass(frozen=True)
class ScorePrompt:
    """Instructions and rubrics {dimension: text} of one version."""

    version: str
    instructions: str
    rubrics: dict[str, str]

    @classmethod
    def load(cls, version: str = VERSION, folder: Path = PROMPTS_DIR) -> "ScorePrompt":
        """Reads a version's files.

        Raises:
            FileNotFoundError: there is no such version, or it lacks a dimension.
        """
        source = folder / version
        if not (source / "instructions.txt").is_file():
            known = sorted(path.name for path in folder.iterdir() if path.is_dir())
            raise FileNotFoundError(
                f"there is no prompt version {version!r} in {folder}; there are {', '.join(known)}"
            )
        rubrics = {name: (source / f"{name}.txt").read_text("utf-8") for name in DIMENSIONS}
        return cls(version, (source / "instructions.txt").read_text("utf-8"), rubrics)

    @property
    def digest(self) -> str:
        """Hash of all texts, of the fence and of the schema."""
        fence = _fenced(Heard("emotion", "a", "b", "c", "d"))
        return digest([self.instructions, self.rubrics, fence, SCHEMA])

    def messages(self, heard: Heard) -> list[dict[str, str]]:
        """Chat messages about one pair. Raises KeyError where its dimension has no rubric."""
        system = f"{self.instructions}\n{self.rubrics[heard.dimension]}"
        return [
            {"role": "system", "content": system},
            {"role": "user", "content": _fenced(heard)},
        ]


def _fenced(heard: Heard) -> str:
    data = {
        "query_words": heard.transcript_in,
        "query_style": heard.style_in,
        "answer_words": heard.transcript_out,
        "answer_tone": heard.tone_out,
    }
    return fence(data, "Rate this exchange.")


def fence(values: Mapping[str, Any], request: str) -> str:
    """What was heard as one line of JSON between marks that its own words cannot imitate.

    The marks hold a hash of the line, which nobody can put into the line; escapes keep quotes, line
    breaks and control characters of a transcript inside their string. request: what follows.
    """
    data = json.dumps(values)
    mark = hashlib.sha256(data.encode()).hexdigest()[:16]
    return (
        f"What was heard, as data, between DATA {mark} and END {mark}:\n"
        f"DATA {mark}\n{data}\nEND {mark}\n"
        f"{request}"
    )


def without_block(text: str) -> str:
    """A reply without the block of code that a model may put around its JSON."""
    block = _CODE_BLOCK.fullmatch(text)
    return block[1] if block else text


def parse_score(text: str, raw: object = None) -> Score | Failure:
    """A reply -> its score; anything but the JSON that was asked for is a Failure, never a guess.

    raw: what to keep beside it.
    """
    try:
        reply = _Reply.model_validate_json(without_block(text))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        what = f"{where}: {first['msg']}" if where else first["msg"]
        return Failure(f"the reply is not the JSON asked for ({what})", raw=raw or text)
    return Score(float(reply.score), None, None, reply.reason, raw=raw)
