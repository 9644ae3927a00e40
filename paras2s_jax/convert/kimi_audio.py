"""Kimi-Audio's language model (released: MoonshotKimiaForCausalLM) <-> KimiAudio.

The other parts of the release lie in sub-folders and are families of their own.
"""

from pathlib import Path

import jax
import jax.numpy as jnp

from paras2s_jax.convert.qwen2 import layer_rules
from paras2s_jax.convert.rules import LINEAR, Rule
from paras2s_jax.data.tiktoken_vocabulary import FILE, TiktokenVocabulary
from paras2s_jax.models.kimi_audio import KimiAudio, KimiAudioConfig

ARCHITECTURES = ("MoonshotKimiaForCausalLM",)
# Sub-folders of the release that are checkpoints of other families, converted along with it. The
# last is a release of its own (THUDM/glm-4-voice-tokenizer), to be put there.
WHISPER, DETOKENIZER, VOCODER = "whisper-large-v3", "audio_detokenizer", "vocoder"
SPEECH_TOKENIZER = "glm-4-voice-tokenizer"
PARTS = (WHISPER, DETOKENIZER, VOCODER, SPEECH_TOKENIZER)
# The release stores the rotary frequencies of all 34 layers, and its training code a Whisper.
IGNORE = (
    r"model\.(mimo_)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    r"(model\.)?(whisper_model|speech_encoder|audio_tower)\..*",
)


def make_model(folder: Path, **types) -> KimiAudio:
    """The model that folder/config.json describes; types: fields of KimiAudio."""
    return KimiAudio(KimiAudioConfig.from_json(Path(folder) / "config.json"), **types)


def init(model: KimiAudio, rng: jax.Array) -> dict:
    """Fresh variables, boxed."""
    ids = jnp.zeros((1, 2), jnp.int32)
    return model.init(rng, ids, ids)


def load_processor(folder: Path) -> TiktokenVocabulary | None:
    """The text vocabulary, None where the folder has none."""
    return TiktokenVocabulary.load(folder) if (Path(folder) / FILE).is_file() else None


def rules(config: KimiAudioConfig) -> list[Rule]:
    """Table of a KimiAudio: main layers split at the branch into trunk and text tail."""
    trunk = config.stack_sizes["trunk"]
    adaptor = "model.vq_adaptor.layers"
    table = [
        Rule("model.embed_tokens.weight", "embed_tokens/embedding"),
        *layer_rules("model.layers.{i}", "trunk/layers", range(trunk)),
        *layer_rules(
            "model.layers.{i}", "text_tail/layers", range(trunk, config.num_hidden_layers)
        ),
        *layer_rules("model.mimo_layers.{i}", "audio_tail/layers", range(config.kimia_mimo_layers)),
        Rule("model.norm.weight", "text_norm/scale"),
        Rule("model.mimo_norm.weight", "audio_norm/scale"),
        Rule("lm_head.weight", "text_head/kernel", LINEAR),
        Rule("mimo_output.weight", "audio_head/kernel", LINEAR),
        Rule(f"{adaptor}.4.weight", "adaptor/norm/scale"),
        Rule(f"{adaptor}.4.bias", "adaptor/norm/bias"),
    ]
    for number, name in ((0, "fc1"), (3, "fc2")):
        table.append(Rule(f"{adaptor}.{number}.weight", f"adaptor/{name}/kernel", LINEAR))
        table.append(Rule(f"{adaptor}.{number}.bias", f"adaptor/{name}/bias"))
    return table
