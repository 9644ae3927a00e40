"""What one step of a stage has to do, phase by phase: operations and bytes by formula."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from ml_collections import ConfigDict

from paras2s_jax.models import axes
from paras2s_jax.models.detokenizer import FlowMatchingDetokenizer
from paras2s_jax.models.flow_matching import FRAMES_PER_CODE, time_points
from paras2s_jax.plan import counts
from paras2s_jax.plan.counts import CODE_HZ, MEL_HZ, Chunks
from paras2s_jax.plan.sizes import Sizes

AROUND_QUERY = 5  # Tokens of a prompt beside the query's codes (models.kimi_layout.audio_prompt).
PIECE_S = 30.0  # What the released Whisper always hears.
BF16, FP32 = 2, 4
FULL_BACKWARD, FROZEN_BACKWARD = 2.0, 1.0


@dataclasses.dataclass(frozen=True)
class Phase:
    """Work of one phase in one step.

    flops: of all devices together, as the model needs them. executed: the same with what is
    computed once more in a backward pass. hbm_bytes: what one device reads and writes at the least.
    """

    flops: float
    hbm_bytes: float
    executed: float | None = None


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a step and of the meshes it runs on.

    prompts: P. group: G. prompt, answer: tokens of a query's prompt and of an answer. query_s,
    answer_s: seconds of padded waves. devices: all of them. tensor: over how many matrices are
    split for good in training; decode_tensor, decode_heads: in decoding, those of attention apart.
    trained_params: numbers that the optimizer updates; full: whether they are all weights.
    chunked_logp: whether heads run again in a backward pass. accum_steps: micro-batches.
    """

    prompts: int
    group: int
    prompt: int
    answer: int
    query_s: float
    answer_s: float
    devices: int
    tensor: int
    decode_tensor: int
    decode_heads: int
    accum_steps: int
    trained_params: float
    full: bool
    remat: str
    chunked_logp: bool
    ode_steps: int
    chunks: Chunks | None

    @property
    def rows(self) -> int:
        return self.prompts * self.group


def recompute(sizes: Sizes, shape: Shape) -> float:
    """FLOP of a backward pass that were done before, by remat policy, for all devices.

    "full" runs every layer again; "dots" keeps the products with weights and runs attention again.
    Chunked log-probabilities run the heads again.
    """
    c, s = sizes.policy, shape
    heads = 2.0 * counts.head_weights(c) * s.rows * s.answer if s.chunked_logp else 0.0
    everything = counts.kimi_flops(c, s.prompts, s.group, s.prompt, s.answer)
    all_heads = 2.0 * counts.head_weights(c) * s.rows * s.answer
    if s.remat == "none":
        return heads
    if s.remat == "full":
        return everything - all_heads + heads
    inner = c.num_attention_heads * c.decoder.width_per_head
    seen = 2.0 * s.answer**2 + 4.0 * s.answer * s.prompt
    attention = counts.num_layers(c) * inner * (s.rows * seen + s.prompts * 2.0 * s.prompt**2)
    return heads + attention


def hear(sizes: Sizes, s: Shape) -> Phase:
    """Continuous features in pieces of 30 s, and codes, of the queries."""
    pieces = math.ceil(s.query_s / PIECE_S)
    flops = counts.encoder_flops(sizes.encoder, s.prompts * pieces, MEL_HZ * PIECE_S)
    flops += counts.tokenizer_flops(sizes.tokenizer, s.prompts, MEL_HZ * s.query_s)
    weights = BF16 * counts.encoder_params(sizes.encoder)
    weights += FP32 * counts.tokenizer_params(sizes.tokenizer)
    return Phase(flops, weights / s.tensor)


def prepare(sizes: Sizes, s: Shape) -> Phase:
    """As hear, and the codes of the answers."""
    heard = hear(sizes, s)
    answers = counts.tokenizer_flops(sizes.tokenizer, s.rows, MEL_HZ * s.answer_s)
    return Phase(heard.flops + answers, heard.hbm_bytes)


def reshard(sizes: Sizes, s: Shape) -> Phase:
    """The policy's weights from the training layout into bfloat16 ones of the decoding layout."""
    params = counts.kimi_params(sizes.policy)
    return Phase(0.0, params * (FP32 / s.devices + BF16 / s.decode_tensor))


def rollout(sizes: Sizes, s: Shape) -> Phase:
    """Prompts once per group, then every step reads all weights and all keys and values."""
    c = sizes.policy
    flops = counts.kimi_flops(c, s.prompts, s.group, s.prompt, s.answer)
    layers = counts.num_layers(c)
    mlp = layers * 3 * c.hidden_size * c.intermediate_size
    attention = layers * counts.layer_weights(c.decoder) - mlp
    rest = mlp + counts.head_weights(c)
    kv = counts.kv_bytes_per_token(c, BF16)
    read = s.prompts * s.prompt + s.rows * s.answer / 2
    step = BF16 * (attention / s.decode_heads + rest / s.decode_tensor) + kv * read / s.devices
    return Phase(flops, (s.answer + 1) * step)


def speak(sizes: Sizes, s: Shape) -> Phase:
    """Codes of all answers -> mel frames -> waves; every device has all weights, and reads them."""
    evaluations = len(time_points(s.ode_steps, "neural_ode_euler")[0])
    flops = counts.solve_flops(sizes.dit, s.rows, s.answer, evaluations, s.chunks)
    windows = [s.answer] if s.chunks is None else [n for n, _ in s.chunks.windows(s.answer)]
    frames = FRAMES_PER_CODE * sum(windows)
    flops += counts.vocoder_flops(sizes.vocoder, s.rows, frames)
    weights = evaluations * counts.dit_params(sizes.dit) + counts.vocoder_params(sizes.vocoder)
    return Phase(flops, len(windows) * BF16 * weights)


def reward(sizes: Sizes, s: Shape) -> Phase:
    """Tower and language model of the reward model."""
    flops = sum(counts.reward_flops(sizes.reward, s.prompts, s.group, s.query_s, s.answer_s))
    return Phase(flops, BF16 * counts.reward_params(sizes.reward) / s.tensor)


def reference(sizes: Sizes, s: Shape) -> Phase:
    """Log-probabilities of all answers under the frozen policy."""
    flops = counts.kimi_flops(sizes.policy, s.prompts, s.group, s.prompt, s.answer)
    passes = 2 * s.accum_steps  # The prompts, then the answers.
    return Phase(flops, passes * BF16 * counts.kimi_params(sizes.policy) / s.tensor)


def update(sizes: Sizes, s: Shape) -> Phase:
    """Both passes of the policy, and the optimizer; frozen weights have no gradient."""
    forward = counts.kimi_flops(sizes.policy, s.prompts, s.group, s.prompt, s.answer)
    backward = FULL_BACKWARD if s.full else FROZEN_BACKWARD
    flops = (1.0 + backward) * forward
    passes = 2 * (1.0 + backward) * s.accum_steps
    weights = passes * BF16 * counts.kimi_params(sizes.policy) / s.tensor
    optimizer = counts.OPTIMIZER_BYTES * s.trained_params / s.devices
    return Phase(flops, weights + optimizer, flops + recompute(sizes, s))


def reward_update(sizes: Sizes, s: Shape) -> Phase:
    """The same of the reward model, whose tower stays as it is."""
    tower, text = counts.reward_flops(sizes.reward, s.prompts, s.group, s.query_s, s.answer_s)
    flops = tower + (1.0 + FROZEN_BACKWARD) * text
    weights = 4 * s.accum_steps * BF16 * counts.reward_params(sizes.reward) / s.tensor
    return Phase(flops, weights + counts.OPTIMIZER_BYTES * s.trained_params / s.devices)


PHASES: dict[str, dict[str, Callable[[Sizes, Shape], Phase]]] = {
    "grpo": {
        "hear": hear,
        "reshard": reshard,
        "rollout": rollout,
        "speak": speak,
        "reward": reward,
        "reference": reference,
        "update": update,
    },
    "sft": {"prepare": prepare, "update": update},
    "distill": {"update": reward_update},
    "respond": {"hear": hear, "reshard": reshard, "rollout": rollout, "speak": speak},
}


def prompt_tokens(query_s: float) -> int:
    """Positions of the prompt of a query."""
    return math.ceil(query_s * CODE_HZ) + AROUND_QUERY


def ways(mesh: ConfigDict, rules, name: str) -> int:
    """Over how many devices a logical axis is spread."""
    names = dict(rules).get(name) or ()
    return math.prod(mesh[axis] for axis in ((names,) if isinstance(names, str) else names))


def shape_of(config: ConfigDict, stage: str, trained_params: float) -> Shape:
    """The sizes of a step of a stage. trained_params: how many numbers the optimizer updates."""
    c, policy = config[stage if stage != "respond" else "distill"], config.policy
    train, decode = config.mesh, config.decode_mesh
    fields = dataclasses.fields(FlowMatchingDetokenizer)
    detokenizer = {field.name: field.default for field in fields} | policy.detokenizer.to_dict()
    names = [field.name for field in dataclasses.fields(Chunks)]
    chunks = Chunks(**{name: detokenizer[name] for name in names})
    spoken_s = policy.max_steps / CODE_HZ
    if stage == "grpo":
        sizes = (c.num_prompts, c.group_size, max(c.len_buckets_s), spoken_s)
    elif stage == "respond":
        sizes = (c.sample_batch_size, c.num_samples, max(c.len_buckets_s), spoken_s)
    else:
        buckets = c.len_buckets_s if stage == "sft" else c.pair_buckets_s
        sizes = (c.batch_size, 1, min(buckets), max(buckets))
    prompts, group, query_s, answer_s = sizes
    answer = policy.max_steps if stage != "sft" else math.ceil(answer_s * CODE_HZ) + 7
    return Shape(
        prompts=prompts,
        group=group,
        prompt=prompt_tokens(query_s),
        answer=answer,
        query_s=query_s,
        answer_s=answer_s,
        devices=math.prod(train.to_dict().values()),
        tensor=train.tensor,
        decode_tensor=ways(decode, config.decode_rules, axes.MLP),
        decode_heads=ways(decode, config.decode_rules, axes.HEADS),
        accum_steps=c.accum_steps if stage != "respond" else 1,
        trained_params=trained_params,
        full=not policy.lora.rank,
        remat=policy.remat if stage != "distill" else config.distill.model.remat,
        chunked_logp=bool(policy.logp_chunk),
        ode_steps=detokenizer["ode_steps"],
        chunks=chunks if detokenizer["chunked"] else None,
    )


def steps_of(config: ConfigDict, stage: str) -> int:
    """How many steps the stage's whole run has."""
    if stage == "respond":
        return math.ceil(config.distill.num_queries / config.distill.sample_batch_size)
    return config[stage].num_steps


def judge_calls(config: ConfigDict, stage: str) -> int:
    """Answers that the judge hears in the whole run: all that are sampled to distill it."""
    c = config.distill
    return c.num_queries * c.num_samples if stage in ("distill", "respond") else 0
