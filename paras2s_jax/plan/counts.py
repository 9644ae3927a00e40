"""Parameters and operations of every network of a step, by formulas on its sizes.

A compiler's own counts take the body of a loop once, however often it runs, so they are never used.
One multiply-add is 2 FLOP; only matrix products, convolutions and attention count. Attention over
T tokens that see what is before them costs 2 T^2 of its width a layer (both products, half of all
pairs), to S given keys 4 T S.
"""

from __future__ import annotations

import dataclasses
import math

from paras2s_jax.data.audio_chat import num_slots
from paras2s_jax.models.bigvgan import EDGE_KERNEL, BigVGANConfig
from paras2s_jax.models.detokenizer_chunks import window_plan
from paras2s_jax.models.flow_matching import FRAMES_PER_CODE, TIME_DIM, FlowMatchingConfig
from paras2s_jax.models.kimi_audio import KimiAudioConfig
from paras2s_jax.models.qwen2 import Qwen2Config
from paras2s_jax.models.snake import TAPS
from paras2s_jax.models.speech_tokenizer import SpeechTokenizerConfig
from paras2s_jax.models.whisper_layers import WhisperConfig

CODE_HZ, MEL_HZ, RATE_HZ = 12.5, 100, 16_000
# Of AdamW in float32: reads parameter, both moments and gradient, writes all but the gradient, and
# reads or writes a bfloat16 gradient once more on the way (performance floor of the optimizer).
OPTIMIZER_BYTES = 30


# Language model.


def layer_weights(c: Qwen2Config) -> int:
    """Weights in the matrices of one decoder layer."""
    inner, kv = c.num_attention_heads * c.width_per_head, c.num_key_value_heads * c.width_per_head
    return c.hidden_size * (2 * inner + 2 * kv + 3 * c.intermediate_size)


def layer_vectors(c: Qwen2Config) -> int:
    """Parameters of one decoder layer that are in no matrix: two norms, biases of q, k and v."""
    inner, kv = c.num_attention_heads * c.width_per_head, c.num_key_value_heads * c.width_per_head
    return 2 * c.hidden_size + (inner + 2 * kv) * c.attention_bias


def num_layers(c: KimiAudioConfig) -> int:
    """Layers that every token passes: trunk, text tail and audio tail."""
    return sum(c.stack_sizes.values())


def head_weights(c: KimiAudioConfig) -> int:
    """Weights of both heads."""
    return 2 * c.vocab_size * c.hidden_size


def kimi_params(c: KimiAudioConfig) -> int:
    """All parameters of the two-stream language model."""
    d = c.hidden_size
    layers = num_layers(c) * (layer_weights(c.decoder) + layer_vectors(c.decoder))
    adaptor = c.kimia_adaptor_input_dim * d + d * d + 4 * d
    return c.vocab_size * d + head_weights(c) + layers + adaptor + 2 * d


def decoder_params(c: Qwen2Config) -> int:
    """All parameters of a plain language model; its head is not tied."""
    layers = c.num_hidden_layers * (layer_weights(c) + layer_vectors(c))
    return 2 * c.vocab_size * c.hidden_size + layers + c.hidden_size


def kv_bytes_per_token(c: KimiAudioConfig, itemsize: int = 2) -> int:
    """Keys and values that one token leaves behind."""
    d = c.decoder
    return 2 * num_layers(c) * d.num_key_value_heads * d.width_per_head * itemsize


def stack_flops(c: Qwen2Config, layers: int, rows: float, tokens: float, prefix: float = 0.0):
    """Forward pass of `layers` layers over rows of `tokens` that also see `prefix` tokens."""
    inner = c.num_attention_heads * c.width_per_head
    products = 2.0 * layer_weights(c) * tokens
    attention = inner * (2.0 * tokens**2 + 4.0 * tokens * prefix)
    return rows * layers * (products + attention)


def kimi_flops(
    c: KimiAudioConfig, prompts: float, group: float, prompt: float, answer: float, *, shared=True
) -> float:
    """Forward pass over prompts * group answers, heads on the answers only.

    shared: whether a prompt runs once for its group, as here, or once for every answer.
    """
    layers, rows = num_layers(c), prompts * group
    heads = 2.0 * head_weights(c) * rows * answer
    if not shared:
        return stack_flops(c.decoder, layers, rows, prompt + answer) + heads
    adaptor = 2.0 * prompts * prompt * c.hidden_size * (c.kimia_adaptor_input_dim + c.hidden_size)
    first = stack_flops(c.decoder, layers, prompts, prompt)
    return first + stack_flops(c.decoder, layers, rows, answer, prompt) + heads + adaptor


# Speech in.


def encoder_layer_weights(c: WhisperConfig) -> int:
    """Weights in the matrices of one layer of a Whisper encoder."""
    return c.d_model * (4 * c.d_model + 2 * c.encoder_ffn_dim)


def encoder_params(c: WhisperConfig) -> int:
    """Parameters of a Whisper encoder; three of a layer's four projections have a bias."""
    d = c.d_model
    layer = encoder_layer_weights(c) + 3 * d + (c.encoder_ffn_dim + d) + 4 * d
    convolutions = 3 * d * (c.num_mel_bins + d) + 2 * d
    return c.encoder_layers * layer + convolutions + c.max_source_positions * d + 2 * d


def encoder_flops(c: WhisperConfig, rows: float, frames: float, window: float | None = None):
    """Forward pass over `frames` mel frames (100 Hz), in windows of their own if there are any."""
    steps, d = frames / 2, c.d_model
    seen = steps if window is None else window / 2
    layers = c.encoder_layers * steps * (2.0 * encoder_layer_weights(c) + 4.0 * seen * d)
    return rows * (layers + 2.0 * 3 * d * (frames * c.num_mel_bins + steps * d))


def tokenizer_params(c: SpeechTokenizerConfig) -> int:
    """Parameters of the layers in front of the codebook, its table and positions."""
    d = c.d_model
    positions = c.max_source_positions // c.pooling_kernel_size
    return encoder_params(c.tower) - 2 * d + d * (c.quantize_vocab_size + positions)


def tokenizer_flops(c: SpeechTokenizerConfig, rows: float, frames: float) -> float:
    """Forward pass over mel frames, nearest code of every pooled state included."""
    codes = frames / 2 / c.pooling_kernel_size
    return encoder_flops(c.tower, rows, frames) + rows * codes * 2.0 * c.d_model * (
        c.quantize_vocab_size
    )


# Speech out.


def dit_params(c: FlowMatchingConfig) -> int:
    """Parameters of the flow-matching network: 18 D^2 a block at an MLP ratio of 4."""
    d, f = c.hidden_size, int(c.hidden_size * c.mlp_ratio)
    block = 3 * d * d + 3 * d + d * d + d + 2 * d * f + f + d + 6 * d * d + 6 * d
    ends = (TIME_DIM + d + 2) * d + (c.semantic_vocab_size + 1) * d
    ends += (c.input_size + 1) * d + 2 * (d + 1) * d + (d + 1) * c.input_size
    return c.depth * block + ends


def dit_flops(c: FlowMatchingConfig, rows: float, codes: float, past: float = 0.0) -> float:
    """One evaluation on all frames of `codes`, which also see `past` earlier frames.

    The adaptive norms are computed once per code, the rest once per frame.
    """
    d, frames = c.hidden_size, FRAMES_PER_CODE * codes
    per_frame = 2.0 * (4 + 2 * c.mlp_ratio) * d * d + 4.0 * (frames + past) * d
    per_code = 2.0 * 6 * d * d
    ends = frames * 2.0 * 2 * c.input_size * d + codes * 2.0 * 2 * d * d
    return rows * (c.depth * (frames * per_frame + codes * per_code) + ends)


@dataclasses.dataclass(frozen=True)
class Chunks:
    """How answers are detokenized piece by piece; names as FlowMatchingDetokenizer's fields."""

    first: int
    chunk: int
    look_ahead: int
    max_kv: int

    def windows(self, codes: int) -> list[tuple[int, int]]:
        """(codes, earlier frames seen) of every window that answers of `codes` codes take."""
        found = [(min(self.first, codes), 0)]
        count = math.ceil((codes - self.first) / self.chunk)
        kept = (FRAMES_PER_CODE * size for size in (self.first - self.look_ahead, self.chunk))
        for begin, end, past in window_plan(count, *kept, self.max_kv):
            found += [(self.look_ahead + self.chunk, past)] * (end - begin)
        return found


def solve_flops(
    c: FlowMatchingConfig, rows: float, codes: int, evaluations: int, chunks: Chunks | None
) -> float:
    """All evaluations for rows of `codes`.

    chunks: every window solves what the last one held back anew, and what it keeps runs once more
    for its keys. None: whole answers at once.
    """
    if chunks is None or codes <= chunks.first:
        return evaluations * dit_flops(c, rows, codes)
    total = 0.0
    for size, past in chunks.windows(codes):
        total += evaluations * dit_flops(c, rows, size, past)
        total += dit_flops(c, rows, size - chunks.look_ahead, past)
    return total


def vocoder_params(c: BigVGANConfig) -> int:
    """Parameters of the vocoder with folded weight norm, filters of the activations included."""
    total, width = (EDGE_KERNEL * c.num_mels + 1) * c.upsample_initial_channel, 0
    for stage, kernel in enumerate(c.upsample_kernel_sizes):
        before, width = c.channels(stage), c.channels(stage + 1)
        total += kernel * before * width + width
        for k, dilations in zip(c.resblock_kernel_sizes, c.resblock_dilation_sizes, strict=True):
            convolutions = 2 * len(dilations)
            total += convolutions * (k * width * width + width + 2 * width + 2 * TAPS)
    return total + 2 * width + 2 * TAPS + EDGE_KERNEL * width + c.use_bias_at_final


def vocoder_flops(c: BigVGANConfig, rows: float, frames: float) -> float:
    """Convolutions over `frames` mel frames; filters of the activations are no matrices."""
    total = 2.0 * frames * EDGE_KERNEL * c.num_mels * c.upsample_initial_channel
    steps, width = frames, c.upsample_initial_channel
    sizes = zip(c.upsample_rates, c.upsample_kernel_sizes, strict=True)
    for stage, (rate, kernel) in enumerate(sizes):
        before, width = width, c.channels(stage + 1)
        total += 2.0 * steps * kernel * before * width
        steps *= rate
        for k, dilations in zip(c.resblock_kernel_sizes, c.resblock_dilation_sizes, strict=True):
            total += 2.0 * steps * 2 * len(dilations) * k * width * width
    return rows * (total + 2.0 * steps * EDGE_KERNEL * width)


# Reward.


@dataclasses.dataclass(frozen=True)
class RewardSizes:
    """An audio tower and a language model. window: mel frames that see each other, None: all."""

    audio: WhisperConfig
    text: Qwen2Config
    window: int | None
    texts: tuple[int, int, int]  # Tokens before, between and after the two audios.


def reward_params(c: RewardSizes) -> int:
    """Parameters of tower, projection and language model."""
    d, out = c.audio.d_model, c.text.hidden_size
    # Windows have sinusoids for positions, and two embeddings that nobody reads.
    positions = 0 if c.window is None else 2 * out - c.audio.max_source_positions * d
    return encoder_params(c.audio) + positions + (d + 1) * out + decoder_params(c.text)


def reward_flops(c: RewardSizes, prompts: float, group: float, query_s: float, answer_s: float):
    """Scores of all answers: (tower, language model); the query once per prompt.

    Logits are read at three positions.
    """
    rows, frames = prompts * group, MEL_HZ
    hear = encoder_flops(c.audio, prompts, frames * query_s, c.window)
    hear += encoder_flops(c.audio, rows, frames * answer_s, c.window)
    before, between, after = c.texts
    shared = before + num_slots(round(frames * query_s)) + between
    own = num_slots(round(frames * answer_s)) + after
    slots = prompts * (shared - before - between) + rows * (own - after)
    hear += 2.0 * slots * c.audio.d_model * c.text.hidden_size
    layers = c.text.num_hidden_layers
    read = stack_flops(c.text, layers, prompts, shared)
    read += stack_flops(c.text, layers, rows, own, shared)
    return hear, read + 2.0 * c.text.vocab_size * c.text.hidden_size * (prompts + 2 * rows)
