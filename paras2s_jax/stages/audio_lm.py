"""A released audio language model (Qwen2.5-Omni's thinker, Qwen2-Audio) as the reward model.

The two waveforms stand in its own chat; the score is the first token of its reply. Its folder is
what `paras2s convert` made of the release, or the release itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from paras2s_jax.align.rewards import (
    SCORES,
    STYLE_LABELS,
    TONE_LABELS,
    RewardModel,
    ScorePrompt,
    score_prompt,
)
from paras2s_jax.convert import families, trained
from paras2s_jax.convert.pretrained import load_variables
from paras2s_jax.data.audio_chat import AudioChat
from paras2s_jax.models.lora import LoRA
from paras2s_jax.models.placement import unbox
from paras2s_jax.models.qwen2_5_omni import Qwen2_5OmniConfig, Qwen2_5OmniThinker
from paras2s_jax.models.qwen2_audio import Qwen2Audio
from paras2s_jax.stages.registry import StageError
from paras2s_jax.train import distributed
from paras2s_jax.train.sharding import Layout
from paras2s_jax.train.state import split_trainable

FAMILIES = {"qwen2_audio": Qwen2Audio, "qwen2_5_omni": Qwen2_5OmniThinker}
SYSTEM = "You judge how an assistant answers in spoken conversations."
# Before, between and behind the two recordings.
QUESTION = (
    "The speaker: ",
    "\nThe assistant: ",
    "\nHow well does the answer fit what the speaker says and how it is said, in its words and in "
    "its tone? Reply with a number from 1 (not at all) to 5 (perfectly).",
)


def reward_model_of(c: ConfigDict) -> RewardModel:
    """The reward model of a config's distill.model, without variables.

    Raises:
        StageError: the folder is not what the config says, or lacks tokenizer or template.
        ConversionError: its config cannot be read.
    """
    folder = Path(c.checkpoint)
    if not folder.is_dir():
        raise StageError(
            f"{folder} (distill.model.checkpoint): no such folder; convert Qwen/Qwen2.5-Omni-7B "
            "to it, or correct the path."
        )
    family = families.family_of(folder)
    model = families.make_model(family, folder)
    if type(model) is not FAMILIES.get(c.family):
        raise StageError(
            f"{folder} holds a {type(model).__name__}, distill.model.family is {c.family!r}; "
            f"known are {', '.join(FAMILIES)}."
        )
    _check_agrees(c, model.config)
    return RewardModel(
        with_settings(c, model), _prompt(folder, family.load_processor(folder), model)
    )


def outline(c: ConfigDict) -> RewardModel:
    """As `reward_model_of`, for plans: the checkpoint need not be there.

    Where it is not, sizes are those of Qwen2.5-Omni-7B but for what distill.model says, and the
    text around the audios is as long as that of its chat, but says nothing.
    """
    if Path(c.checkpoint).is_dir():
        return reward_model_of(c)
    sizes = {"audio_config": c.audio.to_dict(), "text_config": c.text.to_dict()}
    model = Qwen2_5OmniThinker(Qwen2_5OmniConfig.from_dict(sizes))
    prompt = ScorePrompt(
        before=(0,) * 24,
        between=(0,) * 5,
        after=(0,) * 48,
        digit_ids=tuple(range(len(SCORES))),
        style_ids=tuple(range(len(STYLE_LABELS))),
        tone_ids=tuple(range(len(TONE_LABELS))),
    )
    return RewardModel(with_settings(c, model), prompt)


def load(reward_model: RewardModel, folder: Path, layout: Layout, seed: int = 0) -> dict[str, Any]:
    """Variables from a checkpoint's folder, where training wants them. seed: of fresh adapters."""
    rules = None if layout.mesh is None else layout.rules
    rng = jax.random.key(seed)
    return load_variables(folder, reward_model.model, mesh=layout.mesh, rules=rules, rng=rng)


def save(
    reward_model: RewardModel, variables: dict[str, Any], folder: Path, base: Path, trainable: str
) -> None:
    """Saves trained variables as a checkpoint that `load` and export read."""
    keeps_params = "params" not in split_trainable(unbox(reward_model.boxed()), trainable)[0]
    distributed.on_main(
        f"{folder} is laid out",
        lambda: trained.lay_out(folder, base=base, keeps_params=keeps_params),
    )
    meta = {"lora": {"alpha": reward_model.model.lora.alpha}} if "lora" in variables else {}
    trained.save(folder, variables, meta, keeps_params=keeps_params)


def with_settings(c: ConfigDict, model: Qwen2Audio) -> Qwen2Audio:
    """The model with adapters and types as a config's distill.model says."""
    return model.clone(
        lora=LoRA(c.lora_rank, c.lora_alpha),
        audio_lora=LoRA(c.audio_lora_rank, c.lora_alpha, tuple(c.audio_lora_targets)),
        dtype=jnp.dtype(c.dtype),
        param_dtype=jnp.dtype(c.param_dtype),
        scan_unroll=c.scan_unroll,
        remat=c.remat,
    )


def _check_agrees(c: ConfigDict, config: Any) -> None:
    """Sizes that the config speaks of are those of the checkpoint."""
    for part in ("text", "audio"):
        for name, told in c[part].items():
            found = getattr(getattr(config, part), name)
            if found != told:
                raise StageError(
                    f"config.distill.model.{part}.{name} is {told}, that of {c.checkpoint} "
                    f"{found}: correct the config, or give another distill.model.checkpoint."
                )


class _Control:
    """A chat's tokenizer as a text tokenizer that knows its control tokens."""

    def __init__(self, chat: AudioChat):
        self._tokenizer = chat.tokenizer

    def encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


def _prompt(folder: Path, chat: AudioChat | None, model: Qwen2Audio) -> ScorePrompt:
    """The chat around the two audios; what it says is cut where they stand."""
    if chat is None or chat.chat_template is None:
        raise StageError(
            f"{folder} lacks its tokenizer, preprocessor_config.json or chat template: download "
            "the release's small files beside its weights."
        )
    slot = chat.tokenizer.convert_tokens_to_ids(chat.audio_token)
    if slot != model.config.audio_token_index:
        raise StageError(
            f"{folder}: {chat.audio_token} is {slot} in the tokenizer and "
            f"{model.config.audio_token_index} in the model's config; take both from one release."
        )
    texts = [{"type": "text", "text": text} for text in QUESTION]
    audio = {"type": "audio", "audio": ""}
    turns = [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
        {"role": "user", "content": [texts[0], audio, texts[1], audio, texts[2]]},
    ]
    text = chat.apply_chat_template(turns, add_generation_prompt=True)
    before, between, after = text.split(chat.audio_token)
    try:
        return score_prompt(_Control(chat), (before, between, after))
    except ValueError as error:
        raise StageError(f"{folder}: {error}") from error
