"""The command `respond`: a Kimi-Audio checkpoint answers wavs with wavs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.bench.systems import AUDIO_SUFFIXES, PolicySystem
from paras2s_jax.data.records import Query, Response, read_jsonl
from paras2s_jax.models.sampling import Sampling
from paras2s_jax.stages import kimi
from paras2s_jax.stages.assembly import folder_digest
from paras2s_jax.stages.registry import StageError

# Lengths that queries are padded to. Prompt and answer share kimi.MAX_TOKENS, 120 s in all: the
# last leaves about 19 s to the answer.
LEN_BUCKETS_S = (5.0, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 80.0, 100.0)


def run(
    *,
    checkpoint: str,
    source: str,
    target: str,
    audio_temperature: float = 0.8,
    audio_top_k: int = 10,
    text_temperature: float = 0.0,
    text_top_k: int = 5,
    max_steps: int = 0,
    num_samples: int = 1,
    batch_size: int = 8,
    seed: int = 0,
    dtype: str = "bfloat16",
) -> list[Response]:
    """Answers every query of `source`; `target` gets responses.jsonl and the wavs that it names.

    Answers that are there already, of the same checkpoint, settings and queries, are kept.

    Args:
        checkpoint: folder as stages/kimi.py describes it.
        source: a wav, a folder of wavs, or a jsonl of `data.records.Query`.
        max_steps: most steps of an answer, 12.5 a second; 0: as many as the release allows.
        batch_size: queries answered at one time.

    Raises:
        StageError: the checkpoint lacks a part, or `source` has nothing to answer.
        AudioError: a wav cannot be read.
        RecordError: the jsonl is not one of queries.
    """
    if min(max_steps, audio_top_k, text_top_k) < 0 or min(batch_size, num_samples) < 1:
        raise StageError(
            "respond: max_steps and the top_k are 0 or more, batch_size and num_samples at least 1."
        )
    queries, root = queries_of(Path(source))
    system = checkpoint_system(
        Path(checkpoint).resolve().name,
        Path(checkpoint),
        text=Sampling(text_temperature, text_top_k),
        audio=Sampling(audio_temperature, audio_top_k),
        max_steps=max_steps,
        num_samples=num_samples,
        batch_size=min(batch_size, num_samples * len(queries)),
        seed=seed,
        dtype=dtype,
    )
    responses = system.respond(queries, root, Path(target))
    print(f"{len(responses)} answers: {Path(target) / 'responses.jsonl'}")
    return responses


def checkpoint_system(
    name: str,
    checkpoint: Path,
    *,
    text: Sampling,
    audio: Sampling,
    max_steps: int = 0,
    num_samples: int = 1,
    batch_size: int = 8,
    seed: int = 0,
    dtype: str = "bfloat16",
) -> PolicySystem:
    """A Kimi-Audio checkpoint as a system; arguments as of `run`."""
    made = kimi.assemble(
        checkpoint, text=text, audio=audio, max_steps=max_steps or kimi.MAX_TOKENS, dtype=dtype
    )
    return PolicySystem(
        name,
        made.respond_batch,
        version=f"{folder_digest(checkpoint)}-{made.policy.text}-{made.policy.audio}-"
        f"{made.policy.max_steps}-{dtype}",
        batch_size=batch_size,
        len_buckets_s=LEN_BUCKETS_S,
        num_samples=num_samples,
        seed=seed,
        rate_hz=made.rate_hz,
    )


def queries_of(source: Path) -> tuple[list[Query], Path]:
    """The queries that a path stands for, and the folder that their wavs are relative to.

    Raises:
        StageError: there is nothing to answer, a wav is too long, or two have the same name.
        AudioError: a wav cannot be read.
        RecordError: the jsonl is not one of queries.
    """
    if source.suffix == ".jsonl":
        queries, root = read_jsonl(source, Query), source.parent
    elif source.is_dir():
        wavs = sorted(path for path in source.iterdir() if path.suffix.lower() in AUDIO_SUFFIXES)
        queries, root = [_query(wav) for wav in wavs], source
    elif source.exists():
        queries, root = [_query(source)], source.parent
    else:
        raise StageError(f"{source}: no such file; give a wav, a folder of wavs or a jsonl.")
    if not queries:
        raise StageError(f"{source}: nothing to answer in it; give wavs or a jsonl of queries.")
    _check(queries, source)
    return queries, root


def _query(wav: Path) -> Query:
    """A query of which nothing is known but its sound."""
    return Query(
        id=wav.stem,
        sentence_id=wav.stem,
        dimension="neutral",
        text="",
        style="neutral",
        contrast="neutral",
        topic="",
        split="test",
        voice="",
        wav=wav.name,
        dur_s=len(wave_lib.load(wav)) / wave_lib.RATE_HZ,
    )


def _check(queries: Sequence[Query], source: Path) -> None:
    seen: set[str] = set()
    for query in queries:
        if query.id in seen:
            raise StageError(f"{source}: two queries are called {query.id!r}; rename one.")
        seen.add(query.id)
        if query.dur_s > LEN_BUCKETS_S[-1]:
            raise StageError(
                f"{source}: {query.wav} lasts {query.dur_s:.1f} s; longer than "
                f"{LEN_BUCKETS_S[-1]:.0f} s leaves no room for an answer, cut it."
            )
