"""From sampled answers to experience: rewards, advantages, log-probabilities. Jit-able."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jiwer
from flax import struct

from paras2s_jax.align.advantages import group_advantages, reward_metrics
from paras2s_jax.align.policy import Answers, SpeechPolicy
from paras2s_jax.data.tokenizer import normalize
from paras2s_jax.models import decode
from paras2s_jax.models.kimi_audio import Prompt

# (reward variables, query waves float32[P, L], their lens int32[P], answers) -> float32[P, G], NaN
# where an answer cannot be scored; jit-able.
RewardFn = Callable[[Any, jax.Array, jax.Array, Answers], jax.Array]

# Root mean square of a full-scale sine is -3 dB; below this nothing is heard.
SILENT_BELOW_DB = -60.0
# An answer is clipped when more than this share of its samples is at full scale: peaks of speech
# reach it now and then, a level that is too high all the time.
FULL_SCALE, CLIPPED_SHARE = 0.999, 0.001


class Experience(struct.PyTreeNode):
    """What the inner epochs train on; every leaf has a leading prompt axis.

    streams: dict of [P, G, R]; ref_logp, old_logp: {stream: float32[P, G, R]}, old_logp None if
    there is only one epoch, whose ratio is 1 by definition; advantages: float32[P, G].
    """

    prompt: Prompt
    streams: dict[str, jax.Array]
    ref_logp: dict[str, jax.Array]
    old_logp: dict[str, jax.Array] | None
    advantages: jax.Array


class Spoken(struct.PyTreeNode):
    """Answers to audit on the host: rollout and waves of some prompts."""

    rollout: decode.Rollout
    answers: Answers


def reward_answers(
    reward_fn: RewardFn,
    reward_variables: Any,
    batch: Mapping[str, jax.Array],
    rollout: decode.Rollout,
    answers: Answers,
    *,
    scale_by_std: bool = True,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Rewards answers to queries and compares those of a group.

    batch: query float32[P, L] at 16 kHz, query_len int32[P].
    Returns: (advantages float32[P, G], metrics {name: float32[]}).
    """
    rewards = reward_fn(reward_variables, batch["query"], batch["query_len"], answers)
    # An answer without speech has no sound to judge, whatever the reward function makes of it.
    rewards = jnp.where(answers.len_codes > 0, rewards, jnp.nan)
    masks = {"text": rollout.text_mask, "audio": rollout.audio_mask}
    sums = reward_metrics(rewards) | answer_metrics(masks, rollout.finished, answers)
    metrics = {name: total / weight for name, (total, weight) in sums.items()}
    return group_advantages(rewards, scale_by_std=scale_by_std), metrics


def logp_in_chunks(
    policy: SpeechPolicy,
    variables: Any,
    prompt: Prompt,
    streams: dict[str, jax.Array],
    num_chunks: int = 1,
) -> dict[str, jax.Array]:
    """Log-probabilities of answers under the distribution that they are sampled from.

    num_chunks: they are computed for P / num_chunks prompts at a time.
    Returns: {stream: float32[P, G, R]}.
    """

    def chunk(inputs):
        return policy.logp(variables, *inputs, at_temperature=True)["logp"]

    return jax.lax.stop_gradient(_in_chunks(chunk, (prompt, streams), num_chunks))


def answer_metrics(
    masks: Mapping[str, jax.Array], finished: jax.Array, answers: Answers
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Sums and weights (answers) of lengths and of what `align.health` watches in the sound.

    masks: {stream: bool[P, G, R]}. `len/text`, `len/audio`: tokens the policy chose;
    `answer/finished`: share that ended before the limit; `answer/level_db`: mean level re full
    scale; `answer/silent`, `answer/clipped`: share without sound, and with a sound cut off.
    """
    count = jnp.float32(finished.size)
    sums = {f"len/{stream}": mask.sum().astype(jnp.float32) for stream, mask in masks.items()}
    power = jnp.square(answers.waves).sum(axis=-1) / jnp.maximum(answers.lens, 1)
    level_db = 10.0 * jnp.log10(power + 1e-10)
    at_full_scale = (jnp.abs(answers.waves) >= FULL_SCALE).sum(axis=-1)
    clipped = at_full_scale > CLIPPED_SHARE * answers.lens
    sums |= {
        "answer/finished": finished.sum().astype(jnp.float32),
        "answer/level_db": level_db.sum(),
        "answer/silent": (level_db < SILENT_BELOW_DB).sum().astype(jnp.float32),
        "answer/clipped": clipped.sum().astype(jnp.float32),
    }
    return {name: (total, count) for name, total in sums.items()}


def word_error_rate(written: Sequence[str], heard: Sequence[str]) -> float:
    """Word errors of what was heard per word that was written, over answers with any words.

    NaN if no answer has any.
    """
    pairs = [(normalize(a), normalize(b)) for a, b in zip(written, heard, strict=True)]
    pairs = [(a, b) for a, b in pairs if a]
    if not pairs:
        return float("nan")
    references, hypotheses = zip(*pairs, strict=True)
    return float(jiwer.wer(list(references), list(hypotheses)))


def _in_chunks(fn: Callable, tree: Any, num_chunks: int) -> Any:
    """fn on rows i, i + num_chunks, … at a time: each chunk stays spread over all devices."""
    if num_chunks == 1:
        return fn(tree)

    def split(x):
        return jnp.moveaxis(x.reshape(-1, num_chunks, *x.shape[1:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])

    return jax.tree.map(join, jax.lax.map(fn, jax.tree.map(split, tree)))
