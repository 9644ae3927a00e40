"""How the health of GRPO is watched, from a config: alarms, and what the judge says meanwhile."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from paras2s_jax.align import distill, grpo, pairs
from paras2s_jax.align.health import Health, Limits
from paras2s_jax.align.rewards import RewardModel
from paras2s_jax.align.samples import judge_samples, sample
from paras2s_jax.data.batches import Batches
from paras2s_jax.data.records import Query, Response
from paras2s_jax.stages.assembly import Assembly
from paras2s_jax.stages.judging import make_judge
from paras2s_jax.stages.speech import data_dir, queries_of
from paras2s_jax.train import distributed


def make_health(config: ConfigDict, folder: Path) -> Health:
    """The alarms of a run whose files lie in `folder`."""
    fields = {field.name for field in dataclasses.fields(Limits)}
    values = {key: value for key, value in config.grpo.health.items() if key in fields}
    return Health(Limits(**values), folder)


def make_held_out(
    config: ConfigDict,
    workdir: Path,
    folder: Path,
    made: Assembly,
    reward_model: RewardModel,
    reward_variables: Any,
) -> grpo.HeldOut | None:
    """Reward minus verdict on sentences that the reward model was not trained on; None if off.

    The policy answers the same queries every time, into folder/held_out.
    """
    c = config.grpo.health
    if not c.gap_every:
        return None
    root, folder = data_dir(config, workdir), folder / "held_out"
    queries = _unseen(queries_of(root, "train"), config.distill.held_out_share, c.gap_queries)
    layout = made.layouts.train

    def gap(step: int, variables: Mapping[str, Any]) -> float:
        responses = sample(
            made.policy,
            variables,
            made.frontend,
            made.tokenizer,
            queries,
            root,
            folder,
            num_samples=1,
            batch_size=len(queries),
            len_buckets_s=tuple(config.grpo.len_buckets_s),
            seed=config.seed,
            version=f"step {step}",
            system="held_out",
            layouts=made.layouts,
            dtype=jnp.dtype(config.policy.dtype),
        )

        def judge() -> list[float]:
            chain = make_judge(config, workdir, progress=False)
            found = judge_samples(chain.judge, queries, root, responses, folder)
            return [verdict.score for verdict in found]

        verdicts = np.array(distributed.on_main("held out verdicts", judge))
        rewards = distill.predict(
            reward_model, reward_variables, _pairs(responses), len(responses), layout
        )
        return float(np.nanmean(rewards - verdicts))

    def _pairs(responses: list[Response]) -> Batches:
        rows, base = pairs.pair_rows(queries, root, responses, folder)
        return Batches(
            rows,
            root=base,
            audio_keys=distill.AUDIO_KEYS,
            batch_size=len(rows),
            len_buckets_s=tuple(config.distill.pair_buckets_s),
            local_rows=layout.local_rows(len(rows)),
        )

    return grpo.HeldOut(gap, every=c.gap_every)


def _unseen(queries: list[Query], share: float, count: int) -> list[Query]:
    """Queries of sentences that distillation held out, spread evenly over them."""
    rows = [{"sentence_id": query.sentence_id, "query": query} for query in queries]
    held_out = [row["query"] for row in distill.hold_out(rows, share)[1]]
    return held_out[:: max(1, len(held_out) // count)][:count]
