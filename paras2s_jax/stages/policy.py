"""Stages that train the policy: base, sft, sft_5x, grpo."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from paras2s_jax.align import grpo, pairs, retention, sft
from paras2s_jax.align.policy import Frontend, SpeechPolicy
from paras2s_jax.align.rewards import make_reward_fn
from paras2s_jax.convert import kimi_audio
from paras2s_jax.convert.stored import load_params, save_params
from paras2s_jax.data import records
from paras2s_jax.data.batches import Batches, validate
from paras2s_jax.data.records import Query, Response
from paras2s_jax.data.synthesize import select_demonstrations
from paras2s_jax.data.tokenizer import TextTokenizer
from paras2s_jax.judge import transcribe
from paras2s_jax.models.codec import KMeansCodec
from paras2s_jax.models.kimi_audio import KimiAudio, KimiAudioConfig
from paras2s_jax.models.sampling import Sampling
from paras2s_jax.models.whisper import WhisperEncoder
from paras2s_jax.models.whisper_layers import WhisperConfig
from paras2s_jax.stages.speech import (
    BASE_FILE,
    CODEC_FILE,
    TEXT_FILE,
    parts_dir,
    queries_of,
    speech_dir,
)
from paras2s_jax.train import sharding
from paras2s_jax.train.checkpoint import Checkpointer, load_part, save_part
from paras2s_jax.train.metrics import MetricWriter
from paras2s_jax.train.optimizer import make_optimizer


@dataclasses.dataclass(frozen=True)
class Assembly:
    """A policy with all that surrounds it."""

    policy: SpeechPolicy
    frontend: Frontend
    tokenizer: TextTokenizer


def assemble(config: ConfigDict, workdir: Path) -> Assembly:
    """Builds the policy of the config around the pretrained parts."""
    folder, c = parts_dir(config, workdir), config.policy
    variables, meta = load_part(folder / transcribe.MODEL_FILE, "float32")
    encoder = {"params": variables["params"]["encoder"]}
    codec = KMeansCodec.load(
        folder / CODEC_FILE, num_iters=c.griffin_lim_iters, rows_at_once=c.griffin_lim_rows
    )
    policy = SpeechPolicy(
        model=KimiAudio(KimiAudioConfig(**c.model), scan_unroll=c.scan_unroll, remat=c.remat),
        encoder=WhisperEncoder(WhisperConfig(**meta["config"]), scan_unroll=c.scan_unroll),
        max_steps=c.max_steps,
        text=Sampling(**c.text_sampling),
        audio=Sampling(**c.audio_sampling),
        logp_chunk=c.logp_chunk,
    )
    tokenizer = TextTokenizer.load(folder / TEXT_FILE)
    return Assembly(policy, Frontend(encoder, codec, codec), tokenizer)


def init_policy(policy: SpeechPolicy, seed: int) -> dict[str, Any]:
    """Fresh variables of the policy's model."""
    init = functools.partial(kimi_audio.init, policy.model)
    return nn.unbox(jax.jit(init)(jax.random.key(seed)))


def layouts_of(config: ConfigDict) -> sharding.Layouts:
    """Where training and decoding put their arrays; one device needs no mesh."""
    mesh, decode_mesh = config.mesh.to_dict(), config.decode_mesh.to_dict()
    if all(size == 1 for size in (*mesh.values(), *decode_mesh.values())):
        return sharding.Layouts()
    return sharding.make_layouts(mesh, config.rules, decode_mesh, config.decode_rules)


def _rows(queries: Sequence[Query], responses: Sequence[Response], root: Path, tokenizer):
    rows, base = pairs.pair_rows(queries, root, responses, root)
    return sft.tokenize_rows(rows, tokenizer), base


def demonstration_batches(
    rows: Sequence[dict], root: Path, section: ConfigDict, seed: int, *, one_pass: bool = False
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
    variables: Mapping[str, Any],
    batches: Batches,
    folder: Path,
) -> dict[str, Any]:
    return sft.train(
        made.policy,
        variables,
        made.frontend,
        batches,
        optimizer=optimizer_of(section),
        num_steps=section.num_steps,
        rng=jax.random.key(config.seed),
        accum_steps=section.accum_steps,
        layout=layouts_of(config).train,
        checkpointer=Checkpointer(folder / "checkpoints"),
        save_every=section.save_every,
        writer=MetricWriter(folder),
        label=folder.name,
    )


def neutral_rows(workdir: Path, split: str, tokenizer: TextTokenizer) -> tuple[list[dict], Path]:
    """Neutral dialogues of a split as demonstrations."""
    root = speech_dir(workdir)
    queries = [q for q in records.read_jsonl(root / "neutral.jsonl", Query) if q.split == split]
    names = {query.id for query in queries}
    answers = records.read_jsonl(root / "neutral_answers.jsonl", Response)
    return _rows(queries, [a for a in answers if a.query_id in names], root, tokenizer)


def _neutral_nll(config: ConfigDict, workdir: Path, made: Assembly, variables) -> float:
    rows, root = neutral_rows(workdir, "test", made.tokenizer)
    batches = demonstration_batches(rows, root, config.base, 0, one_pass=True)
    return sft.evaluate(made.policy, variables, made.frontend, batches)["nll"]


def run_base(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """The tone-deaf base policy: fluent in every manner of answering, and deaf to the speaker's.

    It practises each train query with the same number of answers to its own style and to the other
    one, and with a bland one: how the query sounds tells nothing about how it is answered.
    """
    made, folder = assemble(config, workdir), workdir / "base"
    if config.pretrain.source == "train":
        root = speech_dir(workdir)
        queries = queries_of(workdir, "train")
        styled = records.read_jsonl(root / "demonstrations.jsonl", Response)
        answers = records.read_jsonl(root / "bland.jsonl", Response) + styled
        answers += pairs.in_other_style(queries, styled, config.seed)
        rows, base = _rows(queries, answers, root, made.tokenizer)
        rows += neutral_rows(workdir, "train", made.tokenizer)[0] * config.base.neutral_repeats
        batches = demonstration_batches(rows, base, config.base, config.seed)
        start = init_policy(made.policy, config.seed)
        variables = _train_sft(config, config.base, made, start, batches, folder)
        save_part(folder / BASE_FILE, variables, {}, "float16")
    # From the file in both cases: what is shipped is what was measured.
    source = folder if config.pretrain.source == "train" else parts_dir(config, workdir)
    variables, _ = load_part(source / BASE_FILE, "float32")
    save_params(folder / "params", variables, {})
    return {"base/neutral_nll": _neutral_nll(config, workdir, made, variables)}


def policy_params(workdir: Path, stage: str) -> dict[str, Any]:
    """The policy variables that a finished stage left."""
    return load_params(workdir / stage / "params")[0]


def _run_sft(config: ConfigDict, workdir: Path, name: str) -> dict[str, float]:
    made, folder, root = assemble(config, workdir), workdir / name, speech_dir(workdir)
    train = queries_of(workdir, "train")
    section = config[name]
    chosen = {q.id for q in select_demonstrations(train, section.num_demonstrations, config.seed)}
    answers = records.read_jsonl(root / "demonstrations.jsonl", Response)
    rows, base = _rows(train, [a for a in answers if a.query_id in chosen], root, made.tokenizer)
    batches = demonstration_batches(rows, base, section, config.seed)
    variables = _train_sft(config, section, made, policy_params(workdir, "base"), batches, folder)
    save_params(folder / "params", variables, {})
    return {
        f"{name}/demonstrations": len(rows),
        f"{name}/neutral_nll": _neutral_nll(config, workdir, made, variables),
    }


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
    # Imported here because `reward` itself stands on this module's assembly of the policy.
    from paras2s_jax.stages.reward import load_reward_model

    c = config.grpo
    made = assemble(config, workdir)
    reward_model, reward_variables = load_reward_model(config, workdir)
    reference = policy_params(workdir, "sft")
    fields = {field.name for field in dataclasses.fields(grpo.Settings)} - {"beta"}
    variables = grpo.train(
        made.policy,
        reference,
        reference,
        made.frontend,
        make_reward_fn(reward_model),
        reward_variables,
        _query_batches(config, workdir),
        optimizer=optimizer_of(c, c.num_epochs),
        settings=grpo.Settings(beta=beta, **{k: v for k, v in c.items() if k in fields}),
        num_steps=c.num_steps,
        rng=jax.random.key(config.seed),
        audit=_audit(config, workdir, made),
        layouts=layouts_of(config),
        checkpointer=Checkpointer(folder / "checkpoints"),
        save_every=c.save_every,
        writer=MetricWriter(folder),
        label=folder.name,
    )
    save_params(folder / "params", variables, {})
    rows, base = neutral_rows(workdir, "test", made.tokenizer)
    kept = retention.nll_growth(
        made.policy,
        reference,
        variables,
        made.frontend,
        # A list, because it is gone through twice.
        list(demonstration_batches(rows, base, config.base, 0, one_pass=True)),
    )
    return {f"retention/{beta:g}/{name}": value for name, value in kept.items()}


def _query_batches(config: ConfigDict, workdir: Path) -> Batches:
    """All train queries as RL hears them: speech, neither words nor labels."""
    c, root = config.grpo, speech_dir(workdir)
    rows = pairs.query_rows(queries_of(workdir, "train"))
    return Batches(
        _checked(rows, root, grpo.AUDIO_KEYS, c.max_bad_share),
        root=root,
        audio_keys=grpo.AUDIO_KEYS,
        batch_size=c.num_prompts,
        len_buckets_s=tuple(c.len_buckets_s),
        seed=config.seed,
        shuffle=True,
        repeat=True,
    )


def _audit(config: ConfigDict, workdir: Path, made: Assembly) -> grpo.Audit:
    """The recogniser that checks during RL that answers say what their text stream says."""
    listener = transcribe.WhisperTranscriber.load(
        parts_dir(config, workdir), batch_size=config.judge.batch_size
    )

    def hear(waves):
        return [found.text for found in listener.transcribe(waves)]

    c = config.grpo
    return grpo.Audit(hear, made.tokenizer, every=c.audit_every, num_prompts=c.audit_prompts)
