"""The thinker of Qwen2.5-Omni (transformers: Qwen2_5OmniThinkerForConditionalGeneration)."""

from pathlib import Path

from paras2s_jax.convert import qwen2, qwen2_audio, whisper
from paras2s_jax.convert.rules import CONV1D, Rule, dense_rules, norm_rules
from paras2s_jax.data.audio_chat import AudioChat
from paras2s_jax.models.qwen2_5_omni import Qwen2_5OmniConfig, Qwen2_5OmniThinker

# The release names the model as transformers did before it had the class.
ARCHITECTURES = (
    "Qwen2_5OmniModel",
    "Qwen2_5OmniForConditionalGeneration",
    "Qwen2_5OmniThinkerForConditionalGeneration",
)
IGNORE = (r"talker\..*", r"token2wav\..*", r"(thinker\.)?visual\..*")
# The same two arguments as Qwen2-Audio's.
init = qwen2_audio.init


def make_model(folder: Path, **types) -> Qwen2_5OmniThinker:
    """The model of folder/config.json."""
    return Qwen2_5OmniThinker(Qwen2_5OmniConfig.from_json(Path(folder) / "config.json"), **types)


def rules(config: Qwen2_5OmniConfig) -> list[Rule]:
    """Table of a Qwen2_5OmniThinker."""
    prefix = "thinker." if config.is_whole else ""
    source, target = f"{prefix}audio_tower.", "audio_tower/"
    table = [Rule(f"{source}audio_bos_eos_token.weight", f"{target}audio_bos_eos_token")]
    for name in ("conv1", "conv2"):
        table.append(Rule(f"{source}{name}.weight", f"{target}{name}/kernel", CONV1D))
        table.append(Rule(f"{source}{name}.bias", f"{target}{name}/bias"))
    over = range(config.audio.encoder_layers)
    table += whisper.layer_rules(f"{source}layers.{{i}}", f"{target}layers", over, ("self_attn",))
    table += norm_rules(f"{source}ln_post", f"{target}ln_post")
    table += dense_rules(f"{source}proj", f"{target}proj")
    return table + qwen2.rules(config.text, prefix=prefix, target="language_model/")


def memory_names(config: Qwen2_5OmniConfig) -> dict[str, str]:
    """How transformers 5 calls the thinker's modules in memory -> in checkpoints.

    Of a whole release it is the thinker alone that gets adapters, as its own class loads it.
    """
    prefix = "thinker." if config.is_whole else ""
    return {
        "model.language_model.": f"{prefix}model.",
        "lm_head": f"{prefix}lm_head",
        "model.": prefix,
    }


def load_processor(folder: Path) -> AudioChat | None:
    """Text and audio -> arguments of the model; None if the folder has no vocabulary."""
    return AudioChat.load(folder, padding_side="left")
