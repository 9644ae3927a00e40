"""Key table of wav2vec 2.0 (transformers: Wav2Vec2Model and the classes around it)."""

import dataclasses
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import transformers

from paras2s_jax.convert.rules import CONV1D, Rule, dense_rules, norm_rules
from paras2s_jax.convert.stored import released_names
from paras2s_jax.models.wav2vec2 import (
    AgeGenderModel,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2Model,
)
from paras2s_jax.models.wave_conv import receptive_field

# Of those that train or transcribe, the encoder alone is read. The released age and gender models
# go by their keys, whatever class their config.json names.
ARCHITECTURES = (
    "Wav2Vec2Model",
    "Wav2Vec2ForPreTraining",
    "Wav2Vec2ForCTC",
    "Wav2Vec2ForSequenceClassification",
    "AgeGenderModel",
)

IGNORE = (r"quantizer\..*", r"project_(q|hid)\..*", r"lm_head\..*")

_CLASSES = {
    "none": Wav2Vec2Model,
    "classification": Wav2Vec2ForSequenceClassification,
    "age_gender": AgeGenderModel,
}
# Length and direction of the position kernel in checkpoints written before torch 2.
_OLD_WEIGHT_NORM = ("weight_g", "weight_v")


def matches(folder: str | Path) -> bool:
    """Whether the folder holds a wav2vec 2.0, of whatever class."""
    path = Path(folder) / "config.json"
    return path.is_file() and '"model_type": "wav2vec2"' in path.read_text()


def make_model(folder: str | Path, **types) -> nn.Module:
    """The model of a folder; types: dtype, param_dtype, scan_unroll, remat.

    config.json tells the sizes. How names are spelled, and whether there are heads for age and
    gender, is told by the checkpoint's keys where there are any.
    """
    folder = Path(folder)
    config = Wav2Vec2Config.from_json(folder / "config.json")
    keys = released_names(folder)
    if "age.out_proj.weight" in keys:
        config = dataclasses.replace(config, head="age_gender", prefix="wav2vec2.")
    if any(key.endswith(f"pos_conv_embed.conv.{_OLD_WEIGHT_NORM[0]}") for key in keys):
        config = dataclasses.replace(config, weight_norm_keys=_OLD_WEIGHT_NORM)
    return _CLASSES[config.head](config, **types)


def init(model: nn.Module, rng) -> dict:
    """Variables of the model, from one frame of silence."""
    size = receptive_field(model.config.conv_kernel, model.config.conv_stride)
    return model.init(rng, jnp.zeros((1, size)))


def load_processor(folder: str | Path) -> transformers.Wav2Vec2FeatureExtractor | None:
    """Waves -> input_values, as the checkpoint was trained; None if it does not say how."""
    if not (Path(folder) / "preprocessor_config.json").is_file():
        return None
    return transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder)


def rules(config: Wav2Vec2Config) -> list[Rule]:
    """Table of the model that `config.head` names."""
    if config.head == "none":
        return encoder_rules(config, config.prefix, "")
    table = encoder_rules(config, config.prefix, "wav2vec2/")
    if config.head == "age_gender":
        for name in ("age", "gender"):
            table += dense_rules(f"{name}.dense", f"{name}_dense")
            table += dense_rules(f"{name}.out_proj", f"{name}_out")
        return table
    if config.use_weighted_layer_sum:
        table.append(Rule("layer_weights", "layer_weights"))
    return table + dense_rules("projector", "projector") + dense_rules("classifier", "classifier")


def encoder_rules(config: Wav2Vec2Config, prefix: str, target: str) -> list[Rule]:
    """Table of a Wav2Vec2Model; prefix, target: put before all keys and paths ("wav2vec2/")."""
    length, direction = config.weight_norm_keys
    key, path = f"{prefix}encoder.pos_conv_embed.conv", f"{target}pos_conv_embed"
    table = [
        *_conv_rules(config, f"{prefix}feature_extractor", f"{target}feature_extractor"),
        *norm_rules(f"{prefix}feature_projection.layer_norm", f"{target}feature_norm"),
        *dense_rules(f"{prefix}feature_projection.projection", f"{target}feature_projection"),
        *norm_rules(f"{prefix}encoder.layer_norm", f"{target}layer_norm"),
        Rule(f"{key}.bias", f"{path}/bias"),
        Rule(f"{key}.{length}", f"{path}/length", CONV1D),
        Rule(f"{key}.{direction}", f"{path}/direction", CONV1D),
    ]
    if config.has_mask_embed:
        table.append(Rule(f"{prefix}masked_spec_embed", f"{target}masked_spec_embed"))
    over = range(config.num_hidden_layers)
    key, path = f"{prefix}encoder.layers.{{i}}", f"{target}layers"
    for name in ("layer_norm", "final_layer_norm"):
        table += norm_rules(f"{key}.{name}", f"{path}/{name}", over)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        table += dense_rules(f"{key}.attention.{name}", f"{path}/attention/{name}", over)
    for source, name in (("intermediate_dense", "fc1"), ("output_dense", "fc2")):
        table += dense_rules(f"{key}.feed_forward.{source}", f"{path}/feed_forward/{name}", over)
    return table


def _conv_rules(config: Wav2Vec2Config, prefix: str, target: str) -> list[Rule]:
    over = range(len(config.conv_dim))
    key, path = f"{prefix}.conv_layers.{{i}}", f"{target}/conv_{{i}}"
    table = [Rule(f"{key}.conv.weight", f"{path}/kernel", CONV1D, over)]
    if config.conv_bias:
        table.append(Rule(f"{key}.conv.bias", f"{path}/bias", over=over))
    normed = over if config.feat_extract_norm == "layer" else range(1)
    return table + norm_rules(f"{key}.layer_norm", f"{target}/norm_{{i}}", normed)
