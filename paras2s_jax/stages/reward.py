"""Stage distill: the judge's verdicts on sampled answers become a fast reward model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from paras2s_jax.align import distill, pairs
from paras2s_jax.align.samples import judge_samples, sample
from paras2s_jax.data.batches import Batches
from paras2s_jax.data.records import Query, Response, Verdict, read_jsonl
from paras2s_jax.models.sampling import Sampling
from paras2s_jax.stages.assembly import Assembly, assemble, folder_digest, policy_folder
from paras2s_jax.stages.judging import given_verdicts, is_told_styles, make_judge
from paras2s_jax.stages.policy import checkpointer_of, optimizer_of
from paras2s_jax.stages.reward_model import REWARD_MODEL, make_reward_model, save_reward_model
from paras2s_jax.stages.speech import data_dir, queries_of
from paras2s_jax.train import distributed
from paras2s_jax.train.metrics import MetricWriter
from paras2s_jax.train.sharding import Layout


def run_distill(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """Samples of the SFT policy -> verdicts -> reward model, tested on held-out sentences."""
    c, folder, root = config.distill, workdir / "distill", data_dir(config, workdir)
    made = assemble(config, workdir)
    everything = queries_of(root, "train")
    responses = _sample(config, workdir, made, everything)
    answers, verdicts = _judge(config, workdir, everything, responses)
    rows, base, num_left_out = distill.scored_rows(
        everything, root, answers, folder / "samples", verdicts
    )
    own = verdicts[: len(responses)]
    train_rows, test_rows = distill.hold_out(rows, c.held_out_share)
    # The policy's weights are no longer needed where the reward model's are about to be.
    layouts = made.layouts
    del made
    reward_model, start = make_reward_model(config, workdir, layouts)
    trained = distill.train(
        reward_model,
        start,
        _batches(train_rows, base, c, config.seed, layouts.train),
        optimizer=optimizer_of(c),
        num_steps=c.num_steps,
        rng=jax.random.key(config.seed),
        trainable=c.trainable,
        findings_weight=c.findings_weight,
        accum_steps=c.accum_steps,
        layout=layouts.train,
        checkpointer=checkpointer_of(c, folder),
        save_every=c.save_every,
        max_skipped=c.max_skipped,
        writer=MetricWriter(folder),
    )
    save_reward_model(config, reward_model, trained, folder / REWARD_MODEL)
    predicted = distill.predict(
        reward_model,
        trained,
        _batches(test_rows, base, c, 0, layouts.train, one_pass=True),
        len(test_rows),
        layouts.train,
    )
    judged = np.array([row["score"] for row in test_rows], np.float32)
    names = [row["query_id"] for row in test_rows]
    figures = distill.agreement(predicted, judged, names)
    return {f"reward/{name}": value for name, value in figures.items()} | {
        "reward/judged_mean": float(np.nanmean([verdict.score for verdict in own])),
        "reward/judged_std": float(np.nanstd([verdict.score for verdict in own])),
        "reward/held_out_answers": len(test_rows),
        "reward/unscored": num_left_out,
    }


def _sample(
    config: ConfigDict, workdir: Path, made: Assembly, queries: Sequence[Query]
) -> list[Response]:
    """Answers of the SFT policy to some of the queries."""
    c, source = config.distill, policy_folder(config, workdir, "sft")
    policy = dataclasses.replace(
        made.policy, text=Sampling(**c.text_sampling), audio=Sampling(**c.audio_sampling)
    )
    return sample(
        policy,
        made.load(source),
        made.frontend,
        made.tokenizer,
        _some_of(queries, c.num_queries, config.seed),
        data_dir(config, workdir),
        workdir / "distill" / "samples",
        num_samples=c.num_samples,
        batch_size=c.sample_batch_size,
        len_buckets_s=tuple(c.len_buckets_s),
        seed=config.seed,
        version=folder_digest(source),
        layouts=made.layouts,
        dtype=jnp.dtype(config.policy.dtype),
    )


def _judge(
    config: ConfigDict, workdir: Path, queries: Sequence[Query], responses: list[Response]
) -> tuple[list[Response], list[Verdict]]:
    """The answers to train on, the given ones first, and a verdict on each."""
    c, samples = config.distill, workdir / "distill" / "samples"
    if c.verdicts:
        given = given_verdicts(Path(c.verdicts), responses, samples / "responses.jsonl")
        return responses, given
    answers = responses
    if c.swap_styles:
        # The judge has heard every wav of the second half in the first.
        answers = responses + pairs.in_other_style(queries, responses, config.seed)

    def judge() -> None:
        chain, root = make_judge(config, workdir), data_dir(config, workdir)
        judge_them = functools.partial(chain.judge, use_labels=is_told_styles(config))
        judge_samples(judge_them, queries, root, answers, samples)

    distributed.on_main("verdicts", judge)
    return answers, read_jsonl(samples / "verdicts.jsonl", Verdict)


def _some_of(queries: Sequence[Query], count: int, seed: int) -> list[Query]:
    """A random choice of the queries, in their order."""
    picked = np.random.default_rng(seed).permutation(len(queries))[:count]
    return [queries[i] for i in sorted(picked)]


def _batches(
    rows: Sequence[dict],
    root: Path,
    c: ConfigDict,
    seed: int,
    layout: Layout,
    *,
    one_pass: bool = False,
) -> Batches:
    return Batches(
        rows,
        root=root,
        audio_keys=distill.AUDIO_KEYS,
        scalar_keys=() if one_pass else distill.SCALAR_KEYS,
        batch_size=c.batch_size,
        len_buckets_s=tuple(c.pair_buckets_s),
        local_rows=layout.local_rows(c.batch_size),
        seed=seed,
        shuffle=not one_pass,
        repeat=not one_pass,
    )
