"""Key table of Qwen2 and Llama (Hugging Face: Qwen2ForCausalLM, LlamaForCausalLM)."""

from pathlib import Path

import jax
import jax.numpy as jnp

from paras2s_jax.convert.rules import LINEAR, Rule
from paras2s_jax.models.qwen2 import Qwen2Config, Qwen2LM

ARCHITECTURES = ("Qwen2ForCausalLM", "LlamaForCausalLM")
# A tied head repeats the table; old Llama checkpoints hold the rotary frequencies.
IGNORE = (r"lm_head\.weight", r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def make_model(folder: Path, **types) -> Qwen2LM:
    """The model of folder/config.json. types: fields of Qwen2LM (dtype, param_dtype, …)."""
    return Qwen2LM(Qwen2Config.from_json(Path(folder) / "config.json"), **types)


def init(model: Qwen2LM, rng: jax.Array) -> dict:
    """Variables of the model, boxed with their logical axes."""
    return model.init(rng, jnp.zeros((1, 2), jnp.int32))


def load_processor(folder: Path) -> object | None:
    """The tokenizer, or None if the folder has none."""
    if not any((Path(folder) / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def layer_rules(source: str, target: str, over: range, *, attention_bias=True) -> list[Rule]:
    """Rules of stacked decoder layers; source has "{i}", target is the scanned module."""
    rules = [
        Rule(f"{source}.{norm}.weight", f"{target}/{norm}/scale", over=over)
        for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        key, path = f"{source}.self_attn.{name}", f"{target}/self_attn/{name}"
        rules.append(Rule(f"{key}.weight", f"{path}/kernel", LINEAR, over))
        if attention_bias and name != "o_proj":
            rules.append(Rule(f"{key}.bias", f"{path}/bias", over=over))
    for name in ("gate_proj", "up_proj", "down_proj"):
        key, path = f"{source}.mlp.{name}.weight", f"{target}/mlp/{name}/kernel"
        rules.append(Rule(key, path, LINEAR, over))
    return rules


def rules(config: Qwen2Config, *, prefix: str = "", target: str = "") -> list[Rule]:
    """Table of a Qwen2LM. prefix, target: put before all keys ("thinker.") and paths ("lm/").

    A checkpoint with tied embeddings may repeat the table as lm_head.weight: IGNORE has it.
    """
    table = [
        Rule(f"{prefix}model.embed_tokens.weight", f"{target}embed_tokens/embedding"),
        Rule(f"{prefix}model.norm.weight", f"{target}norm/scale"),
        *layer_rules(
            f"{prefix}model.layers.{{i}}",
            f"{target}stack/layers",
            range(config.num_hidden_layers),
            attention_bias=config.attention_bias,
        ),
    ]
    if not config.tie_word_embeddings:
        table.append(Rule(f"{prefix}lm_head.weight", f"{target}lm_head/kernel", LINEAR))
    return table
