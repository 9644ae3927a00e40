"""Names the tone of an answer from its sound alone, whatever it says."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paras2s_jax.audio.styles import TONES
from paras2s_jax.data.records import SpeechClip
from paras2s_jax.judge import classifier
from paras2s_jax.judge.recipe import Augment, Recipe
from paras2s_jax.models.whisper_layers import WhisperConfig
from paras2s_jax.train.checkpoint import Checkpointer
from paras2s_jax.train.metrics import MetricWriter


def train(
    config: WhisperConfig,
    clips: Sequence[SpeechClip],
    root: str | Path,
    recipe: Recipe,
    *,
    init_encoder: Mapping[str, Any] | None = None,
    augment: Augment | None = None,
    checkpointer: Checkpointer | None = None,
    writer: MetricWriter | None = None,
) -> classifier.WaveClassifier:
    """Trains a tone namer on the clips that have a tone.

    They should speak each text in every tone, so that the words say nothing about it (paper
    section 2: PolyTone). With `augment`, it also hears them through the codec, as it will hear a
    policy's answers.
    """
    clips = [clip for clip in clips if clip.tone is not None]
    return classifier.train(
        config,
        [(clip.wav, clip.tone) for clip in clips],
        root,
        TONES,
        recipe,
        init_encoder=init_encoder,
        augment=augment,
        checkpointer=checkpointer,
        writer=writer,
        progress_label="tone namer",
    )
