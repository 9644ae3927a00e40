"""The judge of a config, as distillation and the bench use it; or verdicts that a user brings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from paras2s_jax.align.reward_score import RewardScorer
from paras2s_jax.convert import from_pretrained
from paras2s_jax.data.bank import load_bank
from paras2s_jax.data.endpoint import ChatClient, Endpoint
from paras2s_jax.data.records import DIMENSIONS, Query, Response, Verdict, read_jsonl
from paras2s_jax.judge.captioner import ToneCaptioner
from paras2s_jax.judge.chain import Judge
from paras2s_jax.judge.classifier import WaveClassifier
from paras2s_jax.judge.duel import DuelPrompt, EndpointComparer, LocalComparer
from paras2s_jax.judge.endpoint_score import EndpointScorer
from paras2s_jax.judge.endpoint_tone import EndpointToneCaptioner
from paras2s_jax.judge.interfaces import (
    Scorer,
    Transcriber,
    WaveCaptioner,
    WaveNamer,
    WaveScorer,
)
from paras2s_jax.judge.ledger import Ledger
from paras2s_jax.judge.local_score import LocalScorer
from paras2s_jax.judge.published import PublishedClassifier
from paras2s_jax.judge.released import ReleasedTranscriber
from paras2s_jax.judge.score import RubricScorer
from paras2s_jax.judge.score_prompt import ScorePrompt
from paras2s_jax.judge.style import StyleAnalyzers
from paras2s_jax.judge.transcribe import WhisperTranscriber
from paras2s_jax.models.qwen2 import Qwen2LM
from paras2s_jax.models.qwen2_audio import Qwen2Audio
from paras2s_jax.stages.registry import StageError
from paras2s_jax.stages.reward_model import load_reward_model
from paras2s_jax.stages.speech import TONE_FILE, parts_dir
from paras2s_jax.train.sharding import ONE_DEVICE_LAYOUTS

LEDGER = "ledger.sqlite"
PACKAGED, TRAINED, ENDPOINT, NONE = "packaged", "trained", "endpoint", "none"
RUBRIC, LOCAL, REWARD = "rubric", "local", "reward"
SCORERS = (RUBRIC, ENDPOINT, LOCAL, REWARD)


def make_judge(config: ConfigDict, workdir: Path, *, progress: bool = True) -> Judge:
    """The stages that config.judge names; everything they find goes to the run's ledger.

    Raises:
        StageError: a name is unknown, or does not go with the others.
        EndpointError: a server is named without all that it needs.
    """
    c = config.judge
    left_out = [name for name in ("transcriber", "tone") if c[name] == NONE]
    if left_out and c.scorer != REWARD:
        raise StageError(
            f"judge.{left_out[0]} is {NONE!r}, but the scorer {c.scorer!r} reads what it hears: "
            f"name one, or take judge.scorer={REWARD}, which listens itself."
        )
    return Judge(
        None if c.transcriber == NONE else make_transcriber(config, workdir),
        make_analyzers(config, workdir),
        None if c.tone == NONE else make_tone(config, workdir),
        make_scorer(config, workdir),
        Ledger(workdir / LEDGER),
        num_repeats=c.num_repeats,
        progress=progress,
    )


def is_told_styles(config: ConfigDict) -> bool:
    """Whether no dimension has an analyzer, so that the queries' labels are taken as true."""
    return not any(config.judge.analyzers.values())


def make_transcriber(config: ConfigDict, workdir: Path) -> Transcriber:
    """The recogniser alone; see make_judge."""
    c = config.judge
    if c.transcriber == NONE:
        raise StageError(
            f"judge.transcriber is {NONE!r}, but somebody has to hear words: name one."
        )
    if c.transcriber == PACKAGED:
        return WhisperTranscriber.load(parts_dir(config, workdir), batch_size=c.batch_size)
    with _settings(f"judge.transcriber = {c.transcriber!r}"):
        return ReleasedTranscriber.load(
            c.transcriber, dtype=c.dtype, language=c.language or None, batch_size=c.batch_size
        )


def make_analyzers(config: ConfigDict, workdir: Path) -> dict[str, WaveNamer]:
    """Per dimension: trained here or in another run, or published.

    A dimension without one is judged by labels.
    """
    c, found = config.judge, {}
    for dimension, source in c.analyzers.items():
        folder = workdir / "analyzers" if source == TRAINED else Path(source)
        if source and StyleAnalyzers.path_of(folder, dimension).is_file():
            loaded = StyleAnalyzers.load(folder, [dimension], batch_size=c.batch_size)
            found[dimension] = loaded[dimension]
        elif source == TRAINED:
            raise StageError(
                f"{folder} has no analyzer of {dimension} (judge.analyzers.{dimension}): run "
                "`paras2s analyzers`, or name the folder `analyzers` of a run that has."
            )
        elif source:
            with _settings(f"judge.analyzers.{dimension} = {source!r}"):
                found[dimension] = PublishedClassifier.load(
                    source,
                    dict(c.analyzer_names[dimension]),
                    len_buckets_s=tuple(c.len_buckets_s),
                    batch_size=c.batch_size,
                )
    return found


def make_tone(config: ConfigDict, workdir: Path) -> WaveNamer | WaveCaptioner:
    """Who names the tone of answers; see make_judge."""
    c = config.judge
    if c.tone == PACKAGED:
        path = parts_dir(config, workdir) / TONE_FILE
        return WaveClassifier.load(path, batch_size=c.batch_size)
    if c.tone == ENDPOINT:
        return EndpointToneCaptioner(
            ChatClient(Endpoint(**c.tone_endpoint)),
            prompt_version=c.tone_prompt_version,
            max_tokens=c.tone_max_new_tokens,
        )
    model, params, processor = from_pretrained(c.tone, dtype=c.dtype)
    if not isinstance(model, Qwen2Audio) or processor is None:
        raise StageError(
            f"judge.tone = {c.tone!r} is no Qwen2-Audio with its processor; take one, or "
            f"{PACKAGED!r} or {ENDPOINT!r}."
        )
    return ToneCaptioner(
        model,
        {"params": params},
        processor,
        max_new_tokens=c.tone_max_new_tokens,
        prompt_version=c.tone_prompt_version,
        batch_size=c.batch_size,
    )


def make_scorer(config: ConfigDict, workdir: Path) -> Scorer | WaveScorer:
    """The scorer alone; see make_judge."""
    c = config.judge
    if c.scorer == RUBRIC:
        return RubricScorer(load_bank().rubric)
    if c.scorer == REWARD:
        folder = Path(c.reward.folder) if c.reward.folder else None
        loaded = load_reward_model(config, workdir, ONE_DEVICE_LAYOUTS, folder)
        lens_s = tuple(c.reward.len_buckets_s)
        with _settings(f"judge.reward.len_buckets_s = {lens_s}"):
            return RewardScorer(*loaded, len_buckets_s=lens_s, batch_size=c.reward.batch_size)
    prompt = ScorePrompt.load(c.prompt_version)
    if c.scorer == ENDPOINT:
        return EndpointScorer(
            ChatClient(Endpoint(**c.endpoint)),
            prompt,
            response_format=c.response_format,
            temperature=c.temperature,
            max_tokens=c.max_tokens,
        )
    if c.scorer == LOCAL:
        with _settings(f"judge.local.checkpoint = {c.local.checkpoint!r}"):
            return LocalScorer(*_language_model(c), prompt, **_local_options(c))
    raise StageError(f"judge.scorer is {c.scorer!r}; choose one of {', '.join(SCORERS)}.")


def make_comparer(config: ConfigDict) -> EndpointComparer | LocalComparer:
    """Who compares two answers side by side: the language model that the judge scores with.

    Raises:
        StageError: it scores with none.
    """
    c = config.judge
    prompt = DuelPrompt.load(c.duel_prompt_version, ScorePrompt.load(c.prompt_version))
    if c.scorer == ENDPOINT:
        client, options = ChatClient(Endpoint(**c.endpoint)), {"max_tokens": c.max_tokens}
        return EndpointComparer(client, prompt, response_format=c.response_format, **options)
    if c.scorer == LOCAL:
        with _settings(f"judge.local.checkpoint = {c.local.checkpoint!r}"):
            return LocalComparer(*_language_model(c), prompt, **_local_options(c))
    raise StageError(
        f"judge.scorer is {c.scorer!r}, but only a language model can compare two answers: set "
        f"--config.judge.scorer={ENDPOINT} or {LOCAL}."
    )


def _language_model(c: ConfigDict) -> tuple[Qwen2LM, Mapping[str, Any], Any]:
    """Model, parameters and tokenizer of judge.local."""
    model, params, tokenizer = from_pretrained(c.local.checkpoint, dtype=c.dtype)
    if not isinstance(model, Qwen2LM) or tokenizer is None:
        raise StageError(
            f"judge.local.checkpoint = {c.local.checkpoint!r} is no text model with a "
            "tokenizer; take for instance Qwen/Qwen2.5-7B-Instruct."
        )
    return model, params, tokenizer


def _local_options(c: ConfigDict) -> dict[str, Any]:
    return {"name": Path(c.local.checkpoint).name, "batch_size": c.local.batch_size}


@contextlib.contextmanager
def _settings(key: str) -> Iterator[None]:
    """A checkpoint that cannot serve is a mistake in the config, under this key."""
    try:
        yield
    except ValueError as error:
        raise StageError(f"{key}: {error}.") from error


def use_labels(config: ConfigDict, queries: Sequence[Query]) -> bool:
    """Whether styles are taken from the queries' labels: as asked, or because nobody hears them.

    Raises:
        StageError: styles of some dimensions are heard, those of others are not.
    """
    c = config.judge
    if config.bench.use_labels or not any(c.analyzers.values()):
        return True
    asked = {query.dimension for query in queries} & set(DIMENSIONS)
    lacking = sorted(dimension for dimension in asked if not c.analyzers[dimension])
    if lacking and c.scorer != REWARD:
        raise StageError(
            f"judge.analyzers.{lacking[0]} is empty and others are not: name an analyzer, or take "
            "all styles from the labels with --config.bench.use_labels=True."
        )
    return False


def given_verdicts(path: Path, responses: Sequence[Response], answers: Path) -> list[Verdict]:
    """Verdicts of a user's own judge, in the order of the responses.

    path: jsonl of Verdict. answers: the jsonl of the responses, to name it.

    Raises:
        StageError: there is no such file yet, or a response has no verdict in it, or two.
        RecordError: a row is no verdict.
    """
    if not path.is_file():
        raise StageError(
            f"{path} (distill.verdicts) is not there: judge the answers in {answers}, write one "
            "verdict a line into it, and run the same command again."
        )
    found: dict[tuple[str, int], Verdict] = {}
    for verdict in read_jsonl(path, Verdict):
        key = (verdict.query_id, verdict.sample)
        if key in found:
            raise StageError(
                f"{path} has two verdicts on sample {key[1]} of query {key[0]!r}; keep one."
            )
        found[key] = verdict
    keys = [(response.query_id, response.sample) for response in responses]
    lacking = [key for key in keys if key not in found]
    if lacking:
        raise StageError(
            f"{path} has no verdict on {len(lacking)} of the {len(keys)} answers in {answers}, "
            f"first on sample {lacking[0][1]} of query {lacking[0][0]!r}; add them (score null "
            "where the judge failed)."
        )
    return [found[key] for key in keys]
