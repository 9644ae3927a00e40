"""Sizes of a Qwen2- or Llama-shaped decoder, as Hugging Face's config.json gives them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from paras2s_jax.models.layers import RopeScaling

# What transformers assumes where a config is silent (Qwen2Config, LlamaConfig).
_DEFAULTS = {
    "qwen2": {
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 22_016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "attention_bias": True,
    },
    "llama": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "attention_bias": False,
    },
}
_ROPE_THETA = 10_000.0
# A config.json of a model (not of its part) always has these.
_SIZES = tuple(_DEFAULTS["llama"])[:5]


@dataclass(frozen=True)
class Qwen2Config:
    """Sizes of a Qwen2 decoder; names follow Hugging Face's config.json.

    attention_bias: whether q, k and v have one (Qwen2: yes, Llama: no).
    mrope_section: how many of the head's frequencies follow each position axis in turn, where
    tokens have three positions (layers.rope_angles).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int | None = None
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = True
    rope_scaling: RopeScaling | None = None
    mrope_section: tuple[int, ...] | None = None

    @property
    def width_per_head(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @classmethod
    def from_json(cls, path: str | Path) -> "Qwen2Config":
        """Reads the config.json of a Qwen2ForCausalLM or a LlamaForCausalLM.

        Raises:
            ValueError: a size is missing, or the config asks for what the model does not have.
        """
        values = json.loads(Path(path).read_text())
        missing = [name for name in _SIZES if name not in values]
        if missing:
            raise ValueError(
                f"{path}: keys missing from the config: {', '.join(missing)}; "
                "give the config.json of a Qwen2 or Llama language model"
            )
        return cls.from_dict(values, str(path))

    @classmethod
    def from_dict(cls, values: Mapping, where: str = "config") -> "Qwen2Config":
        """As from_json, from a part of a file such as "text_config", which may leave out defaults.

        where: what an error calls the values.
        """
        kind = values.get("model_type", "qwen2")
        if kind not in _DEFAULTS:
            raise ValueError(f"{where}: model_type is {kind!r}, not {' or '.join(_DEFAULTS)}")
        values = _DEFAULTS[kind] | {k: v for k, v in values.items() if v is not None}
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        wrong = _unsupported(values, kind) + _unsupported_rope(rope)
        if wrong:
            raise ValueError(f"{where}: the model does not have {', '.join(wrong)}")
        made = {
            "attention_bias": _DEFAULTS[kind]["attention_bias"],
            "num_key_value_heads": values.get("num_key_value_heads", values["num_attention_heads"]),
            "rope_theta": rope.get("rope_theta", values.get("rope_theta", _ROPE_THETA)),
            "rope_scaling": _scaling(rope, values),
            "mrope_section": tuple(rope["mrope_section"]) if "mrope_section" in rope else None,
        }
        made = {f.name: values[f.name] for f in fields(cls) if f.name in values} | made
        return cls(**made)


def _unsupported(values: Mapping, kind: str) -> list[str]:
    wrong = []
    if values.get("hidden_act", "silu") != "silu":
        wrong.append(f"hidden_act {values['hidden_act']!r}")
    # Qwen2: layers from max_window_layers on have a window, if there is one.
    num_full = values.get("max_window_layers", 28) if values.get("use_sliding_window") else None
    if "sliding_attention" in values.get("layer_types", ()) or (
        num_full is not None and num_full < values["num_hidden_layers"]
    ):
        wrong.append("sliding-window attention")
    if kind == "llama":
        # Llama's attention_bias would put one on the output projection as well.
        wrong += [name for name in ("attention_bias", "mlp_bias") if values.get(name)]
    return wrong


def _kind(rope: Mapping) -> str:
    return rope.get("rope_type", rope.get("type", "default"))


def _unsupported_rope(rope: Mapping) -> list[str]:
    wrong = []
    # "mrope" is an old name of the default type with sections.
    if _kind(rope) not in ("default", "mrope", "llama3"):
        wrong.append(f"rope type {_kind(rope)!r}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        wrong.append("partial_rotary_factor")
    return wrong


def _scaling(rope: Mapping, values: Mapping) -> RopeScaling | None:
    if _kind(rope) != "llama3":
        return None
    original = rope.get("original_max_position_embeddings", values.get("max_position_embeddings"))
    return RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_position_embeddings=original,
    )
