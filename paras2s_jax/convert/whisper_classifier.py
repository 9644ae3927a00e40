"""Whisper as a classifier (transformers: WhisperForAudioClassification)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp

from paras2s_jax.convert import whisper
from paras2s_jax.convert.rules import Rule
from paras2s_jax.models.whisper import WhisperConfig, WhisperForAudioClassification

ARCHITECTURES = ("WhisperForAudioClassification",)
IGNORE: tuple[str, ...] = ()
# Of a config.json that names no labels (transformers: PreTrainedConfig).
DEFAULT_NUM_LABELS = 2


def make_model(folder: Path, **types) -> WhisperForAudioClassification:
    """The classifier of a released folder; types: dtype, param_dtype, scan_unroll, remat."""
    path = Path(folder) / "config.json"
    labels = json.loads(path.read_text()).get("id2label")
    num_labels = len(labels) if labels else DEFAULT_NUM_LABELS
    return WhisperForAudioClassification(WhisperConfig.from_json(path), num_labels, **types)


def rules(config: WhisperConfig) -> list[Rule]:
    """Table of a WhisperForAudioClassification."""
    return whisper.classification_rules(config)


def init(model: WhisperForAudioClassification, rng: jax.Array) -> dict:
    """Fresh, boxed variables."""
    return model.init(rng, jnp.zeros((1, model.config.num_mel_bins, 8)))


def load_processor(folder: Path):
    """The feature extractor, or None."""
    return whisper.load_processor(folder)
