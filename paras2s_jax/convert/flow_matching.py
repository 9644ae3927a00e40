"""Key table of Kimi-Audio's flow-matching network (audio_detokenizer/ of the release)."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import yaml

from paras2s_jax.convert.rules import ConversionError, Rule, dense_rules
from paras2s_jax.models.flow_matching import FlowMatchingConfig, FlowMatchingDiT

ARCHITECTURES: tuple[str, ...] = ()  # The release has no config.json; see `matches`.
# Whatever else was trained beside the network, and a buffer that only remembers a type.
IGNORE = (r"(?!speech_model\.).*", r"speech_model\.position_embedding\._float_tensor")
PREFIX = "speech_model."
CONFIG_FILE = "config.yaml"


def matches(folder: Path) -> bool:
    """Whether the folder holds a flow-matching network as released."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        return False
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConversionError(f"{path} is not YAML; download it again") from error
    model = values.get("model") if isinstance(values, dict) else None
    return isinstance(model, dict) and "dit" in model


def make_model(folder: Path, **types) -> nn.Module:
    """The network of folder/config.yaml; types: FlowMatchingDiT's other fields."""
    return FlowMatchingDiT(FlowMatchingConfig.from_yaml(Path(folder) / CONFIG_FILE), **types)


def rules(config: FlowMatchingConfig) -> list[Rule]:
    """Table of a FlowMatchingDiT."""
    over = range(config.depth)
    dense = {
        "input_linear": "input_linear",
        "t_embedder.mlp.0": "t_fc1",
        "t_embedder.mlp.2": "t_fc2",
        "final_layer.adaLN_modulation.1": "final_modulation",
        "final_layer.linear": "final_linear",
    }
    stacked = {
        "attn.qkv": "attn/qkv",
        "attn.proj": "attn/proj",
        "mlp.fc1": "fc1",
        "mlp.fc2": "fc2",
        "adaLN_modulation.1": "adaLN_modulation",
    }
    pairs = [(key, path, None) for key, path in dense.items()]
    pairs += [(f"blocks.{{i}}.{key}", f"blocks/{path}", over) for key, path in stacked.items()]
    embedding = "semantic_token_embedding"
    table = [Rule(f"{PREFIX}{embedding}.weight", f"{embedding}/embedding")]
    for key, path, numbers in pairs:
        table += dense_rules(f"{PREFIX}{key}", path, numbers)
    return table


def init(model: FlowMatchingDiT, rng: jax.Array):
    """Variables of one frame of one code."""
    frame = jnp.zeros((1, 1, model.config.input_size))
    return model.init(rng, frame, jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32))


def load_processor(folder: Path) -> None:
    """Codes go in as they are."""
