"""Whisper (transformers: WhisperForConditionalGeneration): config, key tables, processor."""

from pathlib import Path

import jax
import jax.numpy as jnp

from paras2s_jax.convert.rules import CONV1D, Rule, dense_rules, norm_rules
from paras2s_jax.models.whisper import WhisperASR, WhisperConfig

ARCHITECTURES = ("WhisperForConditionalGeneration",)
# The output head repeats decoder.embed_tokens.
TIED_HEAD = r"(.*\.)?proj_out\.weight"
IGNORE = (TIED_HEAD,)


def make_model(folder: Path, **types) -> WhisperASR:
    """The recogniser of a released folder; types: dtype, param_dtype, scan_unroll, remat."""
    path = Path(folder) / "config.json"
    config = WhisperConfig.from_json(path)
    if not (config.decoder_layers and config.decoder_ffn_dim):
        raise ValueError(f"{path}: decoder_layers or decoder_ffn_dim missing: not a recogniser")
    return WhisperASR(config, **types)


def rules(config: WhisperConfig) -> list[Rule]:
    """Table of a WhisperASR as released."""
    return asr_rules(config)


def init(model: WhisperASR, rng: jax.Array) -> dict:
    """Fresh, boxed variables."""
    features = jnp.zeros((1, model.config.num_mel_bins, 8))
    return model.init(rng, features, decoder_input_ids=jnp.zeros((1, 1), jnp.int32))


def load_processor(folder: Path):
    """transformers' WhisperProcessor, only its feature extractor if there is no vocabulary.

    None without a preprocessor_config.json. The ids that control a transcript are another file:
    `models.whisper_ids.WhisperIds.from_json(folder / "generation_config.json")`.
    """
    from transformers import WhisperFeatureExtractor, WhisperProcessor

    folder = Path(folder)
    if not (folder / "preprocessor_config.json").is_file():
        return None
    has_words = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    kind = WhisperProcessor if has_words else WhisperFeatureExtractor
    return kind.from_pretrained(folder, local_files_only=True)


def layer_rules(source: str, target: str, over: range, attentions: tuple[str, ...]) -> list[Rule]:
    """Rules of stacked layers; source has "{i}", target is the scanned module."""
    table = norm_rules(f"{source}.final_layer_norm", f"{target}/final_layer_norm", over)
    for name in ("fc1", "fc2"):
        table += dense_rules(f"{source}.{name}", f"{target}/mlp/{name}", over)
    for attention in attentions:
        name = f"{attention}_layer_norm"
        table += norm_rules(f"{source}.{name}", f"{target}/{name}", over)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            key, path = f"{source}.{attention}.{name}", f"{target}/{attention}/{name}"
            table += dense_rules(key, path, over, use_bias=name != "k_proj")
    return table


def encoder_rules(
    config: WhisperConfig,
    *,
    prefix: str = "model.encoder.",
    target: str = "",
    final_norm: bool = True,
) -> list[Rule]:
    """Table of a WhisperEncoder; prefix, target: put before all keys and paths ("encoder/")."""
    table = [Rule(f"{prefix}embed_positions.weight", f"{target}embed_positions")]
    for name in ("conv1", "conv2"):
        table.append(Rule(f"{prefix}{name}.weight", f"{target}{name}/kernel", CONV1D))
        table.append(Rule(f"{prefix}{name}.bias", f"{target}{name}/bias"))
    over = range(config.encoder_layers)
    table += layer_rules(f"{prefix}layers.{{i}}", f"{target}layers", over, ("self_attn",))
    return table + (norm_rules(f"{prefix}layer_norm", f"{target}layer_norm") if final_norm else [])


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
    return table + norm_rules(f"{source}layer_norm", f"{target}layer_norm")


def classification_rules(config: WhisperConfig) -> list[Rule]:
    """Table of a WhisperForAudioClassification without weighted layer sum."""
    table = encoder_rules(config, prefix="encoder.", target="encoder/")
    for name in ("projector", "classifier"):
        table += dense_rules(name, name)
    return table
