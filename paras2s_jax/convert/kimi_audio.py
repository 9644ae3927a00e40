"""Key table of Kimi-Audio (released names: MoonshotKimiaForCausalLM)."""

from paras2s_jax.convert.qwen2 import layer_rules
from paras2s_jax.convert.rules import LINEAR, Rule
from paras2s_jax.models.kimi_audio import KimiAudioConfig


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
