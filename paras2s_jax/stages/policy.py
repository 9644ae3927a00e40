"""Stages that train the policy: base, sft, sft_5x, grpo."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from paras2s_jax.align import grpo, pairs, retention, sft
from paras2s_jax.align.policy import SpeechPolicy
from paras2s_jax.align.rewards import make_reward_fn
from paras2s_jax.convert import kimi_audio
from paras2s_jax.data import records
from paras2s_jax.data.batches import Batches, validate
from paras2s_jax.data.records import Query, Response
from paras2s_jax.data.synthesize import select_demonstrations
from paras2s_jax.data.tokenizer import Tokenizer
from paras2s_jax.judge import transcribe
from paras2s_jax.models.lora import NO_LORA
from paras2s_jax.stages.assembly import POLICY, Assembly, assemble, policy_folder
from paras2s_jax.stages.health import make_health, make_held_out
from paras2s_jax.stages.registry import StageError
from paras2s_jax.stages.reward_model import load_reward_model
from paras2s_jax.stages.speech import BASE_FILE, data_dir, parts_dir, queries_of, speech_dir
from paras2s_jax.train.checkpoint import Checkpointer, load_part, save_part
from paras2s_jax.train.metrics import MetricWriter
from paras2s_jax.train.optimizer import make_optimizer
from paras2s_jax.train.sharding import Layout

DEMONSTRATIONS, NEUTRAL = "demonstrations.jsonl", "neutral.jsonl"


def init_policy(policy: SpeechPolicy, seed: int) -> dict[str, Any]:
    """Fresh variables of the policy's model."""
    init = functools.partial(kimi_audio.init, policy.model)
    return nn.unbox(jax.jit(init)(jax.random.key(seed)))


def _rows(queries: Sequence[Query], responses: Sequence[Response], root: Path, tokenizer):
    rows, base = pairs.pair_rows(queries, root, responses, root)
    return sft.tokenize_rows(rows, tokenizer), base


def demonstration_batches(
    rows: Sequence[dict],
    root: Path,
    section: ConfigDict,
    seed: int,
    layout: Layout,
    *,
    one_pass: bool = False,
) -> Batches:
    """tf.data batches of demonstrations; every file is checked first."""
    return Batches(
        _checked(rows, root, sft.AUDIO_KEYS, section.max_bad_share),
        root=root,
        audio_keys=sft.AUDIO_KEYS,
        token_keys=sft.TOKEN_KEYS,
        batch_size=section.batch_size,
        len_buckets_s=tuple(section.len_buckets_s),
        token_buckets=tuple(section.token_buckets),
        local_rows=layout.local_rows(section.batch_size),
        seed=seed,
        shuffle=not one_pass,
        repeat=not one_pass,
    )


def _checked(
    rows: Sequence[dict], root: Path, audio_keys: Sequence[str], max_bad_share: float
) -> list[dict]:
    """The rows whose files can be heard; the others are named."""
    good, problems = validate(rows, root, audio_keys, max_bad_share=max_bad_share)
    for problem in problems:
        print(f"left out: {problem}")
    return good


def checkpointer_of(section: ConfigDict, folder: Path) -> Checkpointer:
    """Checkpoints of a run, kept as its section says."""
    return Checkpointer(folder / "checkpoints", section.keep, section.keep_every)


def optimizer_of(section: ConfigDict, updates_per_step: int = 1):
    """AdamW with the schedule of a config section."""
    return make_optimizer(
        section.lr,
        warmup_steps=section.warmup_steps,
        total_steps=section.num_steps * updates_per_step,
        weight_decay=section.weight_decay,
        schedule=section.schedule,
    )


def _train_sft(
    config: ConfigDict,
    section: ConfigDict,
    made: Assembly,
    start: Callable[[], dict[str, Any]],
    batches: Batches,
    folder: Path,
) -> dict[str, Any]:
    """start: makes the variables to start from. Nobody holds on to them: training has a copy."""
    return sft.train(
        made.policy,
        start(),
        made.frontend,
        batches,
        optimizer=optimizer_of(section),
        num_steps=section.num_steps,
        rng=jax.random.key(config.seed),
        trainable=made.trainable,
        accum_steps=section.accum_steps,
        layout=made.layouts.train,
        checkpointer=checkpointer_of(section, folder),
        save_every=section.save_every,
        max_skipped=section.max_skipped,
        writer=MetricWriter(folder),
        label=folder.name,
    )


def neutral_rows(root: Path, split: str, tokenizer: Tokenizer) -> tuple[list[dict], Path]:
    """Neutral dialogues of a split as demonstrations. root: of neutral.jsonl and its answers."""
    queries = [q for q in records.read_jsonl(root / NEUTRAL, Query) if q.split == split]
    names = {query.id for query in queries}
    answers = records.read_jsonl(root / "neutral_answers.jsonl", Response)
    return _rows(queries, [a for a in answers if a.query_id in names], root, tokenizer)


def _neutral_batches(config: ConfigDict, workdir: Path, made: Assembly) -> list[dict]:
    """Test dialogues to measure likelihood on; none where a user's data has no neutral ones."""
    root = data_dir(config, workdir)
    if config.data.folder and not (root / NEUTRAL).is_file():
        return []
    rows, base = neutral_rows(root, "test", made.tokenizer)
    return list(demonstration_batches(rows, base, config.sft, 0, made.layouts.train, one_pass=True))


def _neutral_nll(config: ConfigDict, workdir: Path, made: Assembly, variables, name: str):
    batches = _neutral_batches(config, workdir, made)
    if not batches:
        return {}
    found = sft.evaluate(made.policy, variables, made.frontend, batches, layout=made.layouts.train)
    return {f"{name}/neutral_nll": found["nll"]}


def run_base(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """The tone-deaf base policy: fluent in every manner of answering, and deaf to the speaker's.

    It practises each train query with the same number of answers to its own style and to the other
    one, and with a bland one: how the query sounds tells nothing about how it is answered.

    Raises:
        StageError: the config takes a released policy, which is trained already.
    """
    if config.policy.checkpoint:
        raise StageError(
            f"the base is {config.policy.checkpoint} (policy.checkpoint): start with the stage sft."
        )
    made, folder = _without_adapters(assemble(config, workdir)), workdir / "base"
    if config.pretrain.source == "train":
        root = speech_dir(workdir)
        queries = queries_of(root, "train")
        styled = records.read_jsonl(root / DEMONSTRATIONS, Response)
        answers = records.read_jsonl(root / "bland.jsonl", Response) + styled
        answers += pairs.in_other_style(queries, styled, config.seed)
        rows, base = _rows(queries, answers, root, made.tokenizer)
        rows += neutral_rows(root, "train", made.tokenizer)[0] * config.base.neutral_repeats
        batches = demonstration_batches(rows, base, config.base, config.seed, made.layouts.train)
        start = functools.partial(init_policy, made.policy, config.seed)
        variables = _train_sft(config, config.base, made, start, batches, folder)
        save_part(folder / BASE_FILE, variables, {}, "float16")
    # From the file in both cases: what is shipped is what was measured.
    source = folder if config.pretrain.source == "train" else parts_dir(config, workdir)
    variables, _ = load_part(source / BASE_FILE, "float32")
    made.save(folder / POLICY, variables)
    return _neutral_nll(config, workdir, made, variables, "base")


def _without_adapters(made: Assembly) -> Assembly:
    policy = dataclasses.replace(made.policy, model=made.policy.model.clone(lora=NO_LORA))
    return dataclasses.replace(made, policy=policy, trainable="")


def _run_sft(config: ConfigDict, workdir: Path, name: str) -> dict[str, float]:
    made, section = assemble(config, workdir), config[name]
    rows, base = _demonstrations(config, workdir, section.num_demonstrations, made.tokenizer)
    batches = demonstration_batches(rows, base, section, config.seed, made.layouts.train)
    base_folder = policy_folder(config, workdir, "base")
    start = functools.partial(made.load, base_folder, config.seed)
    variables = _train_sft(config, section, made, start, batches, workdir / name)
    made.save(workdir / name / POLICY, variables)
    figures = {f"{name}/demonstrations": len(rows)}
    return figures | _neutral_nll(config, workdir, made, variables, name)


def _demonstrations(
    config: ConfigDict, workdir: Path, count: int, tokenizer: Tokenizer
) -> tuple[list[dict], Path]:
    """Rows of so many demonstrated answers, even over styles and sentences; and their root."""
    root = data_dir(config, workdir)
    answers = records.read_jsonl(root / DEMONSTRATIONS, Response)
    answered = {answer.query_id for answer in answers}
    train = [query for query in queries_of(root, "train") if query.id in answered]
    if count > len(train):
        raise StageError(
            f"{root / DEMONSTRATIONS} answers {len(train)} train queries, of which "
            f"num_demonstrations asks for {count}: lower it, or add answers."
        )
    chosen = {query.id for query in select_demonstrations(train, count, config.seed)}
    return _rows(train, [a for a in answers if a.query_id in chosen], root, tokenizer)


def run_sft(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """Warm-up on few demonstrations: the base learns that style matters."""
    return _run_sft(config, workdir, "sft")


def run_sft_5x(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """The same on five times the demonstrations: what RL is to be compared with."""
    return _run_sft(config, workdir, "sft_5x")


def run_grpo(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """Both token streams are reinforced by the reward model, near the SFT policy."""
    return _train_grpo(config, workdir, workdir / "grpo", config.grpo.beta)


def run_retention(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """GRPO at other weights of the KL term: what becomes of neutral dialogue without it."""
    figures = {}
    for beta in config.retention.betas:
        figures |= _train_grpo(config, workdir, workdir / "retention" / f"beta_{beta}", beta)
    return figures


def _train_grpo(config: ConfigDict, workdir: Path, folder: Path, beta: float) -> dict[str, float]:
    c = config.grpo
    made = assemble(config, workdir)
    reward_model, reward_variables = load_reward_model(config, workdir, made.layouts)
    # Where adapters alone are trained, policy and reference share the parameters. The start is
    # handed over: training has a copy of what it changes.
    start = [made.load(policy_folder(config, workdir, "sft"), config.seed)]
    reference = made.frozen(start[0])
    fields = {field.name for field in dataclasses.fields(grpo.Settings)} - {"beta"}
    variables = grpo.train(
        made.policy,
        start.pop(),
        reference,
        made.frontend,
        make_reward_fn(reward_model),
        reward_variables,
        _query_batches(config, workdir, made.layouts.train),
        optimizer=optimizer_of(c, c.num_epochs),
        settings=grpo.Settings(beta=beta, **{k: v for k, v in c.items() if k in fields}),
        num_steps=c.num_steps,
        rng=jax.random.key(config.seed),
        trainable=made.trainable,
        audit=_audit(config, workdir, made),
        layouts=made.layouts,
        rollout_dtype=jnp.dtype(config.policy.dtype),
        held_out=make_held_out(config, workdir, folder, made, reward_model, reward_variables),
        monitor=make_health(config, folder),
        checkpointer=checkpointer_of(c, folder),
        save_every=c.save_every,
        max_skipped=c.max_skipped,
        writer=MetricWriter(folder),
        label=folder.name,
    )
    made.save(folder / POLICY, variables)
    batches = _neutral_batches(config, workdir, made)
    if not batches:
        return {}
    kept = retention.nll_growth(
        made.policy, reference, variables, made.frontend, batches, layout=made.layouts.train
    )
    return {f"retention/{beta:g}/{name}": value for name, value in kept.items()}


def _query_batches(config: ConfigDict, workdir: Path, layout: Layout) -> Batches:
    """All train queries as RL hears them: speech, neither words nor labels."""
    c, root = config.grpo, data_dir(config, workdir)
    rows = pairs.query_rows(queries_of(root, "train"))
    return Batches(
        _checked(rows, root, grpo.AUDIO_KEYS, c.max_bad_share),
        root=root,
        audio_keys=grpo.AUDIO_KEYS,
        batch_size=c.num_prompts,
        len_buckets_s=tuple(c.len_buckets_s),
        local_rows=layout.local_rows(c.num_prompts),
        seed=config.seed,
        shuffle=True,
        repeat=True,
    )


def _audit(config: ConfigDict, workdir: Path, made: Assembly) -> grpo.Audit | None:
    """The recogniser that checks during RL that answers say what their text stream says, if any."""
    if not config.grpo.audit_every:
        return None
    listener = transcribe.WhisperTranscriber.load(
        parts_dir(config, workdir), batch_size=config.judge.batch_size
    )

    def hear(waves):
        return [found.text for found in listener.transcribe(waves)]

    c = config.grpo
    return grpo.Audit(hear, made.tokenizer, every=c.audit_every, num_prompts=c.audit_prompts)
