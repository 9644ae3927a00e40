"""GRPO (arXiv 2402.03300) on both token streams: the only file that knows the order.

rollout -> waveforms -> rewards -> advantages, then the inner epochs of the clipped objective with a
KL term to the frozen SFT policy (paper.md, section 3).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from paras2s_jax.align import losses, rollout
from paras2s_jax.align.phases import Call, Responder
from paras2s_jax.align.policy import Frontend, SpeechPolicy, masks_of, texts_of
from paras2s_jax.data.tokenizer import Tokenizer
from paras2s_jax.models import decode
from paras2s_jax.models.lora import NO_LORA
from paras2s_jax.train.checkpoint import Checkpointer
from paras2s_jax.train.loop import Monitor, Source, fit
from paras2s_jax.train.metrics import MetricWriter
from paras2s_jax.train.sharding import ONE_DEVICE_LAYOUTS, Layouts, Program
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
    tokenizer: Tokenizer
    every: int = 10
    num_prompts: int = 4


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Whether the reward model still agrees with the judge, on queries that it never saw.

    gap: (step, variables of the policy) -> mean of reward minus verdict over its answers; on every
    process the same. every: steps between measurements.
    """

    gap: Callable[[int, Mapping[str, Any]], float]
    every: int


def make_loss(policy: SpeechPolicy, settings: Settings):
    """`loss_fn(variables, experience, rng) -> Sums`; sums over rows, so accumulation is exact."""

    def loss_fn(variables, experience: rollout.Experience, rng):
        del rng
        out = policy.logp(variables, experience.prompt, experience.streams, at_temperature=True)
        # On policy the old log-probabilities are these very ones: the ratio is exactly 1.
        old_logp = experience.old_logp
        if old_logp is None:
            old_logp = jax.lax.stop_gradient(out["logp"])
        masks = masks_of(experience.streams)
        sums = losses.policy_loss(
            out["logp"],
            old_logp,
            experience.ref_logp,
            experience.advantages,
            masks,
            entropy=out["entropy"],
            beta=settings.beta,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            kl_estimator=settings.kl_estimator,
            loss_type=settings.loss_type,
            max_tokens=len(masks) * policy.max_steps,
        )
        return Sums(*sums)

    return loss_fn


class GrpoUpdate:
    """`update(state, batch) -> (state, metrics)` for `train.loop.fit`: one rollout, mu updates.

    The batch holds query waves only. The random numbers of a step follow from the state alone, so
    that a resumed run repeats an unbroken one. The state's params and opt_state are donated.

    One program per phase: hear, reshard, rollout and speak (align.phases), reward, reference and
    update. They are dispatched one after the other, and nothing waits for the device but an audit
    and a look at what is held out.
    """

    def __init__(
        self,
        policy: SpeechPolicy,
        reference: Mapping[str, Any] | None,
        frontend: Frontend,
        reward_fn: rollout.RewardFn,
        reward_variables: Any,
        optimizer: optax.GradientTransformation,
        settings: Settings,
        *,
        layouts: Layouts = ONE_DEVICE_LAYOUTS,
        rollout_dtype: Any = None,
        audit: Audit | None = None,
        held_out: HeldOut | None = None,
    ):
        """Takes arrays where layouts.train wants them, or ShapeDtypeStructs for `calls` only.

        reference: may share arrays with the policy; None for one of which only adapters are
        trained: its own params without them. rollout_dtype: of the weights that answers are
        sampled with, None: as they are.
        """
        if policy.text.is_greedy or policy.audio.is_greedy:
            raise ValueError("GRPO explores by sampling: set both streams' temperature above 0.")
        self._policy, self._settings = policy, settings
        self._audit, self._held_out = audit, held_out
        self._reference, self._frontend = reference, frontend
        self._reward_variables = reward_variables
        self._layouts = layouts
        self._responder = Responder(
            policy, layouts, group_size=settings.group_size, dtype=rollout_dtype
        )
        self._reward = self._make_reward(reward_fn)
        self._compare = self._make_reference()
        self._excerpt = self._make_excerpt()
        self._update = make_update(
            make_loss(policy, settings),
            optimizer,
            accum_steps=settings.accum_steps,
            layout=layouts.train,
        )
        self._clock: tuple[Any, int] = (None, 0)

    def _make_reward(self, reward_fn: rollout.RewardFn) -> Program:
        train = self._layouts.train

        def reward(variables, batch, sampled, answers):
            return rollout.reward_answers(
                reward_fn,
                variables,
                batch,
                sampled,
                answers,
                scale_by_std=self._settings.scale_by_std,
            )

        return Program("reward", reward, train, place=functools.partial(train.rows, grouped=True))

    def _make_reference(self) -> Program:
        """(reference, variables or None, prompt, rollout) -> streams and their log-probabilities.

        variables: of the policy, whose own are needed only for more than one epoch.
        """
        train, policy, settings = self._layouts.train, self._policy, self._settings
        frozen_policy = policy
        if "lora" not in (self._reference or {}):
            frozen_policy = dataclasses.replace(policy, model=policy.model.clone(lora=NO_LORA))

        def reference(frozen, variables, prompt, sampled):
            streams = decode.rollout_streams(policy.model.config, sampled)
            logp = functools.partial(
                rollout.logp_in_chunks,
                prompt=prompt,
                streams=streams,
                num_chunks=settings.accum_steps,
            )
            ref_logp = logp(frozen_policy, frozen)
            return streams, ref_logp, None if variables is None else logp(policy, variables)

        place = functools.partial(train.rows, grouped=True)
        return Program("reference", reference, train, place=place)

    def _make_excerpt(self) -> Program:
        """The answers to the first prompts, on every device."""
        train, size = self._layouts.train, self._audit.num_prompts if self._audit else 0

        def excerpt(spoken):
            return jax.tree.map(lambda x: x[:size], spoken)

        def place(tree):
            return jax.tree.map(lambda _: train.whole, tree)

        return Program("excerpt", excerpt, train, place=place)

    def __call__(self, state: TrainState, batch: Mapping[str, Any]):
        step = self._step_of(state)
        batch = {name: batch[name] for key in AUDIO_KEYS for name in (key, f"{key}_len")}
        rng, responder = step_rng(state), self._responder
        prompt = responder.hear(self._frontend, batch)
        weights = responder.reshard(state.params, state.frozen)
        sampled = responder.rollout(weights, prompt, rng)
        del weights
        answers = responder.speak(self._frontend, sampled, rng)
        advantages, metrics = self._reward(self._reward_variables, batch, sampled, answers)
        streams, ref_logp, old_logp = self._compare(*self._compared(state), prompt, sampled)
        if self._audit and step % self._audit.every == 0:
            spoken = self._excerpt(rollout.Spoken(sampled, answers))
            metrics = metrics | {"asr/wer": self._word_error_rate(spoken)}
        if self._held_out and step % self._held_out.every == 0:
            metrics = metrics | {"judge/gap": self._held_out.gap(step, state.variables)}
        del sampled, answers
        experience = rollout.Experience(prompt, streams, ref_logp, old_logp, advantages)
        next_step = state.step + 1
        epochs = []
        for _ in range(self._settings.num_epochs):
            state, values = self._update(state, experience)
            epochs.append(values)
        # A step is one rollout, however many updates it feeds.
        state = state.replace(step=next_step)
        self._clock = (next_step, step + 1)
        means = jax.tree.map(lambda *values: sum(values) / len(values), *epochs)
        return state, metrics | means

    def _step_of(self, state: TrainState) -> int:
        """The number of the step; to read it from the device would wait for the step before."""
        array, step = self._clock
        return step if array is state.step else int(state.step)

    def _compared(self, state: TrainState) -> tuple[Any, Any]:
        """Variables whose log-probabilities are needed: the reference's, and the policy's or None.

        The policy's own are what the ratio starts from, if there is more than one epoch.
        """
        own = state.variables if self._settings.num_epochs > 1 else None
        if self._reference is not None:
            return self._reference, own
        if "params" in state.params:
            raise ValueError(
                "without a reference only adapters may be trained, or there would be none: "
                "give a reference, or set trainable to match the lora collection only"
            )
        return {"params": state.frozen["params"]}, own

    def calls(self, state: TrainState, batch: Mapping[str, Any]) -> list[Call]:
        """The programs of a step in order, with abstract arguments; reshard if weights move.

        state: TrainState.abstract. batch: query float32[P, L], query_len int32[P], abstract.
        """
        variables = state.variables
        calls = self._responder.calls(variables, self._frontend, batch, params=state.params)
        by_name = {call.name: call for call in calls}
        prompt, answers = by_name["hear"].outputs(), by_name["speak"].outputs()
        sampled = by_name["speak"].args[1]
        reward = Call(self._reward, (self._reward_variables, batch, sampled, answers))
        reference = Call(self._compare, (*self._compared(state), prompt, sampled))
        experience = rollout.Experience(prompt, *reference.outputs(), reward.outputs()[0])
        return [*calls, reward, reference, Call(self._update, (state, experience))]

    def _word_error_rate(self, spoken: rollout.Spoken) -> float:
        """Word error rate of the audited answers against their own text streams."""
        written = texts_of(self._policy, spoken.rollout, self._audit.tokenizer)
        waves, lens = jax.device_get((spoken.answers.waves, spoken.answers.lens))
        length = waves.shape[-1]
        clips = zip(waves.reshape(-1, length), lens.ravel(), strict=True)
        heard = self._audit.hear([wave[:size] for wave, size in clips])
        return rollout.word_error_rate([text for group in written for text in group], heard)


def train(
    policy: SpeechPolicy,
    variables: Mapping[str, Any],
    reference: Mapping[str, Any] | None,
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
    held_out: HeldOut | None = None,
    layouts: Layouts = ONE_DEVICE_LAYOUTS,
    rollout_dtype: Any = None,
    checkpointer: Checkpointer | None = None,
    save_every: int = 20,
    writer: MetricWriter | None = None,
    log_every: int = 1,
    label: str = "grpo",
    max_skipped: int = 5,
    monitor: Monitor | None = None,
) -> dict[str, Any]:
    """Reinforces the variables that match `trainable`; resumes where it stopped.

    Args:
        variables: of policy.model to start from; not consumed.
        reference: of policy.model, frozen: the SFT policy; None if only adapters are trained.
        reward_variables: where layouts.train wants them; what is on no mesh goes everywhere.
        batches: repeating, with the audio key "query"; batch_size is P.
        optimizer: takes num_epochs steps per rollout.
        layouts, rollout_dtype: see GrpoUpdate.

    Returns:
        all variables after `num_steps` rollouts.
    """
    layout, boxed = layouts.train, policy.boxed()
    if reference is not None:
        reference = layout.place(reference, {kind: boxed[kind] for kind in reference})
    variables = layout.place(variables, boxed)
    state = TrainState.create(variables, optimizer, rng, trainable=trainable)
    # The state has its own copy of what is trained; the other would only take room.
    del variables
    update = GrpoUpdate(
        policy,
        reference,
        layout.place(frontend, policy.boxed_frontend(frontend)),
        reward_fn,
        layout.replicate_rest(reward_variables),
        optimizer,
        settings,
        layouts=layouts,
        rollout_dtype=rollout_dtype,
        audit=audit,
        held_out=held_out,
    )

    def place(batch):
        arrays = {key: batch[key] for key in ("query", "query_len")}
        return layout.place_batch(arrays, settings.group_size)

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
        make_batch=place,
        max_skipped=max_skipped,
        monitor=monitor,
    )
    return state.variables
