"""The reward model that a config names: made before distillation, saved after it, loaded again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from paras2s_jax.align.rewards import RewardModel, score_prompt
from paras2s_jax.convert.stored import load_params, save_params
from paras2s_jax.data.tokenizer import TextTokenizer
from paras2s_jax.models.placement import unbox
from paras2s_jax.models.qwen2 import Qwen2Config
from paras2s_jax.models.qwen2_5_omni import OmniAudioConfig, Qwen2_5OmniConfig
from paras2s_jax.models.qwen2_audio import Qwen2AudioConfig
from paras2s_jax.models.whisper_layers import WhisperConfig
from paras2s_jax.stages import audio_lm
from paras2s_jax.stages.registry import StageError
from paras2s_jax.stages.speech import TEXT_FILE, asr_encoder, parts_dir
from paras2s_jax.train.sharding import Layouts

# Folder of the reward model, inside the stage's own.
REWARD_MODEL = "reward_model"


def make_reward_model(
    config: ConfigDict, workdir: Path, layouts: Layouts
) -> tuple[RewardModel, dict[str, Any]]:
    """The reward model of the config and its variables before distillation."""
    c = config.distill.model
    if c.checkpoint:
        reward_model = audio_lm.reward_model_of(c)
        folder = Path(c.checkpoint)
        return reward_model, audio_lm.load(reward_model, folder, layouts.train, config.seed)
    whisper, encoder = asr_encoder(config, workdir)
    reward_model = _small(config, workdir, whisper)
    if c.family == "qwen2_5_omni":
        encoder = {name: encoder[name] for name in ("conv1", "conv2", "layers")} | {
            "ln_post": encoder["layer_norm"]
        }
    return reward_model, reward_model.init(jax.random.key(config.seed), encoder)


def _small(config: ConfigDict, workdir: Path, whisper: WhisperConfig) -> RewardModel:
    """A small one around the recogniser's encoder, with the policy's own tokenizer."""
    c = config.distill.model
    tokenizer = TextTokenizer.load(parts_dir(config, workdir) / TEXT_FILE)
    text, slot = Qwen2Config(tokenizer.vocab_size + 1, **c.text), tokenizer.vocab_size
    if c.family == "qwen2_audio":
        sizes = Qwen2AudioConfig(whisper, text, slot)
    elif c.family == "qwen2_5_omni":
        audio = OmniAudioConfig(
            **dataclasses.asdict(whisper) | c.audio.to_dict(), output_dim=text.hidden_size
        )
        sizes = Qwen2_5OmniConfig(audio, text, slot)
    else:
        raise ValueError(
            f"distill.model.family is {c.family!r}; choose {' or '.join(audio_lm.FAMILIES)}"
        )
    model = audio_lm.with_settings(c, audio_lm.FAMILIES[c.family](sizes))
    return RewardModel(model, score_prompt(tokenizer))


def load_reward_model(
    config: ConfigDict, workdir: Path, layouts: Layouts, folder: Path | None = None
) -> tuple[RewardModel, dict[str, Any]]:
    """The reward model that `distill` left.

    folder: where it lies; by default in the run.

    Raises:
        StageError: there is none, or it is not of the sizes that the config says.
    """
    folder = folder or workdir / "distill" / REWARD_MODEL
    from_release = bool(config.distill.model.checkpoint)
    if not (folder if from_release else folder / "params").is_dir():
        raise StageError(
            f"{folder}: no reward model there; run `paras2s distill` first, or name the folder "
            f"distill/{REWARD_MODEL} of a run that has."
        )
    if from_release:
        reward_model = audio_lm.reward_model_of(config.distill.model)
        return reward_model, audio_lm.load(reward_model, folder, layouts.train)
    reward_model = _small(config, workdir, asr_encoder(config, workdir)[0])
    variables = load_params(folder / "params")[0]
    wanted, found = (_shapes(tree) for tree in (unbox(reward_model.boxed()), variables))
    wrong = sorted(
        name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)
    )
    if wrong:
        raise StageError(
            f"{folder} is of other sizes than config.distill.model (first at {wrong[0]}: "
            f"{found.get(wrong[0])} there, {wanted.get(wrong[0])} in the config): give the "
            "config of the run that distilled it."
        )
    return reward_model, variables


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}


def save_reward_model(
    config: ConfigDict, reward_model: RewardModel, variables: dict[str, Any], folder: Path
) -> None:
    """Saves what `load_reward_model` reads."""
    c = config.distill
    if c.model.checkpoint:
        base = Path(c.model.checkpoint)
        audio_lm.save(reward_model, variables, folder, base, c.trainable)
    else:
        save_params(folder / "params", variables, {})


def outline_reward_model(config: ConfigDict, workdir: Path = Path()) -> RewardModel:
    """As `make_reward_model`, for plans: no checkpoint needs to be there."""
    if config.distill.model.checkpoint:
        return audio_lm.outline(config.distill.model)
    return _small(config, workdir, asr_encoder(config, workdir)[0])
