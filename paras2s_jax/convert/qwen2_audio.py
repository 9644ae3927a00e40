"""Qwen2-Audio (transformers: Qwen2AudioForConditionalGeneration, as released)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from paras2s_jax.convert import qwen2, whisper
from paras2s_jax.convert.rules import LINEAR, Rule
from paras2s_jax.data.audio_chat import QWEN2_AUDIO_TEMPLATE, AudioChat
from paras2s_jax.models.qwen2_audio import Qwen2Audio, Qwen2AudioConfig

ARCHITECTURES = ("Qwen2AudioForConditionalGeneration",)
IGNORE: tuple[str, ...] = ()


def make_model(folder: Path, **types) -> Qwen2Audio:
    """The model of folder/config.json. It pads audio with silence, as its reference does."""
    config = Qwen2AudioConfig.from_json(Path(folder) / "config.json")
    return Qwen2Audio(config, mask_inputs=False, **types)


def rules(config: Qwen2AudioConfig) -> list[Rule]:
    """Table of a Qwen2Audio."""
    projector = "multi_modal_projector.linear"
    return [
        *whisper.encoder_rules(config.audio, prefix="audio_tower.", target="audio_tower/"),
        Rule(f"{projector}.weight", "projector/kernel", LINEAR),
        Rule(f"{projector}.bias", "projector/bias"),
        *qwen2.rules(config.text, prefix="language_model.", target="language_model/"),
    ]


def init(model: Qwen2Audio, rng: jax.Array) -> Mapping[str, Any]:
    """Fresh variables (boxed), from one audio of 8 mel frames."""
    mel = np.zeros((1, 8, model.config.audio.num_mel_bins), np.float32)
    ids = np.full((1, 3), model.config.audio_token_index, np.int32)
    return model.init(rng, mel, ids, method="init_all")


def memory_names(_config: Qwen2AudioConfig) -> dict[str, str]:
    """How transformers 5 calls modules in memory -> in checkpoints."""
    return {
        "model.language_model.": "language_model.model.",
        "lm_head": "language_model.lm_head",
        "model.": "",
    }


def load_processor(folder: Path) -> AudioChat | None:
    """Text and audio -> arguments of the model; None if the folder has no vocabulary."""
    return AudioChat.load(folder, default_template=QWEN2_AUDIO_TEMPLATE, padding_side="right")
