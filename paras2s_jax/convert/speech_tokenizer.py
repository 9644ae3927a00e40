"""Whisper-VQ speech tokenizer (glm-4-voice-tokenizer): config, key table, extractor."""

from pathlib import Path

import jax
import jax.numpy as jnp

from paras2s_jax.convert import whisper
from paras2s_jax.convert.rules import Rule
from paras2s_jax.models.speech_tokenizer import SpeechTokenizerConfig, WhisperVQEncoder

ARCHITECTURES = ("WhisperVQEncoder",)
# Running averages that training updated the codebook from.
IGNORE = (r"ema_count", r"ema_weight")


def make_model(folder: Path, **types) -> WhisperVQEncoder:
    """The model of a released folder; types: dtype, param_dtype, scan_unroll, remat."""
    return WhisperVQEncoder(SpeechTokenizerConfig.from_json(Path(folder) / "config.json"), **types)


def rules(config: SpeechTokenizerConfig) -> list[Rule]:
    """Table of a WhisperVQEncoder, which ends without a norm."""
    return [
        *whisper.encoder_rules(config.tower, prefix="", final_norm=False),
        Rule("embed_positions2.weight", "embed_positions2"),
        Rule("codebook.weight", "codebook"),
    ]


def init(model: WhisperVQEncoder, rng: jax.Array) -> dict:
    """Fresh, boxed variables."""
    return model.init(rng, jnp.zeros((1, model.config.num_mel_bins, 8)))


def load_processor(folder: Path):
    """The feature extractor, or None; `WhisperVQTokenizer` does without."""
    return whisper.load_processor(folder)
