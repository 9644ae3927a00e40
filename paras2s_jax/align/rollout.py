"""One batch of experience: G sampled answers per query, spoken, rewarded, compared. Jit-able."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jiwer
from flax import struct
from jax.sharding import Mesh

from paras2s_jax.align.advantages import group_advantages, reward_metrics
from paras2s_jax.align.policy import Answers, Frontend, SpeechPolicy, masks_of, spread
from paras2s_jax.data.tokenizer import normalize
from paras2s_jax.models import decode
from paras2s_jax.models.kimi_audio import Prompt

# (reward variables, query waves float32[P, L], their lens int32[P], answers) -> float32[P, G], NaN
# where an answer cannot be scored; jit-able.
RewardFn = Callable[[Any, jax.Array, jax.Array, Answers], jax.Array]

# Root mean square of a full-scale sine is -3 dB; below this nothing is heard.
SILENT_BELOW_DB = -60.0


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


def collect(
    policy: SpeechPolicy,
    reward_fn: RewardFn,
    variables: Any,
    reference: Any,
    frontend: Frontend,
    reward_variables: Any,
    batch: Mapping[str, jax.Array],
    rng: jax.Array,
    *,
    group_size: int,
    scale_by_std: bool = True,
    num_epochs: int = 1,
    num_chunks: int = 1,
    audit_prompts: int = 0,
    mesh: Mesh | None = None,
) -> tuple[Experience, dict[str, jax.Array], Spoken]:
    """Samples, speaks, rewards and compares one batch of queries.

    Args:
        variables, reference: of policy.model: the policy now, and the frozen one of the KL term.
        batch: query float32[P, L] at 16 kHz, query_len int32[P].
        num_chunks: log-probabilities are computed for P / num_chunks prompts at a time.
        audit_prompts: how many prompts' answers to hand out.

    Returns:
        (experience, metrics {name: float32[]}, the answers to the first `audit_prompts`).
    """
    draw_rng, wave_rng = jax.random.split(rng)
    prompt = spread(policy.prompt(frontend, batch["query"], batch["query_len"]), mesh)
    rollout = spread(policy.rollout(variables, prompt, draw_rng, group_size), mesh)
    answers = spread(policy.speak(frontend, rollout, wave_rng), mesh)
    rewards = reward_fn(reward_variables, batch["query"], batch["query_len"], answers)
    # An answer without speech has no sound to judge, whatever the reward function makes of it.
    rewards = jnp.where(answers.len_codes > 0, rewards, jnp.nan)
    streams = decode.rollout_streams(policy.model.config, rollout)

    def logp_under(variables):
        def chunk(inputs):
            return policy.logp(variables, *inputs, at_temperature=True)["logp"]

        return jax.lax.stop_gradient(_in_chunks(chunk, (prompt, streams), num_chunks))

    experience = Experience(
        prompt=prompt,
        streams=streams,
        ref_logp=logp_under(reference),
        old_logp=logp_under(variables) if num_epochs > 1 else None,
        advantages=group_advantages(rewards, scale_by_std=scale_by_std),
    )
    sums = reward_metrics(rewards) | answer_metrics(streams, rollout.finished, answers)
    metrics = {name: total / weight for name, (total, weight) in sums.items()}
    audited = jax.tree.map(lambda x: x[:audit_prompts], Spoken(rollout, answers))
    return spread(experience, mesh), metrics, audited


def answer_metrics(
    streams: Mapping[str, jax.Array], finished: jax.Array, answers: Answers
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Sums and weights (answers) of lengths and of two alarms of reward hacking.

    `len/text`, `len/audio`: tokens the policy chose; `answer/finished`: share that ended before
    the limit; `answer/level_db`: mean level re full scale; `answer/silent`: share without sound.
    """
    count = jnp.float32(finished.size)
    sums = {
        f"len/{stream}": mask.sum().astype(jnp.float32)
        for stream, mask in masks_of(streams).items()
    }
    power = jnp.square(answers.waves).sum(axis=-1) / jnp.maximum(answers.lens, 1)
    level_db = 10.0 * jnp.log10(power + 1e-10)
    sums |= {
        "answer/finished": finished.sum().astype(jnp.float32),
        "answer/level_db": level_db.sum(),
        "answer/silent": (level_db < SILENT_BELOW_DB).sum().astype(jnp.float32),
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
