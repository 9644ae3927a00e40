"""Supervised warm-up: next-token cross-entropy of demonstrated answers on both streams."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from paras2s_jax.align import losses
from paras2s_jax.align.policy import Frontend, SpeechPolicy, masks_of, on_mesh, spread
from paras2s_jax.data.tokenizer import TextTokenizer
from paras2s_jax.train import sharding
from paras2s_jax.train.checkpoint import Checkpointer
from paras2s_jax.train.loop import Source, fit
from paras2s_jax.train.metrics import MetricWriter
from paras2s_jax.train.state import TrainState
from paras2s_jax.train.step import Sums, make_update

AUDIO_KEYS = ("query", "answer")
TOKEN_KEYS = ("text_ids",)


def tokenize_rows(rows: Iterable[dict], tokenizer: TextTokenizer) -> list[dict]:
    """Adds `text_ids` to the rows of `pairs.pair_rows`: feed them with AUDIO_KEYS, TOKEN_KEYS."""
    return [row | {"text_ids": tokenizer.encode(row["text"])} for row in rows]


def make_prepare(policy: SpeechPolicy, frontend: Frontend, mesh: Mesh | None = None):
    """From a numpy batch (keys query, answer, text_ids, each with `_len`) to model inputs.

    Returns: batch -> {"prompt": Prompt of B rows, "streams": of [B, 1, R]}, jitted. The front end
    is frozen, so it runs once per batch, outside gradients and accumulation.
    """

    frontend = on_mesh(frontend, mesh)

    @jax.jit
    def prepare(frontend, batch):
        prompt = policy.prompt(frontend, batch["query"], batch["query_len"])
        streams = policy.demonstration(
            frontend, batch["answer"], batch["answer_len"], batch["text_ids"], batch["text_ids_len"]
        )
        return spread({"prompt": prompt, "streams": streams}, mesh)

    def place(batch: Mapping[str, np.ndarray]):
        keys = [*AUDIO_KEYS, *TOKEN_KEYS]
        arrays = {name: batch[name] for key in keys for name in (key, f"{key}_len")}
        if mesh is not None:
            arrays = sharding.shard_batch(arrays, mesh)
        return prepare(frontend, arrays)

    return place


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
    mesh: Mesh | None = None,
    checkpointer: Checkpointer | None = None,
    save_every: int = 100,
    writer: MetricWriter | None = None,
    log_every: int = 10,
    label: str = "sft",
) -> dict[str, Any]:
    """Trains the variables that match `trainable` on demonstrations; resumes where it stopped.

    Args:
        variables: of policy.model, on `mesh` if there is one; not consumed.
        batches: repeating, with AUDIO_KEYS and TOKEN_KEYS.

    Returns:
        all variables after `num_steps`.
    """
    state = TrainState.create(variables, optimizer, rng, trainable=trainable)
    update = make_update(make_loss(policy), optimizer, accum_steps=accum_steps)
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
        make_batch=make_prepare(policy, frontend, mesh),
    )
    return state.variables


def evaluate(
    policy: SpeechPolicy,
    variables: Mapping[str, Any],
    frontend: Frontend,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """Mean negative log-likelihood per chosen token of demonstrations.

    Args:
        batches: one pass (repeat=False), with AUDIO_KEYS and TOKEN_KEYS.

    Returns:
        {"nll", "nll/text", "nll/audio"} in nats; rows with `valid` False do not count.
    """
    prepare = make_prepare(policy, frontend, mesh)

    @jax.jit
    def sums_of(variables, inputs, valid):
        streams = inputs["streams"]
        out = policy.logp(variables, inputs["prompt"], streams, at_temperature=False)
        masks = {name: mask & valid[:, None, None] for name, mask in masks_of(streams).items()}
        loss_sum, weight, shown = losses.stream_cross_entropy(out["logp"], masks)
        return shown | {"nll": (loss_sum, weight)}

    totals: dict[str, np.ndarray] = {}
    for batch in batches:
        found = jax.device_get(sums_of(variables, prepare(batch), batch["valid"]))
        for name, pair in found.items():
            totals[name] = totals.get(name, np.zeros(2)) + np.asarray(pair, np.float64)
    return {name: float(total / weight) for name, (total, weight) in totals.items()}
