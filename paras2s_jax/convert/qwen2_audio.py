"""Key table of Qwen2-Audio (transformers: Qwen2AudioForConditionalGeneration, as released)."""

from paras2s_jax.convert import qwen2, whisper
from paras2s_jax.convert.rules import LINEAR, Rule
from paras2s_jax.models.qwen2_audio import Qwen2AudioConfig


def rules(config: Qwen2AudioConfig) -> list[Rule]:
    """Table of a Qwen2Audio."""
    projector = "multi_modal_projector.linear"
    return [
        *whisper.encoder_rules(config.audio, prefix="audio_tower.", target="audio_tower/"),
        Rule(f"{projector}.weight", "projector/kernel", LINEAR),
        Rule(f"{projector}.bias", "projector/bias"),
        *qwen2.rules(config.text, prefix="language_model.", target="language_model/"),
    ]
