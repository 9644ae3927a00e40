"""Probabilities of a few next tokens under a language model of ours, batched and jitted."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from paras2s_jax.judge.interfaces import Failure
from paras2s_jax.models.qwen2 import Qwen2LM, last_real

# Prompts are padded to whole multiples of this, so that few lengths are compiled.
_STEP = 128


class Tokenizer(Protocol):
    """The part of transformers' tokenizers that is used."""

    def apply_chat_template(self, conversation, **options) -> str: ...

    def encode(self, text: str, **options) -> list[int]: ...


class NextToken:
    """How likely each choice is to go on after the start of a reply.

    Args:
        model, params, tokenizer: of `convert.from_pretrained`.
        reply_start: what the reply would begin with, up to the choice.
        choices: told apart by their first token.
        name: of the model in tables.
        max_tokens: longer prompts are failures, not cut: a judge must read the whole answer.

    Raises:
        ValueError: two choices begin with one token, or share it with `reply_start`, or the
            tokenizer has no chat template.
    """

    def __init__(
        self,
        model: Qwen2LM,
        params: Mapping[str, Any],
        tokenizer: Tokenizer,
        reply_start: str,
        choices: Sequence[str],
        *,
        name: str,
        batch_size: int = 8,
        max_tokens: int = 2048,
    ):
        self._model, self._params, self._tokenizer = model, params, tokenizer
        self._name, self._reply_start = name, reply_start
        self._batch_size, self._max_tokens = batch_size, max_tokens
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"{name} has no chat template; take an instruction-tuned model")
        self._choices = tuple(self._first_token(choice) for choice in choices)
        if len(set(self._choices)) < len(choices):
            raise ValueError(f"{name}: {', '.join(choices)} begin with one token")

    def _first_token(self, choice: str) -> int:
        """The token by which the choice goes on after the reply's start."""
        start = self._tokenizer.encode(self._reply_start, add_special_tokens=False)
        whole = self._tokenizer.encode(self._reply_start + choice, add_special_tokens=False)
        if whole[: len(start)] != start or len(whole) == len(start):
            raise ValueError(f"{self._name}: {choice} is no token after {self._reply_start!r}")
        return whole[len(start)]

    def read(
        self, conversations: Sequence[Sequence[Mapping[str, str]]]
    ) -> Iterator[tuple[int, np.ndarray | Failure]]:
        """(index, float32[choices], probabilities among them) of all, shortest prompts first."""
        ids = [self._ids(conversation) for conversation in conversations]
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
                finite = np.isfinite(row).all()
                yield index, row if finite else Failure("its choices have no finite probabilities")

    def _ids(self, conversation: Sequence[Mapping[str, str]]) -> list[int]:
        text = self._tokenizer.apply_chat_template(
            list(conversation), tokenize=False, add_generation_prompt=True
        )
        return self._tokenizer.encode(text + self._reply_start, add_special_tokens=False)

    def _probs(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """float32[batch_size, choices]; spare rows repeat given ones."""
        length = -(-max(map(len, rows)) // _STEP) * _STEP
        ids = np.zeros((self._batch_size, length), np.int32)
        mask = np.zeros((self._batch_size, length), bool)
        for at in range(self._batch_size):
            row = rows[at % len(rows)]
            ids[at, : len(row)], mask[at, : len(row)] = row, True
        return np.asarray(_choice_probs(self._model, self._params, ids, mask, self._choices))


@functools.partial(jax.jit, static_argnums=(0, 4))
def _choice_probs(model: Qwen2LM, params, ids, mask, choices: tuple[int, ...]) -> jax.Array:
    """Logits of one position per row; over all of them they would dwarf the rest."""
    variables = {"params": params}
    _, out = model.apply(variables, ids, attention_mask=mask)
    logits = model.apply(variables, last_real(out["hidden"], mask), method="logits")
    return jax.nn.softmax(logits[:, jnp.array(choices)].astype(jnp.float32), axis=-1)
