"""Temporaries of a phase by formula, where no compiler for the chips can be asked."""

from __future__ import annotations

from paras2s_jax.plan import counts
from paras2s_jax.plan.aot import Compiled, Memory
from paras2s_jax.plan.sizes import Sizes
from paras2s_jax.plan.work import BF16, FP32, Shape

# Arrays of the hidden width that one layer has at one time besides its MLP's.
LIVE_HIDDEN = 6


def _tokens(s: Shape) -> float:
    """Tokens of one micro-batch on one device."""
    ways = s.devices / s.tensor
    return (s.rows * s.answer + s.prompts * s.prompt) / (ways * s.accum_steps)


def _layer(sizes: Sizes, s: Shape) -> float:
    """Bytes of one layer at work: gathered weights, twice for the next one's, and activations."""
    c = sizes.policy.decoder
    weights = 2 * BF16 * counts.layer_weights(c) / s.tensor
    hidden = LIVE_HIDDEN * c.hidden_size + 3 * c.intermediate_size / s.tensor
    return weights + BF16 * _tokens(s) * hidden


def _heads(sizes: Sizes, s: Shape, chunk: int | None) -> float:
    """Bytes of a head at work: its gathered weights, logits and their softmax in float32."""
    c = sizes.policy
    tokens = s.rows * s.answer / s.accum_steps
    tokens = min(chunk or tokens, tokens) / (s.devices / s.tensor)
    logits = 3 * FP32 * tokens * c.vocab_size / s.tensor
    return BF16 * c.vocab_size * c.hidden_size / s.tensor + logits


def saved_bytes(sizes: Sizes, s: Shape) -> float:
    """What a forward pass keeps for the backward one, by remat policy."""
    c = sizes.policy.decoder
    inner, kv = c.num_attention_heads * c.width_per_head, c.num_key_value_heads * c.width_per_head
    kept = {
        "full": c.hidden_size,
        "dots": c.hidden_size * 3 + (inner + 2 * kv + 2 * c.intermediate_size) / s.tensor,
        "none": c.hidden_size * 6 + (3 * inner + 4 * kv + 4 * c.intermediate_size) / s.tensor,
    }[s.remat]
    return BF16 * counts.num_layers(sizes.policy) * _tokens(s) * kept


def temporaries(phase: str, sizes: Sizes, s: Shape, chunk: int | None) -> float:
    """Bytes of temporaries on one device, roughly; what is small is left out."""
    if phase == "update":
        gradients = FP32 * s.trained_params / s.devices * (2 if s.accum_steps > 1 else 1)
        return gradients + saved_bytes(sizes, s) + _layer(sizes, s) + _heads(sizes, s, chunk)
    if phase == "reference":
        return _layer(sizes, s) + _heads(sizes, s, chunk)
    if phase == "rollout":
        tokens = s.rows * s.answer + s.prompts * s.prompt
        logits = 4 * FP32 * s.rows * sizes.policy.vocab_size / s.devices
        return counts.kv_bytes_per_token(sizes.policy) * tokens / s.devices + logits
    if phase == "reward":
        c = sizes.reward.text
        tokens = s.rows * (25 * s.answer_s + 16) / s.devices
        weights = 2 * BF16 * counts.layer_weights(c)
        return weights + BF16 * tokens * (LIVE_HIDDEN * c.hidden_size + 3 * c.intermediate_size)
    if phase == "speak":
        # The vocoder's last stage has most: all samples, a set of channels for each block.
        c = sizes.vocoder
        samples = s.rows / s.devices * 4 * s.answer * c.hop_size
        blocks = len(c.resblock_kernel_sizes)
        return 4 * BF16 * samples * c.channels(len(c.upsample_rates)) * blocks
    return 0.0


def count(phase: Compiled, sizes: Sizes, s: Shape, chunk: int | None) -> Memory:
    """What the compiler would have told, roughly; results reuse what they replace."""
    temps = round(temporaries(phase.phase, sizes, s, chunk))
    return Memory(sum(phase.arguments.values()), 0, 0, temps, 0)
