"""Supervised warm-up: next-token cross-entropy of demonstrated answers on both streams."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from paras2s_jax.align import losses
from paras2s_jax.align.phases import Call
from paras2s_jax.align.policy import Frontend, SpeechPolicy, masks_of
from paras2s_jax.data.tokenizer import Tokenizer
from paras2s_jax.train.checkpoint import Checkpointer
from paras2s_jax.train.loop import Source, fit
from paras2s_jax.train.metrics import MetricWriter
from paras2s_jax.train.sharding import ONE_DEVICE, Layout, Program
from paras2s_jax.train.state import TrainState
from paras2s_jax.train.step import Sums, make_update

AUDIO_KEYS = ("query", "answer")
TOKEN_KEYS = ("text_ids",)


def tokenize_rows(rows: Iterable[dict], tokenizer: Tokenizer) -> list[dict]:
    """Adds `text_ids` to the rows of `pairs.pair_rows`: feed them with AUDIO_KEYS, TOKEN_KEYS."""
    return [row | {"text_ids": tokenizer.encode(row["text"])} for row in rows]


def make_prepare(policy: SpeechPolicy, layout: Layout = ONE_DEVICE) -> Program:
    """(frontend, batch with the keys query, answer and text_ids, each with `_len`) -> model inputs.

    Returns: {"prompt": Prompt of B rows, "streams": of [B, 1, R]}. The front end is frozen, so it
    runs once per batch, outside gradients and accumulation.
    """

    def prepare(frontend, batch):
        prompt = policy.prompt(frontend, batch["query"], batch["query_len"])
        streams = policy.demonstration(
            frontend, batch["answer"], batch["answer_len"], batch["text_ids"], batch["text_ids_len"]
        )
        return {"prompt": prompt, "streams": streams}

    return Program("prepare", prepare, layout, place=layout.rows)


def _make_batch(
    policy: SpeechPolicy, frontend: Frontend, layout: Layout
) -> Callable[[Mapping[str, np.ndarray]], Any]:
    """From a numpy batch to model inputs."""
    prepare = make_prepare(policy, layout)
    frontend = layout.place(frontend, policy.boxed_frontend(frontend))

    def make(batch):
        keys = [*AUDIO_KEYS, *TOKEN_KEYS]
        arrays = {name: batch[name] for key in keys for name in (key, f"{key}_len")}
        return prepare(frontend, layout.place_batch(arrays))

    return make


def calls(
    policy: SpeechPolicy,
    frontend: Any,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Mapping[str, Any],
    *,
    accum_steps: int = 1,
    layout: Layout = ONE_DEVICE,
) -> list[Call]:
    """The programs of a step, prepare and update, with abstract arguments; what `train` runs.

    frontend: as layout.abstract(policy.boxed_frontend(…)). state: TrainState.abstract. batch:
    query, answer: float32[B, L], text_ids: int32[B, T], and their `_len`: int32[B].
    """
    prepare = Call(make_prepare(policy, layout), (frontend, batch))
    update = make_update(make_loss(policy), optimizer, accum_steps=accum_steps, layout=layout)
    return [prepare, Call(update, (state, prepare.outputs()))]


def make_loss(policy: SpeechPolicy):
    """`loss_fn(variables, batch, rng) -> Sums` of what `make_prepare` makes."""

    def loss_fn(variables, batch, rng):
        del rng
        out = policy.logp(variables, batch["prompt"], batch["streams"], at_temperature=False)
        return Sums(*losses.stream_cross_entropy(out["logp"], masks_of(batch["streams"])))

    return loss_fn


def train(
    policy: SpeechPolicy,
    variables: Mapping[str, Any],
    frontend: Frontend,
    batches: Source,
    *,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    rng: jax.Array,
    trainable: str = "",
    accum_steps: int = 1,
    layout: Layout = ONE_DEVICE,
    checkpointer: Checkpointer | None = None,
    save_every: int = 100,
    writer: MetricWriter | None = None,
    log_every: int = 10,
    label: str = "sft",
    max_skipped: int = 5,
) -> dict[str, Any]:
    """Trains the variables that match `trainable` on demonstrations; resumes where it stopped.

    Args:
        variables: of policy.model; not consumed.
        batches: repeating, with AUDIO_KEYS and TOKEN_KEYS.

    Returns:
        all variables after `num_steps`.
    """
    variables = layout.place(variables, policy.boxed())
    state = TrainState.create(variables, optimizer, rng, trainable=trainable)
    # The state has its own copy of what is trained; the other would only take room.
    del variables
    update = make_update(make_loss(policy), optimizer, accum_steps=accum_steps, layout=layout)
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
        make_batch=_make_batch(policy, frontend, layout),
        max_skipped=max_skipped,
    )
    return state.variables


def evaluate(
    policy: SpeechPolicy,
    variables: Mapping[str, Any],
    frontend: Frontend,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    layout: Layout = ONE_DEVICE,
) -> dict[str, float]:
    """Mean negative log-likelihood per chosen token of demonstrations.

    Args:
        batches: one pass (repeat=False), with AUDIO_KEYS and TOKEN_KEYS.

    Returns:
        {"nll", "nll/text", "nll/audio"} in nats; rows with `valid` False do not count.
    """
    prepare = _make_batch(policy, frontend, layout)
    variables = layout.place(variables, policy.boxed())

    def sums_of(variables, inputs, valid):
        streams = inputs["streams"]
        out = policy.logp(variables, inputs["prompt"], streams, at_temperature=False)
        masks = {name: mask & valid[:, None, None] for name, mask in masks_of(streams).items()}
        loss_sum, weight, shown = losses.stream_cross_entropy(out["logp"], masks)
        return shown | {"nll": (loss_sum, weight)}

    program = Program("likelihood", sums_of, layout)
    totals: dict[str, np.ndarray] = {}
    for batch in batches:
        valid = layout.place_batch({"valid": batch["valid"]})["valid"]
        found = jax.device_get(program(variables, prepare(batch), valid))
        for name, pair in found.items():
            totals[name] = totals.get(name, np.zeros(2)) + np.asarray(pair, np.float64)
    return {name: float(total / weight) for name, (total, weight) in totals.items()}
