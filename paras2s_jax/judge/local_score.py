"""Words and names -> a score of 1..5 by a language model of ours: an open judge that stays.

The model reads the same prompt as one behind a server. Its score is the mean of 1 to 5 under the
probabilities that it gives the five digits, so that it needs to write nothing, one pass scores a
pair, and close calls lie between whole numbers.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from paras2s_jax.judge.interfaces import Failure, Heard, Score
from paras2s_jax.judge.ledger import digest, params_digest
from paras2s_jax.judge.next_token import NextToken, Tokenizer
from paras2s_jax.judge.score_prompt import ScorePrompt
from paras2s_jax.models.qwen2 import Qwen2LM

DIGITS = (1, 2, 3, 4, 5)
# What the reply that is asked for would begin with, up to the digit.
REPLY_START = '{"score": '


class LocalScorer:
    """Expected scores under a Qwen2LM with a chat template.

    Args:
        model, params, tokenizer: of `convert.from_pretrained`.
        name: of the model in tables.
        batch_size, max_tokens: see NextToken.

    Raises:
        ValueError: a digit is no token of its own, or the tokenizer has no chat template.
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
        self._prompt, self._max_tokens = prompt, max_tokens
        self.name = name
        self.version = f"prompt{prompt.version}-{params_digest(params)[:12]}"
        self._digits = NextToken(
            model,
            params,
            tokenizer,
            REPLY_START,
            [str(digit) for digit in DIGITS],
            name=name,
            batch_size=batch_size,
            max_tokens=max_tokens,
        )

    @property
    def settings_hash(self) -> str:
        return digest([self._prompt.digest, REPLY_START, self._max_tokens])

    def score(
        self, heard: Sequence[Heard], repeat: int = 0
    ) -> Iterator[tuple[int, Score | Failure]]:
        """(index, answer) of every item, shortest prompts first; repeats are equal."""
        del repeat
        for index, probs in self._digits.read([self._prompt.messages(item) for item in heard]):
            yield index, probs if isinstance(probs, Failure) else _expected(probs)


def _expected(probs: np.ndarray) -> Score:
    score = float(np.clip(probs @ np.array(DIGITS), DIGITS[0], DIGITS[-1]))
    shares = {str(digit): round(float(p), 4) for digit, p in zip(DIGITS, probs)}
    return Score(score, None, None, f"digit {DIGITS[int(probs.argmax())]} is likeliest", raw=shares)
