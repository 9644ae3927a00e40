"""Sizes of all networks of a run, as its stages build them."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from paras2s_jax.models.bigvgan import BigVGANConfig
from paras2s_jax.models.flow_matching import FlowMatchingConfig
from paras2s_jax.models.kimi_audio import KimiAudioConfig
from paras2s_jax.models.qwen2_5_omni import OmniAudioConfig
from paras2s_jax.models.speech_tokenizer import SpeechTokenizerConfig
from paras2s_jax.models.whisper_layers import WhisperConfig
from paras2s_jax.plan.counts import RewardSizes
from paras2s_jax.plan.hardware import PlanError
from paras2s_jax.stages.assembly import outline
from paras2s_jax.stages.reward_model import outline_reward_model
from paras2s_jax.train.sharding import Layouts


@dataclasses.dataclass(frozen=True)
class Sizes:
    """All networks around a policy.

    encoder: of the continuous features. tokenizer: of the query's codes. dit, vocoder: codes to
    waves. reward: who hears them.
    """

    policy: KimiAudioConfig
    encoder: WhisperConfig
    tokenizer: SpeechTokenizerConfig
    dit: FlowMatchingConfig
    vocoder: BigVGANConfig
    reward: RewardSizes


def sizes_of(config: ConfigDict) -> Sizes:
    """Sizes of the checkpoints that a config names, or of their releases where there are none.

    Raises:
        PlanError: the config takes the small packaged parts.
    """
    if not config.policy.checkpoint or not config.distill.model.checkpoint:
        raise PlanError(
            "the small packaged parts are not planned: policy.checkpoint and "
            "distill.model.checkpoint must name folders, as in configs/kimi_audio_7b.py."
        )
    made, reward = outline(config, Layouts()), outline_reward_model(config)
    audio, prompt = reward.model.config.audio, reward.prompt
    detokenizer = made.frontend.detokenizer
    return Sizes(
        policy=made.policy.model.config,
        encoder=made.policy.encoder.config,
        tokenizer=made.frontend.speech_tokenizer.model.config,
        dit=detokenizer.dit.config,
        vocoder=detokenizer.vocoder.config,
        reward=RewardSizes(
            audio,
            reward.model.config.text,
            window=2 * audio.n_window if isinstance(audio, OmniAudioConfig) else None,
            texts=(len(prompt.before), len(prompt.between), len(prompt.after)),
        ),
    )
