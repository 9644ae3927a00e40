"""The system that a config names: a folder, a server, a pipeline or a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from paras2s_jax.audio import styles
from paras2s_jax.audio.synth import Delivery, make_synthesizer
from paras2s_jax.bench.realtime import RealtimeSystem
from paras2s_jax.bench.remote import ChatSystem, PipelineSystem
from paras2s_jax.bench.systems import FolderSystem, RecordedSystem, System
from paras2s_jax.data.bank import load_bank
from paras2s_jax.data.endpoint import ChatClient, Endpoint
from paras2s_jax.data.records import Query
from paras2s_jax.data.speaking import rng_of
from paras2s_jax.models.sampling import Sampling
from paras2s_jax.stages.judging import make_transcriber
from paras2s_jax.stages.registry import StageError
from paras2s_jax.stages.respond import checkpoint_system


def make_system(config: ConfigDict, workdir: Path) -> System:
    """The system of config.system.

    Raises:
        StageError: its kind is unknown, or what the kind needs is missing.
        EndpointError: a server is named without all that it needs.
    """
    c = config.system
    makers: dict[str, Callable[[], System]] = {
        "folder": lambda: FolderSystem(c.name, Path(_needed(c, "source"))),
        "recorded": lambda: RecordedSystem(c.name, Path(_needed(c, "source"))),
        "chat": lambda: ChatSystem(
            c.name,
            ChatClient(Endpoint(**c.endpoint)),
            instructions=c.instructions,
            voice=c.voice,
            num_samples=c.num_samples,
        ),
        "realtime": lambda: RealtimeSystem(
            c.name,
            Endpoint(**c.endpoint),
            instructions=c.instructions,
            voice=c.voice,
            num_samples=c.num_samples,
        ),
        "pipeline": lambda: _pipeline(config, workdir, informed=False),
        "topline": lambda: _pipeline(config, workdir, informed=True),
        "checkpoint": lambda: checkpoint_system(
            c.name,
            Path(_needed(c, "source")),
            text=Sampling(**c.text_sampling),
            audio=Sampling(**c.audio_sampling),
            max_steps=c.max_steps,
            num_samples=c.num_samples,
            batch_size=c.batch_size,
            seed=config.seed,
            dtype=c.dtype,
        ),
    }
    if c.kind not in makers:
        raise StageError(f"system.kind is {c.kind!r}; choose one of {', '.join(makers)}.")
    return makers[c.kind]()


def _needed(c: ConfigDict, key: str) -> str:
    if not c[key]:
        raise StageError(
            f"a system of kind {c.kind!r} needs system.{key}: set --config.system.{key}"
        )
    return c[key]


def _pipeline(config: ConfigDict, workdir: Path, *, informed: bool) -> PipelineSystem:
    """Recogniser of the judge -> chat server -> synthesizer."""
    c, transcriber = config.system, make_transcriber(config, workdir)

    def hear(queries: Sequence[Query], waves: Sequence[np.ndarray]) -> list[str]:
        return [found.text for found in transcriber.transcribe(waves)]

    return PipelineSystem(
        name=c.name,
        client=ChatClient(Endpoint(**c.endpoint)),
        hear=hear,
        hearer=transcriber.model_id,
        synthesizer=make_synthesizer(c.synthesizer, **c.synthesizer_options.to_dict()),
        delivery=_informed_delivery if informed else _flat_delivery,
        informed=informed,
        num_samples=c.num_samples,
    )


def _flat_delivery(query: Query) -> Delivery:
    return styles.tone_delivery("flat", rng_of(0, query.id))


def _informed_delivery(query: Query) -> Delivery:
    """In the tone that suits the true style; gently where the bank does not say."""
    tone = load_bank().tones.get((query.dimension, query.style), "gentle")
    return styles.tone_delivery(tone, rng_of(0, query.id))
