"""Stage distill: the judge's verdicts on sampled answers become a fast reward model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from paras2s_jax.align import distill, pairs
from paras2s_jax.align.rewards import RewardModel, score_prompt
from paras2s_jax.convert.stored import load_params, save_params
from paras2s_jax.data.batches import Batches
from paras2s_jax.data.records import Query
from paras2s_jax.data.tokenizer import TextTokenizer
from paras2s_jax.judge.ledger import params_digest
from paras2s_jax.models.lora import LoRA
from paras2s_jax.models.qwen2 import Qwen2Config
from paras2s_jax.models.qwen2_5_omni import (
    OmniAudioConfig,
    Qwen2_5OmniConfig,
    Qwen2_5OmniThinker,
)
from paras2s_jax.models.qwen2_audio import Qwen2Audio, Qwen2AudioConfig
from paras2s_jax.models.sampling import Sampling
from paras2s_jax.stages.judging import make_judge
from paras2s_jax.stages.policy import assemble, layouts_of, optimizer_of, policy_params
from paras2s_jax.stages.speech import TEXT_FILE, asr_encoder, parts_dir, queries_of, speech_dir
from paras2s_jax.train.checkpoint import Checkpointer
from paras2s_jax.train.metrics import MetricWriter


def make_reward_model(config: ConfigDict, workdir: Path) -> tuple[RewardModel, dict[str, Any]]:
    """The reward model of the config and its variables before distillation."""
    c = config.distill.model
    tokenizer = TextTokenizer.load(parts_dir(config, workdir) / TEXT_FILE)
    whisper, encoder = asr_encoder(config, workdir)
    text, slot = Qwen2Config(tokenizer.vocab_size + 1, **c.text), tokenizer.vocab_size
    if c.family == "qwen2_audio":
        model = Qwen2Audio(Qwen2AudioConfig(whisper, text, slot))
    elif c.family == "qwen2_5_omni":
        audio = OmniAudioConfig(
            **dataclasses.asdict(whisper), n_window=c.n_window, output_dim=text.hidden_size
        )
        model = Qwen2_5OmniThinker(Qwen2_5OmniConfig(audio, text, slot))
        encoder = {name: encoder[name] for name in ("conv1", "conv2", "layers")} | {
            "ln_post": encoder["layer_norm"]
        }
    else:
        raise ValueError(
            f"distill.model.family is {c.family!r}; choose qwen2_audio or qwen2_5_omni"
        )
    model = model.clone(
        lora=LoRA(c.lora_rank, c.lora_alpha),
        audio_lora=LoRA(c.audio_lora_rank, c.lora_alpha, tuple(c.audio_lora_targets)),
        scan_unroll=c.scan_unroll,
    )
    reward_model = RewardModel(model, score_prompt(tokenizer))
    return reward_model, reward_model.init(jax.random.key(config.seed), encoder)


def load_reward_model(config: ConfigDict, workdir: Path) -> tuple[RewardModel, dict[str, Any]]:
    """The reward model that `distill` left."""
    reward_model, _ = make_reward_model(config, workdir)
    return reward_model, load_params(workdir / "distill" / "params")[0]


def run_distill(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """Samples of the SFT policy -> verdicts -> reward model, tested on held-out sentences."""
    c, folder, root = config.distill, workdir / "distill", speech_dir(workdir)
    made = assemble(config, workdir)
    everything = queries_of(workdir, "train")
    queries = _some_of(everything, c.num_queries, config.seed)
    variables = policy_params(workdir, "sft")
    policy = dataclasses.replace(
        made.policy, text=Sampling(**c.text_sampling), audio=Sampling(**c.audio_sampling)
    )
    responses = distill.sample(
        policy,
        variables,
        made.frontend,
        made.tokenizer,
        queries,
        root,
        folder / "samples",
        num_samples=c.num_samples,
        batch_size=c.sample_batch_size,
        len_buckets_s=tuple(c.len_buckets_s),
        seed=config.seed,
        version=params_digest(variables),
    )
    judge = make_judge(config, workdir)
    # The judge has heard every wav of the second half in the first.
    answers = responses + pairs.in_other_style(everything, responses, config.seed)
    verdicts = distill.judge_samples(judge.judge, everything, root, answers, folder / "samples")
    rows, base, num_left_out = distill.scored_rows(
        everything, root, answers, folder / "samples", verdicts
    )
    own = verdicts[: len(responses)]
    train_rows, test_rows = distill.hold_out(rows, c.held_out_share)
    reward_model, start = make_reward_model(config, workdir)
    trained = distill.train(
        reward_model,
        start,
        _batches(train_rows, base, c, config.seed),
        optimizer=optimizer_of(c),
        num_steps=c.num_steps,
        rng=jax.random.key(config.seed),
        trainable=c.trainable,
        findings_weight=c.findings_weight,
        accum_steps=c.accum_steps,
        layout=layouts_of(config).train,
        checkpointer=Checkpointer(folder / "checkpoints"),
        save_every=c.save_every,
        writer=MetricWriter(folder),
    )
    save_params(folder / "params", trained, {})
    predicted = distill.predict(
        reward_model, trained, _batches(test_rows, base, c, 0, one_pass=True), len(test_rows)
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


def _some_of(queries: Sequence[Query], count: int, seed: int) -> list[Query]:
    """A random choice of the queries, in their order."""
    picked = np.random.default_rng(seed).permutation(len(queries))[:count]
    return [queries[i] for i in sorted(picked)]


def _batches(rows, root: Path, c: ConfigDict, seed: int, *, one_pass: bool = False) -> Batches:
    return Batches(
        rows,
        root=root,
        audio_keys=distill.AUDIO_KEYS,
        scalar_keys=() if one_pass else distill.SCALAR_KEYS,
        batch_size=c.batch_size,
        len_buckets_s=tuple(c.pair_buckets_s),
        seed=seed,
        shuffle=not one_pass,
        repeat=not one_pass,
    )
