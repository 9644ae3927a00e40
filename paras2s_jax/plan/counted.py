"""Memory and bytes on links by formula, where no compiler for the chips can be asked (GPUs).

Weights are gathered layer by layer over the devices that share them (ZeRO-3, arXiv 1910.02054).
"""

from __future__ import annotations

import dataclasses

from paras2s_jax.models.qwen2 import Qwen2Config
from paras2s_jax.plan import counts
from paras2s_jax.plan.aot import Compiled, Memory
from paras2s_jax.plan.sizes import Sizes
from paras2s_jax.plan.work import BF16, FP32, Shape

# Arrays of the hidden width that one layer has at one time besides its MLP's.
LIVE_HIDDEN = 6
SLOTS_HZ = 25  # Audio embeddings of the reward model.


@dataclasses.dataclass(frozen=True)
class Stack:
    """A language model's layers at work. tokens: on one device at one time."""

    config: Qwen2Config
    layers: int
    tokens: float
    tensor: int

    @property
    def working(self) -> float:
        """Bytes of one layer: gathered weights, and the next one's, and activations."""
        c = self.config
        hidden = LIVE_HIDDEN * c.hidden_size + 3 * c.intermediate_size / self.tensor
        return BF16 * (2 * counts.layer_weights(c) / self.tensor + self.tokens * hidden)

    def saved(self, remat: str) -> float:
        """What a forward pass keeps for the backward one, by remat policy."""
        c, d = self.config, self.config.hidden_size
        inner, kv = c.num_attention_heads * c.width_per_head, c.num_key_value_heads
        kv *= c.width_per_head
        split = {
            "full": 0,
            "dots": inner + 2 * kv + 2 * c.intermediate_size,
            "none": 3 * inner + 4 * kv + 4 * c.intermediate_size,
        }[remat]
        whole = {"full": 1, "dots": 3, "none": 6}[remat] * d
        return BF16 * self.layers * self.tokens * (whole + split / self.tensor)


def _policy(sizes: Sizes, s: Shape) -> Stack:
    ways = s.devices / s.tensor * s.accum_steps
    tokens = (s.rows * s.answer + s.prompts * s.prompt) / ways
    return Stack(sizes.policy.decoder, counts.num_layers(sizes.policy), tokens, s.tensor)


def _reward(sizes: Sizes, s: Shape) -> Stack:
    heard = s.prompts * s.query_s + s.rows * s.answer_s
    tokens = (SLOTS_HZ * heard + sum(sizes.reward.texts) * s.rows) * s.tensor / s.devices
    text = sizes.reward.text
    return Stack(text, text.num_hidden_layers, tokens / s.accum_steps, s.tensor)


def _heads(sizes: Sizes, s: Shape, chunk: int | None) -> float:
    """Bytes of a head at work: its gathered weights, logits and their softmax in float32."""
    c = sizes.policy
    tokens = s.rows * s.answer / s.accum_steps * s.tensor / s.devices
    tokens = min(chunk or tokens, tokens)
    logits = 3 * FP32 * tokens * c.vocab_size / s.tensor
    return BF16 * c.vocab_size * c.hidden_size / s.tensor + logits


def temporaries(stage: str, phase: str, sizes: Sizes, s: Shape, chunk: int | None) -> float:
    """Bytes of temporaries on one device, roughly; what is small is left out."""
    gradients = FP32 * s.trained_params / s.devices * (2 if s.accum_steps > 1 else 1)
    if phase == "update":
        stack = _reward(sizes, s) if stage == "distill" else _policy(sizes, s)
        heads = 0.0 if stage == "distill" else _heads(sizes, s, chunk)
        return gradients + stack.saved(s.remat) + stack.working + heads
    if phase == "reference":
        return _policy(sizes, s).working + _heads(sizes, s, chunk)
    if phase == "reward":
        return _reward(sizes, dataclasses.replace(s, accum_steps=1)).working
    if phase == "rollout":
        tokens = s.rows * s.answer + s.prompts * s.prompt
        logits = 4 * FP32 * s.rows * sizes.policy.vocab_size / s.devices
        return counts.kv_bytes_per_token(sizes.policy) * tokens / s.devices + logits
    if phase == "speak":
        # The vocoder's last stage has most: all samples, a set of channels for each block.
        c = sizes.vocoder
        samples = s.rows / s.devices * 4 * s.answer * c.hop_size
        width = c.channels(len(c.upsample_rates)) * len(c.resblock_kernel_sizes)
        return 4 * BF16 * samples * width + _spoken(sizes)
    return 0.0


def _spoken(sizes: Sizes) -> float:
    """Bytes of the detokenizer, which speaks from weights that every device holds."""
    return BF16 * (counts.dit_params(sizes.dit) + counts.vocoder_params(sizes.vocoder))


def wire_bytes(stage: str, phase: str, sizes: Sizes, s: Shape) -> float:
    """What one device sends to gather weights and to add gradients up."""
    ways = s.devices / s.tensor
    share = (ways - 1) / ways / s.tensor
    policy = BF16 * counts.kimi_params(sizes.policy) * share
    reward = BF16 * counts.reward_params(sizes.reward) * share
    if phase == "update":
        weights = reward if stage == "distill" else policy
        passes = 3 if s.remat == "full" else 2
        return s.accum_steps * (passes * weights + FP32 * s.trained_params * share)
    heard = counts.encoder_params(sizes.encoder)
    return {
        "reshard": BF16 * counts.kimi_params(sizes.policy) / s.decode_tensor * (ways - 1) / ways,
        "reward": reward,
        "reference": s.accum_steps * policy,
        "hear": BF16 * heard * share,
        "prepare": BF16 * heard * share,
        "speak": _spoken(sizes) * (s.devices - 1) / s.devices,
    }.get(phase, 0.0)


def count(stage: str, phase: Compiled, sizes: Sizes, s: Shape, chunk: int | None) -> Compiled:
    """What a compiler would have told of a phase, roughly; results reuse what they replace."""
    temps = round(temporaries(stage, phase.phase, sizes, s, chunk))
    memory = Memory(sum(phase.arguments.values()), 0, 0, temps, 0)
    wire = {"weights and gradients": wire_bytes(stage, phase.phase, sizes, s)}
    return dataclasses.replace(phase, memory=memory, wire=wire)
