"""wav2vec 2.0 (arXiv 2006.11477): encoder, clip classifier, and audEERING's age and gender model.

Names and arithmetic follow transformers' modeling_wav2vec2.py. Without a mask all samples are
heard, as there. With one, a row equals the row alone: where the first convolution has a group norm
(base models) its statistics run over the row's own frames. There transformers asks for zeros and no
mask instead, and lets them shift the statistics, so rows of a batch differ from the rows alone.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

from paras2s_jax.models import axes
from paras2s_jax.models.layers import Dense, LayerNorm
from paras2s_jax.models.lora import NO_LORA
from paras2s_jax.models.placement import constrain
from paras2s_jax.models.wave_conv import NORMS, SameConv, WaveConv, mean_over_time
from paras2s_jax.models.whisper_layers import Attention, FeedForward, scan_layers

# The gender head's classes, in order (model card of wav2vec2-large-robust-24-ft-age-gender).
GENDERS = ("female", "male", "child")

HEADS = ("none", "classification", "age_gender")

# What config.json may ask for and these modules do not have.
_UNSUPPORTED = {
    "hidden_act": ("gelu",),
    "feat_extract_activation": ("gelu",),
    "add_adapter": (False,),
    "adapter_attn_dim": (None,),
}


@dataclass(frozen=True)
class Wav2Vec2Config:
    """Names and defaults are those of transformers' Wav2Vec2Config, but for the last three.

    id2label: names of a classifier's outputs, in order. head: one of HEADS. prefix: what stands
    before the encoder's keys in a checkpoint. weight_norm_keys: how it spells the length and the
    direction of the position kernel (before torch 2: weight_g and weight_v).
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    layer_norm_eps: float = 1e-5
    feat_extract_norm: str = "group"
    conv_dim: tuple[int, ...] = (512,) * 7
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_bias: bool = False
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    do_stable_layer_norm: bool = False
    mask_time_prob: float = 0.05
    mask_feature_prob: float = 0.0
    use_weighted_layer_sum: bool = False
    classifier_proj_size: int = 256
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    head: str = "none"
    prefix: str = ""
    weight_norm_keys: tuple[str, str] = (
        "parametrizations.weight.original0",
        "parametrizations.weight.original1",
    )

    @property
    def has_mask_embed(self) -> bool:
        """Whether the checkpoint holds the vector that SpecAugment puts over masked frames."""
        return self.mask_time_prob > 0 or self.mask_feature_prob > 0

    @classmethod
    def from_json(cls, path: str | Path) -> "Wav2Vec2Config":
        """Reads a transformers config.json, which may leave out what equals the defaults.

        Raises ValueError naming file, key and remedy for another model type and for parts that
        these modules do not have.
        """
        values: Mapping = json.loads(Path(path).read_text())
        kind = values.get("model_type")
        if kind != "wav2vec2":
            raise ValueError(f"{path}: model_type is {kind!r}; give the folder of a wav2vec2 model")
        for key, known in _UNSUPPORTED.items():
            if values.get(key, known[0]) not in known:
                raise ValueError(
                    f"{path}: {key} is {values[key]!r}, supported is {known[0]!r}; "
                    "choose a checkpoint without it"
                )
        if values.get("feat_extract_norm", "group") not in NORMS:
            raise ValueError(f"{path}: feat_extract_norm must be one of {', '.join(NORMS)}")
        found = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        if "id2label" in found:
            labels = sorted(found["id2label"].items(), key=lambda item: int(item[0]))
            found["id2label"] = tuple(label for _, label in labels)
        found = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
        architecture = (values.get("architectures") or ["Wav2Vec2Model"])[0]
        if architecture == "AgeGenderModel":
            found["head"] = "age_gender"
        elif architecture == "Wav2Vec2ForSequenceClassification":
            found["head"] = "classification"
        if architecture != "Wav2Vec2Model":
            found["prefix"] = "wav2vec2."
        return cls(**found)


class EncoderLayer(nn.Module):
    """Post-norm block, or pre-norm with do_stable_layer_norm. emit: returns its output as well."""

    config: Wav2Vec2Config
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    emit: bool = False

    @nn.compact
    def __call__(self, x, key_mask):
        """x: float[B, A, D]; key_mask: bool[B, 1, A] or None."""
        c, types = self.config, (self.dtype, self.param_dtype)
        norm = LayerNorm(c.layer_norm_eps, *types, name="layer_norm")
        final_norm = LayerNorm(c.layer_norm_eps, *types, name="final_layer_norm")
        attention = Attention(
            c.num_attention_heads, NO_LORA, *types, key_bias=True, name="attention"
        )
        feed_forward = FeedForward(c.intermediate_size, NO_LORA, *types, name="feed_forward")
        if c.do_stable_layer_norm:
            y = norm(x)
            x = x + attention(y, y, mask=key_mask)[0]
            x = x + feed_forward(final_norm(x))
        else:
            x = norm(x + attention(x, x, mask=key_mask)[0])
            x = final_norm(x + feed_forward(x))
        x = constrain(x, (axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_EMBED))
        return x, x if self.emit else None


class Wav2Vec2Model(nn.Module):
    """Waves at 16 kHz -> hidden states at 50 Hz (transformers: Wav2Vec2Model)."""

    config: Wav2Vec2Config
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    scan_unroll: int = 1
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        input_values: jax.Array,
        attention_mask: jax.Array | None = None,
        mask_time_indices: jax.Array | None = None,
        *,
        emit: tuple[str, ...] = (),
    ):
        """Encodes input_values: float[B, L], standardised where the checkpoint's processor does so.

        attention_mask: bool or int [B, L], real samples first; mask_time_indices: bool[B, A],
        frames to be hidden by masked_spec_embed (SpecAugment, to train with). A clip of less than
        25 ms is heard as if silence followed.

        Returns:
          last_hidden_state: float[B, A, D], zero where masked.
          out: "mask" bool[B, A] or None; "extract_features" float[B, A, conv_dim[-1]], normed
            convolution outputs; if named in emit, "hidden_states" float[layers + 1, B, A, D],
            what enters the first layer and what each one returns.
        """
        c, types = self.config, (self.dtype, self.param_dtype)
        x, mask = WaveConv(
            c.conv_dim,
            c.conv_kernel,
            c.conv_stride,
            c.feat_extract_norm,
            c.conv_bias,
            *types,
            name="feature_extractor",
        )(input_values.astype(self.dtype), attention_mask)
        features = LayerNorm(c.layer_norm_eps, *types, name="feature_norm")(x)
        x = Dense(
            c.hidden_size,
            kernel_axes=(axes.FEATURES, axes.EMBED),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="feature_projection",
        )(features)
        x = self._hide(x, mask_time_indices)
        x = x if mask is None else jnp.where(mask[..., None], x, 0)
        positions = SameConv(
            c.num_conv_pos_embeddings,
            c.num_conv_pos_embedding_groups,
            True,
            *types,
            name="pos_conv_embed",
        )
        x = x + nn.gelu(positions(x), approximate=False)
        norm = LayerNorm(c.layer_norm_eps, *types, name="layer_norm")
        x = first = x if c.do_stable_layer_norm else norm(x)
        stack = scan_layers(
            EncoderLayer, c.num_hidden_layers, self.scan_unroll, self.remat, nn.broadcast
        )
        layers = stack(c, *types, "hidden_states" in emit, name="layers")
        x, emitted = layers(x, None if mask is None else mask[:, None])
        out = {"mask": mask, "extract_features": features}
        if "hidden_states" in emit:
            out["hidden_states"] = jnp.concatenate([first[None], emitted])
        x = norm(x) if c.do_stable_layer_norm else x
        return x if mask is None else jnp.where(mask[..., None], x, 0), out

    def _hide(self, x, mask_time_indices):
        """Puts masked_spec_embed, which exists wherever the config trains with it, over frames."""
        c = self.config
        if not c.has_mask_embed:
            if mask_time_indices is not None:
                raise ValueError("mask_time_prob and mask_feature_prob are 0: there is no mask")
            return x
        init = nn.with_logical_partitioning(nn.initializers.uniform(1.0), (axes.EMBED,))
        embed = self.param("masked_spec_embed", init, (c.hidden_size,), self.param_dtype)
        if mask_time_indices is None:
            return x
        return jnp.where(mask_time_indices[..., None], embed.astype(x.dtype), x)


class Wav2Vec2ForSequenceClassification(nn.Module):
    """Encoder, projector, mean over time, classifier (the transformers class of this name)."""

    config: Wav2Vec2Config
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    scan_unroll: int = 1
    remat: str = "none"

    @nn.compact
    def __call__(self, input_values: jax.Array, attention_mask: jax.Array | None = None):
        """Arguments as in Wav2Vec2Model.

        With use_weighted_layer_sum, the last of the summed states is the last layer's output as
        transformers 5 has it: before the final norm of stable layer norm models.

        Returns: (logits float32[B, labels], out) with out["pooled"] float32[B, projection] and
          out["hidden"] float[B, A, D], what was projected, and the encoder's "mask".
        """
        c, types = self.config, (self.dtype, self.param_dtype)
        encoder = Wav2Vec2Model(c, *types, self.scan_unroll, self.remat, name="wav2vec2")
        emit = ("hidden_states",) if c.use_weighted_layer_sum else ()
        x, out = encoder(input_values, attention_mask, emit=emit)
        if c.use_weighted_layer_sum:
            size = c.num_hidden_layers + 1
            init = nn.with_logical_partitioning(nn.initializers.constant(1 / size), (None,))
            weights = self.param("layer_weights", init, (size,), self.param_dtype)
            weights = jax.nn.softmax(weights.astype(jnp.float32))
            states = out["hidden_states"].astype(jnp.float32)
            x = jnp.einsum("NBAD,N->BAD", states, weights).astype(self.dtype)
        project = _head_dense("projector", c.classifier_proj_size, self.dtype, self.param_dtype)
        pooled = mean_over_time(project(x), out["mask"])
        classify = _head_dense("classifier", len(c.id2label), jnp.float32, self.param_dtype)
        return classify(pooled), {"pooled": pooled, "hidden": x, "mask": out["mask"]}


class AgeGenderModel(nn.Module):
    """Encoder, mean over time, a head for age and one for gender (arXiv 2306.16962).

    The class of this name in the model card of audeering/wav2vec2-large-robust-24-ft-age-gender.
    """

    config: Wav2Vec2Config
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    scan_unroll: int = 1
    remat: str = "none"

    @nn.compact
    def __call__(self, input_values: jax.Array, attention_mask: jax.Array | None = None):
        """Arguments as in Wav2Vec2Model.

        Returns:
          logits: float32[B, 4], the age and the unnormalised scores of GENDERS.
          out: "age" float32[B], in centuries; "gender" float32[B, 3], probabilities of GENDERS;
            "pooled" float32[B, D]; "hidden" float[B, A, D]; "mask" bool[B, A] or None.
        """
        c, types = self.config, (self.dtype, self.param_dtype)
        encoder = Wav2Vec2Model(c, *types, self.scan_unroll, self.remat, name="wav2vec2")
        x, out = encoder(input_values, attention_mask)
        pooled = mean_over_time(x, out["mask"])

        def head(name, features):
            y = jnp.tanh(_head_dense(f"{name}_dense", c.hidden_size, *types)(pooled))
            return _head_dense(f"{name}_out", features, jnp.float32, self.param_dtype)(y)

        age, gender = head("age", 1), head("gender", len(GENDERS))
        return jnp.concatenate([age, gender], axis=-1), {
            "age": age[:, 0],
            "gender": jax.nn.softmax(gender),
            "pooled": pooled,
            "hidden": x,
            "mask": out["mask"],
        }


def _head_dense(name: str, features: int, dtype, param_dtype) -> Dense:
    return Dense(
        features,
        kernel_axes=(axes.EMBED, None),
        dtype=dtype,
        param_dtype=param_dtype,
        name=name,
    )
