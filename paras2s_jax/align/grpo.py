"""GRPO (arXiv 2402.03300) on both token streams: the only file that knows the order.

rollout -> waveforms -> rewards -> advantages (one jitted call), then the inner epochs of the
clipped objective with a KL term to the frozen SFT policy (paper.md, section 3).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from paras2s_jax.align import losses, rollout
from paras2s_jax.align.policy import Frontend, SpeechPolicy, masks_of, on_mesh, texts_of
from paras2s_jax.data.tokenizer import TextTokenizer
from paras2s_jax.train import sharding
from paras2s_jax.train.checkpoint import Checkpointer
from paras2s_jax.train.loop import Source, fit
from paras2s_jax.train.metrics import MetricWriter
from paras2s_jax.train.state import TrainState, step_rng
from paras2s_jax.train.step import Sums, make_update

AUDIO_KEYS = ("query",)
# Waves float32[L] -> what a recogniser hears in each.
Hear = Callable[[Sequence[np.ndarray]], Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Hyperparameters of the objective; the defaults are the paper's where it states them.

    group_size: G. beta: weight of the KL term. clip_low, clip_high: of the ratio.
    kl_estimator: see losses.KL_ESTIMATORS. loss_type: see losses.token_weights.
    scale_by_std: divide advantages by the group's std (Dr. GRPO does not).
    num_epochs: mu, updates per rollout. accum_steps: micro-batches per update.
    """

    group_size: int = 8
    beta: float = 0.2
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_estimator: str = "k3"
    loss_type: str = "grpo"
    scale_by_std: bool = True
    num_epochs: int = 1
    accum_steps: int = 1

    def __post_init__(self):
        if self.group_size < 2:
            raise ValueError(f"group_size {self.group_size} leaves nothing to compare; use >= 2.")
        if min(self.num_epochs, self.accum_steps) < 1:
            raise ValueError("num_epochs and accum_steps must be at least 1.")
        if self.loss_type not in losses.LOSS_TYPES:
            raise ValueError(f"loss_type {self.loss_type!r}: choose one of {losses.LOSS_TYPES}.")
        if self.kl_estimator not in losses.KL_ESTIMATORS:
            known = tuple(losses.KL_ESTIMATORS)
            raise ValueError(f"kl_estimator {self.kl_estimator!r}: choose one of {known}.")


@dataclasses.dataclass(frozen=True)
class Audit:
    """Checks on the host that spoken answers say what their text stream says.

    hear: a recogniser. tokenizer: of the text stream. every: steps between audits.
    num_prompts: whose answers are heard.
    """

    hear: Hear
    tokenizer: TextTokenizer
    every: int = 10
    num_prompts: int = 4


def make_loss(policy: SpeechPolicy, settings: Settings):
    """`loss_fn(variables, experience, rng) -> Sums`; sums over rows, so accumulation is exact."""

    def loss_fn(variables, experience: rollout.Experience, rng):
        del rng
        out = policy.logp(variables, experience.prompt, experience.streams, at_temperature=True)
        # On policy the old log-probabilities are these very ones: the ratio is exactly 1.
        old_logp = experience.old_logp
        if old_logp is None:
            old_logp = jax.lax.stop_gradient(out["logp"])
        sums = losses.policy_loss(
            out["logp"],
            old_logp,
            experience.ref_logp,
            experience.advantages,
            masks_of(experience.streams),
            entropy=out["entropy"],
            beta=settings.beta,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            kl_estimator=settings.kl_estimator,
            loss_type=settings.loss_type,
            max_tokens=len(losses.STREAMS) * policy.max_steps,
        )
        return Sums(*sums)

    return loss_fn


class GrpoUpdate:
    """`update(state, batch) -> (state, metrics)` for `train.loop.fit`: one rollout, mu updates.

    The batch holds query waves only. The random numbers of a step follow from the state alone, so
    that a resumed run repeats an unbroken one. The state's params and opt_state are donated.
    """

    def __init__(
        self,
        policy: SpeechPolicy,
        reference: Mapping[str, Any],
        frontend: Frontend,
        reward_fn: rollout.RewardFn,
        reward_variables: Any,
        optimizer: optax.GradientTransformation,
        settings: Settings,
        *,
        audit: Audit | None = None,
        mesh: Mesh | None = None,
    ):
        if policy.text.is_greedy or policy.audio.is_greedy:
            raise ValueError("GRPO explores by sampling: set both streams' temperature above 0.")
        self._policy, self._settings, self._audit = policy, settings, audit
        self._mesh = mesh
        self._frozen = on_mesh((reference, frontend, reward_variables), mesh)
        self._collect = jax.jit(
            functools.partial(
                rollout.collect,
                policy,
                reward_fn,
                group_size=settings.group_size,
                scale_by_std=settings.scale_by_std,
                num_epochs=settings.num_epochs,
                num_chunks=settings.accum_steps,
                audit_prompts=audit.num_prompts if audit else 0,
                mesh=mesh,
            )
        )
        loss_fn = make_loss(policy, settings)
        self._update = make_update(loss_fn, optimizer, accum_steps=settings.accum_steps)

    def __call__(self, state: TrainState, batch: Mapping[str, Any]):
        batch = {name: batch[name] for key in AUDIO_KEYS for name in (key, f"{key}_len")}
        experience, metrics, spoken = self._collect(
            state.variables, *self._frozen, batch, step_rng(state)
        )
        if self._audit and int(state.step) % self._audit.every == 0:
            metrics = metrics | {"asr/wer": self._word_error_rate(spoken)}
        next_step = state.step + 1
        epochs = []
        for _ in range(self._settings.num_epochs):
            state, values = self._update(state, experience)
            epochs.append(values)
        # A step is one rollout, however many updates it feeds.
        state = state.replace(step=next_step)
        means = jax.tree.map(lambda *values: sum(values) / len(values), *epochs)
        return state, metrics | means

    def _word_error_rate(self, spoken: rollout.Spoken) -> float:
        """Word error rate of the audited answers against their own text streams."""
        if jax.process_count() > 1:
            spoken = multihost_utils.process_allgather(spoken, tiled=True)
        written = texts_of(self._policy, spoken.rollout, self._audit.tokenizer)
        waves, lens = jax.device_get((spoken.answers.waves, spoken.answers.lens))
        length = waves.shape[-1]
        clips = zip(waves.reshape(-1, length), lens.ravel(), strict=True)
        heard = self._audit.hear([wave[:size] for wave, size in clips])
        return rollout.word_error_rate([text for group in written for text in group], heard)


def train(
    policy: SpeechPolicy,
    variables: Mapping[str, Any],
    reference: Mapping[str, Any],
    frontend: Frontend,
    reward_fn: rollout.RewardFn,
    reward_variables: Any,
    batches: Source,
    *,
    optimizer: optax.GradientTransformation,
    settings: Settings,
    num_steps: int,
    rng: jax.Array,
    trainable: str = "",
    audit: Audit | None = None,
    mesh: Mesh | None = None,
    checkpointer: Checkpointer | None = None,
    save_every: int = 20,
    writer: MetricWriter | None = None,
    log_every: int = 1,
    label: str = "grpo",
) -> dict[str, Any]:
    """Reinforces the variables that match `trainable`; resumes where it stopped.

    Args:
        variables: of policy.model to start from; not consumed.
        reference: of policy.model, frozen: the SFT policy.
        batches: repeating, with the audio key "query"; batch_size is P.
        optimizer: takes num_epochs steps per rollout.

    Returns:
        all variables after `num_steps` rollouts.
    """
    state = TrainState.create(variables, optimizer, rng, trainable=trainable)
    update = GrpoUpdate(
        policy,
        reference,
        frontend,
        reward_fn,
        reward_variables,
        optimizer,
        settings,
        audit=audit,
        mesh=mesh,
    )

    def place(batch):
        arrays = {key: batch[key] for key in ("query", "query_len")}
        return sharding.shard_batch(arrays, mesh)

    state = fit(
        state,
        update,
        batches,
        num_steps=num_steps,
        checkpointer=checkpointer,
        save_every=save_every,
        writer=writer,
        log_every=log_every,
        progress_label=label,
        make_batch=place if mesh is not None else None,
    )
    return state.variables
