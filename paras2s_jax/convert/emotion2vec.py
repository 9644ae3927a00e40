"""Key table of emotion2vec (funasr: Emotion2vec), released as config.yaml, tokens.txt, weights."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp

from paras2s_jax.convert.rules import CONV1D, Rule, dense_rules, norm_rules
from paras2s_jax.convert.stored import released_names
from paras2s_jax.models.emotion2vec import Emotion2vec, Emotion2vecConfig, Emotion2vecProcessor

# There is no config.json that could name one: `matches` tells.
ARCHITECTURES = ()

# The decoder and the teacher, which only the pretraining needs.
IGNORE = (r"(d2v_model\.)?modality_encoders\.AUDIO\.decoder\..*", r"(d2v_model\.)?_ema(\..*)?")

_PREFIX = "d2v_model."


def matches(folder: str | Path) -> bool:
    """Whether the folder holds a released emotion2vec."""
    path = Path(folder) / "config.yaml"
    return path.is_file() and any(
        line.split("#")[0].split() == ["model:", "Emotion2vec"]
        for line in path.read_text().splitlines()
    )


def make_model(folder: str | Path, **types) -> Emotion2vec:
    """The model of a folder; `types` are its dtype, param_dtype, scan_unroll, remat."""
    folder = Path(folder)
    config = Emotion2vecConfig.from_yaml(folder / "config.yaml", _tokens(folder))
    names = released_names(folder)
    if names:
        is_nested = any(name.startswith(_PREFIX) for name in names)
        config = dataclasses.replace(config, prefix=_PREFIX if is_nested else "")
    return Emotion2vec(config, **types)


def init(model: Emotion2vec, rng) -> dict:
    """Variables of the model, from one frame of silence."""
    return model.init(rng, jnp.zeros((1, 1)))


def load_processor(folder: str | Path) -> Emotion2vecProcessor:
    """What prepares waves for the model and names its scores."""
    config = Emotion2vecConfig.from_yaml(Path(folder) / "config.yaml", _tokens(Path(folder)))
    return Emotion2vecProcessor(config.token_list, config.normalize)


def _tokens(folder: Path) -> list[str]:
    path = folder / "tokens.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [line.strip() for line in lines if line.strip()]


def rules(config: Emotion2vecConfig) -> list[Rule]:
    """Table of an Emotion2vec."""
    encoder = f"{config.prefix}modality_encoders.AUDIO"
    positions = range(1, config.conv_pos_depth + 1)
    table = [
        *_conv_rules(config, f"{encoder}.local_encoder.conv_layers.{{i}}"),
        *norm_rules(f"{encoder}.project_features.1", "project_norm"),
        *dense_rules(f"{encoder}.project_features.2", "project_features"),
        *norm_rules(f"{encoder}.context_encoder.norm", "context_norm"),
        *_block_rules(
            f"{encoder}.context_encoder.blocks.{{i}}", "prenet", range(config.prenet_depth)
        ),
        *_block_rules(f"{config.prefix}blocks.{{i}}", "blocks", range(config.depth)),
    ]
    key, path = f"{encoder}.relative_positional_encoder.{{i}}.0", "positions_{i}"
    table.append(Rule(f"{key}.weight", f"{path}/kernel", CONV1D, positions))
    table.append(Rule(f"{key}.bias", f"{path}/bias", over=positions))
    if config.num_extra_tokens:
        table.append(Rule(f"{encoder}.extra_tokens", "extra_tokens"))
    if config.use_alibi_encoder:
        table.append(Rule(f"{encoder}.alibi_scale", "alibi_scale"))
    return table + (dense_rules("proj", "proj") if config.token_list else [])


def _conv_rules(config: Emotion2vecConfig, key: str) -> list[Rule]:
    over = range(len(config.feature_encoder_spec))
    table = [Rule(f"{key}.0.weight", "local_encoder/conv_{i}/kernel", CONV1D, over)]
    if config.extractor_mode == "layer_norm":
        return table + norm_rules(f"{key}.2.1", "local_encoder/norm_{i}", over)
    return table + norm_rules(f"{key}.2", "local_encoder/norm_{i}", range(1))


def _block_rules(key: str, path: str, over: range) -> list[Rule]:
    table = []
    for name in ("norm1", "norm2"):
        table += norm_rules(f"{key}.{name}", f"{path}/{name}", over)
    for source, target in (("attn.qkv", "qkv"), ("attn.proj", "proj")):
        table += dense_rules(f"{key}.{source}", f"{path}/{target}", over)
    for name in ("fc1", "fc2"):
        table += dense_rules(f"{key}.mlp.{name}", f"{path}/mlp/{name}", over)
    return table
