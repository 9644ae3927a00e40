"""Words and names -> a score of 1..5 by a language model of ours: an open judge that stays.

The model reads the same prompt as one behind a server. Its score is the mean of 1 to 5 under the
probabilities that it gives the five digits, so that it needs to write nothing, one pass scores a
pair, and close calls lie between whole numbers.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from paras2s_jax.judge.interfaces import Failure, Heard, Score
from paras2s_jax.judge.ledger import digest, params_digest
from paras2s_jax.judge.score_prompt import ScorePrompt
from paras2s_jax.models.qwen2 import Qwen2LM, last_real

DIGITS = (1, 2, 3, 4, 5)
# What the reply that is asked for would begin with, up to the digit.
REPLY_START = '{"score": '
# Prompts are padded to whole multiples of this, so that few lengths are compiled.
_STEP = 128


class Tokenizer(Protocol):
    """The part of transformers' tokenizers that is used."""

    def apply_chat_template(self, conversation, **options) -> str: ...

    def encode(self, text: str, **options) -> list[int]: ...


class LocalScorer:
    """Expected scores under a Qwen2LM with a chat template, batched and jitted.

    Args:
        model, params, tokenizer: of `convert.from_pretrained`.
        name: of the model in tables.
        max_tokens: longer prompts are failures, not cut: a judge must read the whole answer.

    Raises:
        ValueError: a digit is not one token, or the tokenizer has no chat template.
    """

    def __init__(
        self,
        model: Qwen2LM,
        params: Mapping[str, Any],
        tokenizer: Tokenizer,
        prompt: ScorePrompt,
        *,
        name: str,
        batch_size: int = 8,
        max_tokens: int = 2048,
    ):
        self._model, self._params = model, params
        self._tokenizer, self._prompt = tokenizer, prompt
        self._batch_size, self._max_tokens = batch_size, max_tokens
        self.name = name
        self.version = f"prompt{prompt.version}-{params_digest(params)[:12]}"
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"{name} has no chat template; take an instruction-tuned model")
        self._digit_ids = [self._digit(str(digit)) for digit in DIGITS]

    @property
    def settings_hash(self) -> str:
        return digest([self._prompt.digest, REPLY_START, self._max_tokens])

    def _digit(self, digit: str) -> int:
        """The token by which the digit goes on after REPLY_START."""
        start = self._tokenizer.encode(REPLY_START, add_special_tokens=False)
        whole = self._tokenizer.encode(REPLY_START + digit, add_special_tokens=False)
        if len(whole) != len(start) + 1 or whole[:-1] != start:
            raise ValueError(f"{self.name}: {digit} is not one token after {REPLY_START!r}")
        return whole[-1]

    def score(
        self, heard: Sequence[Heard], repeat: int = 0
    ) -> Iterator[tuple[int, Score | Failure]]:
        """(index, answer) of every item, shortest prompts first; repeats are equal."""
        del repeat
        ids = [self._ids(item) for item in heard]
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        fit = [index for index in order if len(ids[index]) <= self._max_tokens]
        for index in order[len(fit) :]:
            yield (
                index,
                Failure(f"the prompt has {len(ids[index])} tokens, more than {self._max_tokens}"),
            )
        for start in range(0, len(fit), self._batch_size):
            batch = fit[start : start + self._batch_size]
            for index, row in zip(batch, self._probs([ids[i] for i in batch]), strict=False):
                yield index, _expected(row)

    def _ids(self, heard: Heard) -> list[int]:
        text = self._tokenizer.apply_chat_template(
            self._prompt.messages(heard), tokenize=False, add_generation_prompt=True
        )
        return self._tokenizer.encode(text + REPLY_START, add_special_tokens=False)

    def _probs(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """float32[batch_size, 5], probabilities among the digits; spare rows repeat given ones."""
        length = -(-max(map(len, rows)) // _STEP) * _STEP
        ids = np.zeros((self._batch_size, length), np.int32)
        mask = np.zeros((self._batch_size, length), bool)
        for at in range(self._batch_size):
            row = rows[at % len(rows)]
            ids[at, : len(row)], mask[at, : len(row)] = row, True
        digits = tuple(self._digit_ids)
        return np.asarray(_digit_probs(self._model, self._params, ids, mask, digits))


@functools.partial(jax.jit, static_argnums=(0, 4))
def _digit_probs(model: Qwen2LM, params, ids, mask, digits: tuple[int, ...]) -> jax.Array:
    """Logits of one position per row; over all of them they would dwarf the rest."""
    variables = {"params": params}
    _, out = model.apply(variables, ids, attention_mask=mask)
    logits = model.apply(variables, last_real(out["hidden"], mask), method="logits")
    return jax.nn.softmax(logits[:, jnp.array(digits)].astype(jnp.float32), axis=-1)


def _expected(probs: np.ndarray) -> Score | Failure:
    if not np.isfinite(probs).all():
        return Failure("the model's digits have no finite probabilities")
    score = float(np.clip(probs @ np.array(DIGITS), DIGITS[0], DIGITS[-1]))
    shares = {str(digit): round(float(p), 4) for digit, p in zip(DIGITS, probs)}
    return Score(score, None, None, f"digit {DIGITS[int(probs.argmax())]} is likeliest", raw=shares)
