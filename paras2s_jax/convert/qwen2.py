"""Key table of Qwen2 (Hugging Face: Qwen2ForCausalLM)."""

from paras2s_jax.convert.rules import LINEAR, Rule
from paras2s_jax.models.qwen2 import Qwen2Config


def layer_rules(source: str, target: str, over: range) -> list[Rule]:
    """Rules of stacked decoder layers; source has "{i}", target is the scanned module."""
    rules = [
        Rule(f"{source}.{norm}.weight", f"{target}/{norm}/scale", over=over)
        for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        key, path = f"{source}.self_attn.{name}", f"{target}/self_attn/{name}"
        rules.append(Rule(f"{key}.weight", f"{path}/kernel", LINEAR, over))
        if name != "o_proj":
            rules.append(Rule(f"{key}.bias", f"{path}/bias", over=over))
    for name in ("gate_proj", "up_proj", "down_proj"):
        key, path = f"{source}.mlp.{name}.weight", f"{target}/mlp/{name}/kernel"
        rules.append(Rule(key, path, LINEAR, over))
    return rules


def rules(config: Qwen2Config, *, prefix: str = "", target: str = "") -> list[Rule]:
    """Table of a Qwen2LM. prefix, target: put before all keys ("thinker.") and paths ("lm/").

    A checkpoint with tied embeddings may repeat the table as lm_head.weight: let
    import_params ignore it.
    """
    table = [
        Rule(f"{prefix}model.embed_tokens.weight", f"{target}embed_tokens/embedding"),
        Rule(f"{prefix}model.norm.weight", f"{target}norm/scale"),
        *layer_rules(
            f"{prefix}model.layers.{{i}}", f"{target}stack/layers", range(config.num_hidden_layers)
        ),
    ]
    if not config.tie_word_embeddings:
        table.append(Rule(f"{prefix}lm_head.weight", f"{target}lm_head/kernel", LINEAR))
    return table
