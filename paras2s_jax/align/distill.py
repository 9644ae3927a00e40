"""Distillation of the judge into the reward model (paper.md, section 3, step 2).

scored_rows, hold_out: judged answers (`samples.py`) -> rows; train: rows -> reward model; predict,
agreement: on queries that it never saw.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from paras2s_jax.align import rewards
from paras2s_jax.align.pairs import pair_rows
from paras2s_jax.align.phases import Call
from paras2s_jax.data.records import Query, Response, Verdict
from paras2s_jax.train import distributed
from paras2s_jax.train.checkpoint import Checkpointer
from paras2s_jax.train.loop import Source, fit
from paras2s_jax.train.metrics import MetricWriter
from paras2s_jax.train.sharding import ONE_DEVICE, Layout, Program
from paras2s_jax.train.state import TrainState
from paras2s_jax.train.step import Update, make_update

AUDIO_KEYS = ("query", "answer")
SCALAR_KEYS = ("score", "style", "tone")


def scored_rows(
    queries: Sequence[Query],
    queries_dir: Path,
    responses: Sequence[Response],
    responses_dir: Path,
    verdicts: Sequence[Verdict],
) -> tuple[list[dict], Path, int]:
    """Rows with a score for training: unscored verdicts and soundless answers are left out.

    responses and verdicts: in the same order.
    Returns: (rows as `pairs.pair_rows`, with `score` and the indices of the `style` and the `tone`
      that the judge heard; their root; how many were left out).
    """
    rows, root = pair_rows(queries, queries_dir, responses, responses_dir)
    kept = [
        row
        | {
            "score": verdict.score,
            "style": _index(verdict.style_in, rewards.STYLE_LABELS),
            "tone": _index(verdict.tone_out, rewards.TONE_LABELS),
        }
        for row, response, verdict in zip(rows, responses, verdicts, strict=True)
        if math.isfinite(verdict.score) and response.dur_s > 0
    ]
    return kept, root, len(rows) - len(kept)


def _index(label: str, labels: Sequence[str]) -> int:
    return labels.index(label) if label in labels else rewards.UNKNOWN


def hold_out(rows: Sequence[dict], share: float) -> tuple[list[dict], list[dict]]:
    """(training rows, held-out rows): all answers to a sentence, in all its styles, go together.

    The choice is a hash of the sentence's id, so that it survives more queries or samples.
    """

    def is_held_out(row):
        digest = hashlib.sha256(row["sentence_id"].encode()).digest()
        return int.from_bytes(digest[:4], "big") < share * 2**32

    held_out = [row for row in rows if is_held_out(row)]
    return [row for row in rows if not is_held_out(row)], held_out


def make_reward_update(
    reward_model: rewards.RewardModel,
    optimizer: optax.GradientTransformation,
    *,
    findings_weight: float = 0.0,
    accum_steps: int = 1,
    layout: Layout = ONE_DEVICE,
) -> Update:
    """The step of `train`, on batches of AUDIO_KEYS and SCALAR_KEYS."""
    loss_fn = rewards.make_loss(reward_model, findings_weight)
    return make_update(loss_fn, optimizer, accum_steps=accum_steps, layout=layout)


def calls(reward_model, optimizer, state: TrainState, batch, **settings: Any) -> list[Call]:
    """The program of a step, on abstract arguments; settings: of make_reward_update."""
    return [Call(make_reward_update(reward_model, optimizer, **settings), (state, batch))]


def train(
    reward_model: rewards.RewardModel,
    variables: Mapping[str, Any],
    batches: Source,
    *,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    rng: jax.Array,
    trainable: str = "lora|projector",
    findings_weight: float = 0.0,
    accum_steps: int = 1,
    layout: Layout = ONE_DEVICE,
    checkpointer: Checkpointer | None = None,
    save_every: int = 100,
    writer: MetricWriter | None = None,
    log_every: int = 10,
    label: str = "reward",
    max_skipped: int = 5,
) -> dict[str, Any]:
    """Trains the variables that match `trainable` on scores; resumes where it stopped.

    batches: repeating, with AUDIO_KEYS and SCALAR_KEYS.
    Returns: all variables after `num_steps`.
    """
    variables = layout.place(variables, reward_model.boxed())
    state = TrainState.create(variables, optimizer, rng, trainable=trainable)
    # The state has its own copy of what is trained; the other would only take room.
    del variables
    update = make_reward_update(
        reward_model,
        optimizer,
        findings_weight=findings_weight,
        accum_steps=accum_steps,
        layout=layout,
    )

    def place(batch):
        keys = [name for key in AUDIO_KEYS for name in (key, f"{key}_len")]
        return layout.place_batch({key: batch[key] for key in (*keys, *SCALAR_KEYS)})

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
    )
    return state.variables


def predict(
    reward_model: rewards.RewardModel,
    variables: Mapping[str, Any],
    batches: Iterable[Mapping[str, np.ndarray]],
    num_rows: int,
    layout: Layout = ONE_DEVICE,
) -> np.ndarray:
    """The reward model's score of every row. batches: one pass with AUDIO_KEYS.

    Returns: float32[num_rows], in the order of the rows.
    """
    score = Program("score", reward_model.score, layout)
    variables = layout.place(variables, reward_model.boxed())
    found = np.full(num_rows, np.nan, np.float32)
    for batch in batches:
        heard = {name: batch[name] for key in AUDIO_KEYS for name in (key, f"{key}_len")}
        heard = layout.place_batch(heard | {"row": batch["row"]})
        answers, lens = heard["answer"][:, None], heard["answer_len"][:, None]
        scores = score(variables, heard["query"], heard["query_len"], answers, lens)
        scores, row = distributed.gather((scores, heard["row"]))
        found[row[row >= 0]] = scores[row >= 0, 0]
    return found


def agreement(
    predicted: np.ndarray, judged: np.ndarray, query_ids: Sequence[str]
) -> dict[str, float]:
    """How far the reward model follows the judge.

    Returns: `pearson` over all answers; `pearson_within`, of what is left when each query's mean
    is taken out, which is all that group-normalised advantages see; `abs_error`.
    """
    _, group = np.unique(np.asarray(query_ids), return_inverse=True)
    sizes = np.bincount(group)

    def within(x):
        return x - (np.bincount(group, x) / sizes)[group]

    return {
        "pearson": _pearson(predicted, judged),
        "pearson_within": _pearson(within(predicted), within(judged)),
        "abs_error": float(np.abs(predicted - judged).mean()),
    }


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    """NaN where one of them does not vary."""
    a, b = (np.asarray(x, np.float64) - np.mean(x, dtype=np.float64) for x in (a, b))
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm > 0 else math.nan
