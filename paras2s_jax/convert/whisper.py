"""Key tables of Whisper (transformers: modeling_whisper.py)."""

from paras2s_jax.convert.rules import CONV1D, LINEAR, Rule
from paras2s_jax.models.whisper import WhisperConfig

# The output head repeats decoder.embed_tokens: let import_params ignore it.
TIED_HEAD = r"(.*\.)?proj_out\.weight"


def _norm(key: str, path: str, over: range | None = None) -> list[Rule]:
    return [
        Rule(f"{key}.weight", f"{path}/scale", over=over),
        Rule(f"{key}.bias", f"{path}/bias", over=over),
    ]


def _dense(key: str, path: str, over: range | None = None, use_bias: bool = True) -> list[Rule]:
    kernel = Rule(f"{key}.weight", f"{path}/kernel", LINEAR, over)
    return [kernel, Rule(f"{key}.bias", f"{path}/bias", over=over)] if use_bias else [kernel]


def layer_rules(source: str, target: str, over: range, attentions: tuple[str, ...]) -> list[Rule]:
    """Rules of stacked layers; source has "{i}", target is the scanned module."""
    table = _norm(f"{source}.final_layer_norm", f"{target}/final_layer_norm", over)
    for name in ("fc1", "fc2"):
        table += _dense(f"{source}.{name}", f"{target}/mlp/{name}", over)
    for attention in attentions:
        table += _norm(f"{source}.{attention}_layer_norm", f"{target}/{attention}_layer_norm", over)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            key, path = f"{source}.{attention}.{name}", f"{target}/{attention}/{name}"
            table += _dense(key, path, over, use_bias=name != "k_proj")
    return table


def encoder_rules(
    config: WhisperConfig, *, prefix: str = "model.encoder.", target: str = ""
) -> list[Rule]:
    """Table of a WhisperEncoder; prefix, target: put before all keys and paths ("encoder/")."""
    table = [Rule(f"{prefix}embed_positions.weight", f"{target}embed_positions")]
    for name in ("conv1", "conv2"):
        table.append(Rule(f"{prefix}{name}.weight", f"{target}{name}/kernel", CONV1D))
        table.append(Rule(f"{prefix}{name}.bias", f"{target}{name}/bias"))
    over = range(config.encoder_layers)
    table += layer_rules(f"{prefix}layers.{{i}}", f"{target}layers", over, ("self_attn",))
    return table + _norm(f"{prefix}layer_norm", f"{target}layer_norm")


def asr_rules(config: WhisperConfig, *, prefix: str = "model.") -> list[Rule]:
    """Table of a WhisperASR (WhisperForConditionalGeneration); ignore TIED_HEAD."""
    source, target = f"{prefix}decoder.", "decoder/"
    table = encoder_rules(config, prefix=f"{prefix}encoder.", target="encoder/")
    table += [
        Rule(f"{source}embed_tokens.weight", f"{target}embed_tokens/embedding"),
        Rule(f"{source}embed_positions.weight", f"{target}embed_positions"),
    ]
    over = range(config.decoder_layers)
    attentions = ("self_attn", "encoder_attn")
    table += layer_rules(f"{source}layers.{{i}}", f"{target}layers", over, attentions)
    return table + _norm(f"{source}layer_norm", f"{target}layer_norm")


def classification_rules(config: WhisperConfig) -> list[Rule]:
    """Table of a WhisperForAudioClassification without weighted layer sum."""
    table = encoder_rules(config, prefix="encoder.", target="encoder/")
    for name in ("projector", "classifier"):
        table += _dense(name, name)
    return table
