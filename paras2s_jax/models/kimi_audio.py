"""Kimi-Audio (arXiv 2504.18425): a Qwen2 trunk, a text tail and an audio (MIMO) tail.

Two aligned id streams (audio, text) go in, and each position yields logits for the next id
of both. Layout of the tensors and rules: the released code, MoonshotAI/Kimi-Audio 2607d51.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from paras2s_jax.models import axes
from paras2s_jax.models.kimi_layout import (
    STACKS,
    KimiAudioConfig,
    Prompt,
    SpecialIds,
    audio_prompt,
    collate_prompts,
    place_features,
    prompt_layout,
    response_streams,
    special_ids,
)
from paras2s_jax.models.kv_cache import make_cache, make_view
from paras2s_jax.models.layers import Dense, LayerNorm, RMSNorm, make_embed
from paras2s_jax.models.lora import NO_LORA, LoRA
from paras2s_jax.models.placement import constrain
from paras2s_jax.models.qwen2 import Qwen2Stack
from paras2s_jax.models.unrolled import unroll_kv

__all__ = [
    "STACKS",
    "Adaptor",
    "KimiAudio",
    "KimiAudioConfig",
    "Prompt",
    "SpecialIds",
    "audio_prompt",
    "collate_prompts",
    "init_cache",
    "place_features",
    "prompt_layout",
    "response_streams",
    "special_ids",
]


def init_cache(
    config: KimiAudioConfig, rows: int, size: int, dtype=jnp.float32, unrolled: bool = False
) -> dict:
    """Empty KV caches of the three stacks: {stack: {"k", "v"}} of [layers, B, K, size, H]."""
    caches = {
        name: make_cache(config.decoder, layers, rows, size, dtype)
        for name, layers in config.stack_sizes.items()
    }
    return unroll_kv(caches) if unrolled else caches


class Adaptor(nn.Module):
    """Speech features -> model width: Linear, SiLU, Linear, LayerNorm (VQAdaptor)."""

    width: int
    eps: float
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    out_first: bool = False

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """features: float[..., Fin]. Returns: float[..., D]."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        form = types | {"out_first": self.out_first}
        x = Dense(self.width, kernel_axes=(axes.FEATURES, axes.EMBED), name="fc1", **form)(features)
        x = Dense(self.width, kernel_axes=(None, axes.EMBED), name="fc2", **form)(nn.silu(x))
        return LayerNorm(self.eps, name="norm", **types)(x)


class KimiAudio(nn.Module):
    """The two-stream policy. Fields dtype and param_dtype: compute and storage types.

    unrolled: see Qwen2Stack.
    """

    config: KimiAudioConfig
    lora: LoRA = NO_LORA
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    scan_unroll: int = 1
    remat: str = "none"
    unrolled: bool = False

    def setup(self):
        c, types = self.config, (self.dtype, self.param_dtype)
        self.embed_tokens = make_embed(c.vocab_size, c.hidden_size, *types)
        self.adaptor = Adaptor(c.hidden_size, c.rms_norm_eps, *types, self.unrolled)
        loop = (self.scan_unroll, self.remat, self.unrolled)
        for name, layers in c.stack_sizes.items():
            setattr(self, name, Qwen2Stack(c.decoder, layers, self.lora, *types, *loop))
        for stream in ("text", "audio"):
            setattr(self, f"{stream}_norm", RMSNorm(c.rms_norm_eps, *types))
            head = Dense(
                c.vocab_size,
                use_bias=False,
                kernel_axes=(axes.EMBED, axes.VOCAB),
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                out_dtype=jnp.float32,
                out_first=self.unrolled,
            )
            setattr(self, f"{stream}_head", head)

    def adapt(self, features: jax.Array) -> jax.Array:
        """features: float[..., Fin]. Returns: float[..., D]."""
        return self.adaptor(features)

    def embed(
        self, audio_ids, text_ids=None, features=None, continuous_mask=None, stepwise=False
    ) -> jax.Array:
        """Sum of both streams' embeddings and, where continuous, of the adapted features.

        (audio + adapted) * sqrt(2) + text at continuous positions, audio + text elsewhere
        (modeling_moonshot_kimia.py, forward). The reference leaves the text out of a call
        whose text ids sum to 0. Here each row is a call of its own, and with stepwise=True each
        position: the tokens of an answer, which the reference feeds one at a time.
        """
        x = self.embed_tokens(audio_ids)
        if features is None and self.is_initializing():
            # init must make the adaptor's parameters whatever the example call looks like.
            self.adaptor(jnp.zeros((1, self.config.kimia_adaptor_input_dim), self.dtype))
        if features is not None:
            heard = (x + self.adaptor(features)) * 2**0.5
            x = jnp.where(continuous_mask[..., None], heard, x).astype(self.dtype)
        if text_ids is None:
            return x
        left_out = text_ids == 0
        if not stepwise:
            left_out = jnp.all(left_out, axis=-1, keepdims=True)
        return x + jnp.where(left_out[..., None], 0, self.embed_tokens(text_ids))

    def hidden(
        self,
        audio_ids: jax.Array,
        text_ids: jax.Array | None = None,
        *,
        features: jax.Array | None = None,
        continuous_mask: jax.Array | None = None,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: dict | None = None,
        cache_index: jax.Array | None = None,
        prefix: dict | None = None,
        prefix_mask: jax.Array | None = None,
        emit: tuple[str, ...] = (),
        stepwise: bool = False,
    ):
        """Everything but the heads.

        audio_ids, text_ids: int32[B, T]; features: float[B, T, Fin] at their positions and
        continuous_mask: bool[B, T] where they count; mask: bool[B, T] of real tokens; positions:
        int32[B, T] (default arange, padding included); cache: {stack: {"k", "v"}} (init_cache)
        with cache_index: int32[], the slots filled; prefix (an earlier out["kv"]) of P rows with
        prefix_mask: bool[P, S], where row p serves the B // P rows from p * (B // P); emit: see
        Qwen2Stack; stepwise: see embed, True for the tokens of an answer.
        Returns: ((audio float[B, T, D], text float[B, T, D]) after the final norms, out).
        """
        embeds = self.embed(audio_ids, text_ids, features, continuous_mask, stepwise)
        embeds = constrain(embeds, (axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_EMBED))
        view = make_view(
            self.config.decoder,
            embeds,
            mask=mask,
            positions=positions,
            cache=cache and cache["trunk"],
            cache_index=cache_index,
            prefix_mask=prefix_mask,
        )
        outs = {}

        def run(name, x):
            x, outs[name] = getattr(self, name)(
                x,
                view,
                cache=cache and cache[name],
                prefix=prefix and prefix[name],
                emit=emit,
            )
            return x

        branch = run("trunk", embeds)
        text = self.text_norm(run("text_tail", branch))
        audio = self.audio_norm(run("audio_tail", branch))
        out = {"inputs_embeds": embeds, "branch_hidden": branch}
        for key in ("cache", "kv", "input"):
            if key in outs["trunk"]:
                out[key] = {name: stack[key] for name, stack in outs.items()}
        return (audio, text), out | {"audio_final": audio, "text_final": text}

    def audio_logits(self, hidden: jax.Array) -> jax.Array:
        """hidden: float[..., D], "audio_final". Returns: float32[..., V]."""
        return self.audio_head(hidden)

    def text_logits(self, hidden: jax.Array) -> jax.Array:
        """hidden: float[..., D], "text_final". Returns: float32[..., V]."""
        return self.text_head(hidden)

    def __call__(
        self,
        input_ids: jax.Array,
        text_input_ids: jax.Array | None = None,
        whisper_input_feature: Sequence[jax.Array] | None = None,
        is_continuous_mask: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        **inner,
    ):
        """Logits of the next id of both streams, each over the joint vocabulary.

        Arguments as MoonshotKimiaForCausalLM has them, for any number of rows:
        input_ids (audio stream), text_input_ids: int32[B, T]; whisper_input_feature: per audio
        segment, in order of appearance, float[B, n, Fin] (place_features); is_continuous_mask
        [B, T], where they count, and attention_mask [B, T], real tokens: bool or 0 and 1;
        position_ids: int32[B, T]. inner: keywords of `hidden` for caches and prefixes.
        Returns: ((audio_logits, text_logits) float32[B, T, V], out); out holds
        inputs_embeds, branch_hidden, audio_final, text_final: float[B, T, D] and, if asked
        for, cache, kv, input: {stack: …}.
        """
        features = None
        if whisper_input_feature is not None and len(whisper_input_feature):
            if is_continuous_mask is None:
                raise ValueError("whisper_input_feature needs is_continuous_mask beside it")
            features = place_features(self.config, input_ids, whisper_input_feature)
        (audio, text), out = self.hidden(
            input_ids,
            text_input_ids,
            features=features,
            continuous_mask=_as_mask(is_continuous_mask),
            mask=_as_mask(attention_mask),
            positions=position_ids,
            **inner,
        )
        logits_axes = (axes.ACT_BATCH, axes.ACT_LEN, axes.ACT_VOCAB)
        audio_logits = constrain(self.audio_head(audio), logits_axes)
        text_logits = constrain(self.text_head(text), logits_axes)
        return (audio_logits, text_logits), out


def _as_mask(x: jax.Array | None) -> jax.Array | None:
    return None if x is None else jnp.asarray(x) != 0
