"""New sentences for the bench: a language model proposes, filters and a likeness test dispose.

Paper section 1: a sentence is kept if its words do not give the style away (neutrality), if both
styles are natural for it (plausibility), and if the style changes the fitting answer (relevance).
Each filter is a question of its own; a reply that is no yes or no rejects the sentence.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pydantic
from rapidfuzz import fuzz, process
from tqdm import tqdm

from paras2s_jax.data.bank import Sentence
from paras2s_jax.data.endpoint import SPEND_CAP, CallFailure, ChatClient, EndpointError, Reply
from paras2s_jax.data.records import append_jsonl, read_jsonl
from paras2s_jax.data.tokenizer import normalize

PROMPTS_DIR, VERSION = Path(__file__).parent / "prompts", "queries-1"
# Filter -> the answer that lets a sentence pass.
FILTERS = {"neutrality": False, "plausibility": True, "relevance": True}
# What the two styles are of, in the words of the prompts.
ABOUT = {
    "emotion": "the speaker's feeling",
    "sarcasm": "whether the words are meant as they are said",
    "age": "whether a child or an adult speaks",
    "gender": "whether a woman or a man speaks",
}
KEPT = "kept"
# Two texts with more of their words in common are the same sentence (0 to 100).
MAX_LIKENESS = 80.0
PER_CALL = 10
# Rounds without one kept sentence after which the model has nothing more to say.
MAX_DRY_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A proposed sentence and what became of it.

    status: KEPT, or the filter that it failed and why. requirement_a, requirement_b: what a good
    answer to either style does.
    """

    dimension: str
    style_a: str
    style_b: str
    text: str
    topic: str
    requirement_a: str
    requirement_b: str
    status: str


@dataclasses.dataclass(frozen=True)
class Expected:
    """What sentences will take of the server, before it is asked."""

    calls: int
    tokens_in: int
    tokens_out: int


# Of English text and of JSON around it, for estimates.
CHARS_PER_TOKEN = 4
# What a reply to a proposal or to a filter is long, per sentence.
PROPOSAL_TOKENS, FILTER_TOKENS = 80, 40
_SENTENCE_CHARS = 60


class _Answer(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)
    reason: str
    answer: bool


def expected(num_wanted: int, keep_share: float) -> Expected:
    """Of one dimension, if `keep_share` of what is proposed passes the filters."""
    rounds = math.ceil(num_wanted / keep_share / PER_CALL)
    proposed = rounds * PER_CALL
    asked = proposed * len(FILTERS)
    length = {name: len(_prompt(name)) // CHARS_PER_TOKEN for name in ("propose", *FILTERS)}
    per_sentence = sum(length[name] + _SENTENCE_CHARS // CHARS_PER_TOKEN for name in FILTERS)
    return Expected(
        calls=rounds + asked,
        tokens_in=rounds * length["propose"] + proposed * per_sentence,
        tokens_out=proposed * PROPOSAL_TOKENS + asked * FILTER_TOKENS,
    )


def write_sentences(
    client: ChatClient,
    dimension: str,
    styles: tuple[str, str],
    num_wanted: int,
    folder: Path,
    *,
    known: Iterable[str],
    split: str = "test",
    seed: int = 0,
) -> list[Sentence]:
    """Asks for sentences until `num_wanted` are kept; continues where it was stopped.

    Every candidate goes to folder/candidates.jsonl with its status, so that rejections can be read.

    Args:
        dimension: a key of ABOUT. styles: style_a, style_b.
        known: texts that no new one may resemble (the bank's, other splits').
        seed: of the requests.

    Returns:
        the kept ones, with ids `<dimension>-new-<number>`.

    Raises:
        EndpointError: the server answers nothing, or nothing that can be used, MAX_DRY_ROUNDS
            times, or the spend cap is reached.
    """
    path = folder / "candidates.jsonl"
    seen = read_jsonl(path, Candidate, partial_tail=True) if path.is_file() else []
    seen = [c for c in seen if (c.dimension, c.style_a, c.style_b) == (dimension, *styles)]
    kept = [c for c in seen if c.status == KEPT]
    texts = [normalize(text) for text in (*known, *(c.text for c in seen))]
    dry = rounds = 0
    with tqdm(total=num_wanted, initial=len(kept), desc=f"write: {dimension}") as bar:
        while len(kept) < num_wanted:
            number = seed + len(seen) + rounds
            rounds += 1
            fresh = _propose(client, dimension, styles, [c.topic for c in kept], number)
            judged = list(_judge(client, _without_twins(fresh, texts)))
            for candidate in judged:
                append_jsonl(path, candidate)
            new = [candidate for candidate in judged if candidate.status == KEPT]
            dry = 0 if new else dry + 1
            seen, kept = seen + judged, kept + new
            bar.update(len(new))
            if dry == MAX_DRY_ROUNDS:
                raise EndpointError(
                    f"{client.endpoint.model} gave no usable sentence for {dimension} "
                    f"{MAX_DRY_ROUNDS} times; {path} tells why, a stronger model may help"
                )
    return [_sentence(candidate, index, split) for index, candidate in enumerate(kept[:num_wanted])]


def filter_sentences(
    client: ChatClient, candidates: Sequence[Candidate], log: Path
) -> list[Candidate]:
    """Puts the filters' questions to sentences that are there already (of a corpus).

    candidates: of any dimension and styles. log: jsonl of what was found, appended to; what is
    there is not asked again.

    Returns: those about which all that was asked was answered, in their order, with their status.

    Raises:
        EndpointError: the server answers nothing, or the spend cap is reached.
    """
    known = read_jsonl(log, Candidate, partial_tail=True) if log.is_file() else []
    found = {_question_of(candidate): candidate for candidate in known}
    todo = [candidate for candidate in candidates if _question_of(candidate) not in found]
    with tqdm(total=len(candidates), initial=len(candidates) - len(todo), desc="filter") as bar:
        for start in range(0, len(todo), PER_CALL):
            part = todo[start : start + PER_CALL]
            for candidate in _judge(client, part):
                append_jsonl(log, candidate)
                found[_question_of(candidate)] = candidate
            bar.update(len(part))
    keys = (_question_of(candidate) for candidate in candidates)
    return [found[key] for key in keys if key in found]


def _question_of(candidate: Candidate) -> tuple[str, str, str, str]:
    """All that a filter is told."""
    return candidate.dimension, candidate.style_a, candidate.style_b, candidate.text


def likest(text: str, texts: Sequence[str]) -> float:
    """Likeness 0..100 of the most similar of the normalised `texts`, in any order of words."""
    found = process.extractOne(normalize(text), texts, scorer=fuzz.token_sort_ratio)
    return found[1] if found else 0.0


def _propose(
    client: ChatClient, dimension: str, styles: tuple[str, str], topics: Sequence[str], seed: int
) -> list[Candidate]:
    style_a, style_b = styles
    avoid = f"Topics already taken: {', '.join(topics[-50:])}." if topics else ""
    prompt = _prompt("propose").format(
        count=PER_CALL, style_a=style_a, style_b=style_b, about=ABOUT[dimension], avoid=avoid
    )
    reply = client.chat(_body(prompt, seed, temperature=1.0))
    rows = _json(reply).get("sentences", [])
    names = {
        "text": "text",
        "topic": "topic",
        "requirement_a": f"answer_to_{style_a}",
        "requirement_b": f"answer_to_{style_b}",
    }
    made = []
    for row in rows if isinstance(rows, list) else []:
        values = {field: row.get(name) for field, name in names.items() if isinstance(row, dict)}
        if values and all(isinstance(value, str) and value.strip() for value in values.values()):
            values = {field: " ".join(value.split()) for field, value in values.items()}
            made.append(Candidate(dimension, style_a, style_b, **values, status=""))
    return made


def _without_twins(candidates: Sequence[Candidate], texts: list[str]) -> list[Candidate]:
    """Marks those that resemble a known text; `texts` grows by the others."""
    marked = []
    for candidate in candidates:
        likeness = likest(candidate.text, texts)
        twin = likeness > MAX_LIKENESS
        status = f"duplicate: {likeness:.0f} % like a known sentence" if twin else ""
        marked.append(dataclasses.replace(candidate, status=status))
        if not twin:
            texts.append(normalize(candidate.text))
    return marked


def _judge(client: ChatClient, candidates: Sequence[Candidate]) -> Iterator[Candidate]:
    """Puts the filters' questions, one filter after the other, to what is left.

    A sentence about which no answer came is left out: nothing is known against it.
    """
    status = {index: candidate.status for index, candidate in enumerate(candidates)}
    for name, wanted in FILTERS.items():
        todo = [index for index in status if not status[index]]
        bodies = [_body(_question(name, candidates[index]), 0) for index in todo]
        for at, reply in client.chat_many(bodies):
            if isinstance(reply, CallFailure):
                if reply.kind == SPEND_CAP:
                    raise EndpointError(f"{reply.message}; what was written is kept")
                del status[todo[at]]
                continue
            problem = _verdict(reply, wanted)
            status[todo[at]] = f"{name}: {problem}" if problem else ""
    for index, problem in status.items():
        yield dataclasses.replace(candidates[index], status=problem or KEPT)


def _verdict(reply: Reply, wanted: bool) -> str:
    """Why the sentence fails, "" if it passes."""
    try:
        found = _Answer.model_validate_json(reply.text)
    except pydantic.ValidationError:
        return f"no yes or no in the reply {reply.text[:80]!r}"
    return "" if found.answer is wanted else found.reason or "no reason given"


def _question(name: str, candidate: Candidate) -> str:
    data = json.dumps(candidate.text)
    mark = hashlib.sha256(data.encode()).hexdigest()[:16]
    return _prompt(name).format(
        fenced=f"DATA {mark}\n{data}\nEND {mark}",
        style_a=candidate.style_a,
        style_b=candidate.style_b,
        about=ABOUT[candidate.dimension],
    )


def _prompt(name: str) -> str:
    return (PROMPTS_DIR / VERSION / f"{name}.txt").read_text(encoding="utf-8")


def _body(prompt: str, seed: int, temperature: float = 0.0) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": prompt}],
        "response_format": {"type": "json_object"},
        "temperature": temperature,
        "seed": seed,
    }


def _json(reply: Reply | CallFailure) -> dict:
    """The reply's JSON object; empty where it is none."""
    if isinstance(reply, CallFailure):
        raise EndpointError(f"no proposals: {reply.kind}: {reply.message}")
    try:
        values = json.loads(reply.text)
    except json.JSONDecodeError:
        return {}
    return values if isinstance(values, dict) else {}


def _sentence(candidate: Candidate, index: int, split: str) -> Sentence:
    return Sentence(
        id=f"{candidate.dimension}-new-{index:04d}",
        dimension=candidate.dimension,
        text=candidate.text,
        style_a=candidate.style_a,
        style_b=candidate.style_b,
        topic=candidate.topic,
        split=split,
        requirement={
            candidate.style_a: candidate.requirement_a,
            candidate.style_b: candidate.requirement_b,
        },
    )
