"""The reward model: two waveforms -> an expected score of 1..5, as one token of an audio LM.

It stands in for the judge during RL (paper.md, section 3, step 2). Pure functions; variables are
arguments.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paras2s_jax.align.policy import Answers
from paras2s_jax.align.rollout import RewardFn
from paras2s_jax.audio.mel import whisper_log_mel
from paras2s_jax.data.tokenizer import TextTokenizer
from paras2s_jax.models.qwen2_audio import Qwen2Audio
from paras2s_jax.train import sharding
from paras2s_jax.train.step import Sums

SCORES = (1, 2, 3, 4, 5)
# Around the two audios; the score's digit is the next token.
TEMPLATE = ("Query: ", "\nAnswer: ", "\nScore: ")


@dataclasses.dataclass(frozen=True)
class ScorePrompt:
    """Token ids of the text around the two audios, and of the digits 1 to 5."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    digit_ids: tuple[int, ...]


def score_prompt(
    tokenizer: TextTokenizer, template: tuple[str, str, str] = TEMPLATE
) -> ScorePrompt:
    """Encodes the template.

    Raises:
        ValueError: a digit is not one token.
    """
    digits = [tokenizer.encode(str(score)) for score in SCORES]
    if any(len(ids) != 1 for ids in digits):
        raise ValueError(f"the tokenizer splits a digit ({digits}); scores must be single tokens.")
    before, between, after = (tuple(tokenizer.encode(text)) for text in template)
    return ScorePrompt(before, between, after, tuple(ids[0] for ids in digits))


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """An audio language model that reads (query, answer) and names the score.

    The query is run once per prompt, as a prefix that all answers of its group share.
    """

    model: Qwen2Audio
    prompt: ScorePrompt

    def init(self, rng: jax.Array, tower: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Fresh variables; `tower`: parameters of a trained WhisperEncoder to start from."""
        slots = np.full((1, 2), self.model.config.audio_token_index, np.int32)
        ids = np.concatenate([slots, np.array([self.prompt.after], np.int32)], axis=1)
        mel = np.zeros((1, 8, self.model.config.audio.num_mel_bins), np.float32)
        make = jax.jit(lambda rng: self.model.init(rng, mel, ids, method="init_all"))
        variables = sharding.unbox(make(rng))
        if tower is not None:
            params = dict(variables["params"])
            fresh, given = (jax.tree.map(jnp.shape, x) for x in (params["audio_tower"], tower))
            if fresh != given:
                raise ValueError("the given tower's shapes are not those of the reward model's.")
            params["audio_tower"] = jax.tree.map(jnp.asarray, dict(tower))
            variables = {**variables, "params": params}
        return variables

    def logits(
        self,
        variables: Mapping[str, Any],
        query_waves: jax.Array,
        query_lens: jax.Array,
        answer_waves: jax.Array,
        answer_lens: jax.Array,
    ) -> jax.Array:
        """Logits of the token after the template.

        query_waves: float32[P, L], query_lens: int32[P]; answer_waves: float32[P, G, L'],
        answer_lens: int32[P, G], all at 16 kHz.
        Returns: float32[P, G, V].
        """
        prompts, group = answer_lens.shape
        heard, heard_mask = self._hear(variables, query_waves, query_lens)
        ids = self._ids(heard, before=self.prompt.before, after=self.prompt.between)
        _, shared = self.model.apply(variables, ids, heard, heard_mask, emit=("kv",))
        heard, heard_mask = self._hear(
            variables, answer_waves.reshape(prompts * group, -1), answer_lens.reshape(-1)
        )
        _, out = self.model.apply(
            variables,
            self._ids(heard, after=self.prompt.after),
            heard,
            heard_mask,
            prefix=shared["kv"],
            prefix_mask=shared["mask"],
        )
        # Logits of the last position only: over all positions they would dwarf all else.
        logits = self.model.apply(
            variables,
            out["hidden"][:, -1],
            method=lambda module, hidden: module.language_model.logits(hidden),
        )
        return logits.reshape(prompts, group, -1)

    def _hear(self, variables, waves, lens):
        """float32[B, L] -> (float[B, S, D], bool[B, S])."""
        mel, len_frames = whisper_log_mel(waves, lens, self.model.config.audio.num_mel_bins)
        return self.model.apply(variables, mel, len_frames, method="audio_embeds")

    def _ids(self, heard, *, before: tuple[int, ...] = (), after: tuple[int, ...]) -> jax.Array:
        """One audio between two texts, the same for all rows: int32[B, T]."""
        rows, slots = heard.shape[:2]
        row = (*before, *[self.model.config.audio_token_index] * slots, *after)
        return jnp.broadcast_to(jnp.array(row, jnp.int32), (rows, len(row)))

    def score(
        self,
        variables: Mapping[str, Any],
        query_waves: jax.Array,
        query_lens: jax.Array,
        answer_waves: jax.Array,
        answer_lens: jax.Array,
    ) -> jax.Array:
        """Expected score over the digit tokens; arguments as `logits`.

        Returns: float32[P, G] in 1..5, NaN where the answer has no samples.
        """
        logits = self.logits(variables, query_waves, query_lens, answer_waves, answer_lens)
        expected = expected_score(logits[..., jnp.array(self.prompt.digit_ids)])
        return jnp.where(answer_lens > 0, expected, jnp.nan)


def expected_score(digit_logits: jax.Array) -> jax.Array:
    """float32[..., 5] -> float32[...]: the mean of 1..5 under their softmax."""
    return jnp.sum(jax.nn.softmax(digit_logits, axis=-1) * jnp.array(SCORES, jnp.float32), axis=-1)


def two_hot(scores: jax.Array) -> jax.Array:
    """Weights of the digits 1..5 whose mean is the score; whole scores give one digit.

    scores: float32[...] in 1..5. Returns: float32[..., 5].
    """
    distance = jnp.abs(scores[..., None] - jnp.array(SCORES, jnp.float32))
    return jnp.maximum(1.0 - distance, 0.0)


def make_loss(reward_model: RewardModel):
    """`loss_fn(variables, batch, rng) -> Sums`: cross-entropy of the score token.

    batch: query float32[B, L], answer float32[B, L'], their `_len`, score float32[B]. The target
    is spread over two digits where a score lies between them.
    """

    def loss_fn(variables, batch, rng):
        del rng
        logits = reward_model.logits(
            variables,
            batch["query"],
            batch["query_len"],
            batch["answer"][:, None],
            batch["answer_len"][:, None],
        )[:, 0]
        digits = jnp.array(reward_model.prompt.digit_ids)
        logp = jax.nn.log_softmax(logits, axis=-1)[:, digits]
        scores = batch["score"].astype(jnp.float32)
        weight = jnp.float32(scores.shape[0])
        errors = jnp.abs(expected_score(logits[:, digits]) - scores)
        loss_sum = -jnp.sum(two_hot(scores) * logp)
        return Sums(loss_sum, weight, {"reward/abs_error": (errors.sum(), weight)})

    return loss_fn


def make_reward_fn(reward_model: RewardModel) -> RewardFn:
    """The reward of RL: the reward model's score of (query, answer), from waveforms alone."""

    def reward_fn(variables, query_waves, query_lens, answers: Answers):
        return reward_model.score(variables, query_waves, query_lens, answers.waves, answers.lens)

    return reward_fn
