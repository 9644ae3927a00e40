"""The reward model: two waveforms -> an expected score of 1..5, as one token of an audio LM.

It stands in for the judge during RL (paper.md, section 3, step 2). Pure functions; variables are
arguments.
"""

import dataclasses
import string
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paras2s_jax.align.policy import Answers
from paras2s_jax.align.rollout import RewardFn
from paras2s_jax.audio.mel import whisper_log_mel
from paras2s_jax.audio.styles import QUERY_STYLES, TONES
from paras2s_jax.data.tokenizer import Tokenizer
from paras2s_jax.models.qwen2_audio import Qwen2Audio
from paras2s_jax.train import sharding
from paras2s_jax.train.step import Sums

SCORES = (1, 2, 3, 4, 5)
# Around the two audios; the score's digit is the next token.
TEMPLATE = ("Query: ", "\nAnswer: ", "\nScore: ")
# What the judge hears on its way to a score, as labels that training may ask for too.
STYLE_LABELS, TONE_LABELS = tuple(QUERY_STYLES), TONES
UNKNOWN = -1


@dataclasses.dataclass(frozen=True)
class ScorePrompt:
    """Token ids of the text around the two audios, and of what the model names.

    digit_ids: of 1 to 5. style_ids, tone_ids: of the letters that stand for STYLE_LABELS and
    TONE_LABELS.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    digit_ids: tuple[int, ...]
    style_ids: tuple[int, ...]
    tone_ids: tuple[int, ...]


class Readings(NamedTuple):
    """Logits over the vocabulary: where the query ends, where the answer ends, of the score.

    style: float32[P, V]; tone, score: float32[P, G, V].
    """

    style: jax.Array
    tone: jax.Array
    score: jax.Array


def score_prompt(tokenizer: Tokenizer, template: tuple[str, str, str] = TEMPLATE) -> ScorePrompt:
    """Encodes the template.

    Raises:
        ValueError: a digit or a letter is not one token.
    """

    def single(text: str) -> int:
        ids = tokenizer.encode(text)
        if len(ids) != 1:
            raise ValueError(
                f"the tokenizer splits {text!r} into {ids}; digits and letters must be single "
                "tokens."
            )
        return ids[0]

    before, between, after = (tuple(tokenizer.encode(text)) for text in template)
    letters = [single(letter) for letter in string.ascii_uppercase]
    return ScorePrompt(
        before,
        between,
        after,
        digit_ids=tuple(single(str(score)) for score in SCORES),
        style_ids=tuple(letters[: len(STYLE_LABELS)]),
        tone_ids=tuple(letters[: len(TONE_LABELS)]),
    )


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """An audio language model that reads (query, answer) and names the score.

    The query is run once per prompt, as a prefix that all answers of its group share.
    """

    model: Qwen2Audio
    prompt: ScorePrompt

    def init(self, rng: jax.Array, tower: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Fresh variables; `tower`: trained parameters of the audio tower, or of parts of it.

        Raises:
            ValueError: the tower has no such part, or another shape.
        """
        variables = sharding.unbox(jax.jit(self._init)(rng))
        if tower is not None:
            params = dict(variables["params"])
            fresh = params["audio_tower"]
            shapes, given = (jax.tree.map(jnp.shape, dict(x)) for x in (fresh, tower))
            wrong = [name for name, shape in given.items() if shapes.get(name) != shape]
            if wrong:
                raise ValueError(
                    "the given tower's shapes are not those of the reward model's: "
                    f"{', '.join(wrong)}"
                )
            params["audio_tower"] = {**fresh, **jax.tree.map(jnp.asarray, dict(tower))}
            variables = {**variables, "params": params}
        return variables

    def _init(self, rng: jax.Array) -> Any:
        slots = np.full((1, 2), self.model.config.audio_token_index, np.int32)
        ids = np.concatenate([slots, np.array([self.prompt.after], np.int32)], axis=1)
        mel = np.zeros((1, 8, self.model.config.audio.num_mel_bins), np.float32)
        return self.model.init(rng, mel, ids, method="init_all")

    def boxed(self) -> Any:
        """Shapes, types and logical axes of the variables; makes no arrays."""
        return jax.eval_shape(self._init, jax.random.key(0))

    def readings(
        self,
        variables: Mapping[str, Any],
        query_waves: jax.Array,
        query_lens: jax.Array,
        answer_waves: jax.Array,
        answer_lens: jax.Array,
    ) -> Readings:
        """What the model would say where the query ends, where the answer ends, and as the score.

        query_waves: float32[P, L], query_lens: int32[P]; answer_waves: float32[P, G, L'],
        answer_lens: int32[P, G], all at 16 kHz.
        """
        prompts, group = answer_lens.shape
        heard, heard_mask = self._hear(variables, query_waves, query_lens)
        ids = self._ids(heard, before=self.prompt.before, after=self.prompt.between)
        _, shared = self.model.apply(
            variables, ids, audio_embeds=heard, audio_mask=heard_mask, emit=("kv",)
        )
        heard, heard_mask = self._hear(
            variables, answer_waves.reshape(prompts * group, -1), answer_lens.reshape(-1)
        )
        _, out = self.model.apply(
            variables,
            self._ids(heard, after=self.prompt.after),
            audio_embeds=heard,
            audio_mask=heard_mask,
            prefix=shared["kv"],
            prefix_mask=shared["mask"],
        )

        # Logits of single positions only: over all positions they would dwarf all else.
        def read(hidden):
            return self.model.apply(
                variables,
                hidden,
                method=lambda module, hidden: module.language_model.logits(hidden),
            )

        answer_end = out["hidden"][:, -len(self.prompt.after)]
        return Readings(
            style=read(shared["hidden"][:, -1]),
            tone=read(answer_end).reshape(prompts, group, -1),
            score=read(out["hidden"][:, -1]).reshape(prompts, group, -1),
        )

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
        """Expected score over the digit tokens; arguments as `readings`.

        Returns: float32[P, G] in 1..5, NaN where the answer has no samples.
        """
        logits = self.readings(variables, query_waves, query_lens, answer_waves, answer_lens).score
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


def make_loss(reward_model: RewardModel, findings_weight: float = 0.0):
    """`loss_fn(variables, batch, rng) -> Sums`: cross-entropy of the score token.

    batch: query float32[B, L], answer float32[B, L'], their `_len`, score float32[B]; style and
    tone int32[B], indices of STYLE_LABELS and TONE_LABELS or UNKNOWN. The target is spread over two
    digits where a score lies between them.
    findings_weight: of the cross-entropies of the style and of the tone that the judge found. A
    small model hears whether an answer fits much sooner when it is also taught what to listen for.
    """
    prompt = reward_model.prompt

    def loss_fn(variables, batch, rng):
        del rng
        readings = reward_model.readings(
            variables,
            batch["query"],
            batch["query_len"],
            batch["answer"][:, None],
            batch["answer_len"][:, None],
        )
        logits = readings.score[:, 0]
        digits = jnp.array(prompt.digit_ids)
        logp = jax.nn.log_softmax(logits, axis=-1)[:, digits]
        scores = batch["score"].astype(jnp.float32)
        weight = jnp.float32(scores.shape[0])
        errors = jnp.abs(expected_score(logits[:, digits]) - scores)
        loss_sum = -jnp.sum(two_hot(scores) * logp)
        metrics = {"reward/abs_error": (errors.sum(), weight)}
        if findings_weight:
            for name, given, ids in (
                ("style", readings.style, prompt.style_ids),
                ("tone", readings.tone[:, 0], prompt.tone_ids),
            ):
                nll, hits, known = _finding(given, batch[name], ids)
                loss_sum += findings_weight * nll
                metrics[f"reward/{name}_hit"] = (hits, known)
        return Sums(loss_sum, weight, metrics)

    return loss_fn


def _finding(logits: jax.Array, labels: jax.Array, ids: tuple[int, ...]):
    """logits: float32[B, V]; labels: int32[B]. Sums over known labels: nll, hits, their number."""
    known = labels != UNKNOWN
    logp = jax.nn.log_softmax(logits, axis=-1)[:, jnp.array(ids)]
    chosen = jnp.take_along_axis(logp, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
    hits = (jnp.argmax(logp, axis=-1) == labels) & known
    return (
        -jnp.sum(jnp.where(known, chosen, 0.0)),
        hits.sum().astype(jnp.float32),
        known.sum().astype(jnp.float32),
    )


def make_reward_fn(reward_model: RewardModel) -> RewardFn:
    """The reward of RL: the reward model's score of (query, answer), from waveforms alone."""

    def reward_fn(variables, query_waves, query_lens, answers: Answers):
        return reward_model.score(variables, query_waves, query_lens, answers.waves, answers.lens)

    return reward_fn
