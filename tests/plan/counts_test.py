import functools
import math
import runpy
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from paras2s_jax.convert import bigvgan, flow_matching, kimi_audio, speech_tokenizer
from paras2s_jax.models.bigvgan import BigVGAN, BigVGANConfig
from paras2s_jax.models.flow_matching import FlowMatchingConfig, FlowMatchingDiT
from paras2s_jax.models.kimi_audio import KimiAudio, KimiAudioConfig
from paras2s_jax.models.qwen2 import Qwen2Config
from paras2s_jax.models.qwen2_5_omni import (
    OmniAudioConfig,
    Qwen2_5OmniConfig,
    Qwen2_5OmniThinker,
)
from paras2s_jax.models.speech_tokenizer import SpeechTokenizerConfig, WhisperVQEncoder
from paras2s_jax.models.whisper import WhisperEncoder
from paras2s_jax.models.whisper_layers import WhisperConfig
from paras2s_jax.plan import counts
from paras2s_jax.plan.sizes import sizes_of

CONFIG = Path(__file__).parents[2] / "configs" / "kimi_audio_7b.py"
RELEASED = sizes_of(runpy.run_path(str(CONFIG))["get_config"]())
TINY_LM = Qwen2Config(11, 8, 12, 3, 4, 2, head_dim=4)
TINY_KIMI = KimiAudioConfig(
    vocab_size=172, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
    num_attention_heads=2, num_key_value_heads=1, bos_token_id=96, pad_token_id=131,
    kimia_mimo_layers=2, kimia_mimo_transformer_from_layer_index=1, kimia_token_offset=132,
    kimia_adaptor_input_dim=20,
)  # fmt: skip
TINY_WHISPER = WhisperConfig(8, 2, 2, 12, num_mel_bins=5, max_source_positions=30)
TINY_TOKENIZER = SpeechTokenizerConfig(8, 2, 12, 2, 7, 4, num_mel_bins=5, max_source_positions=32)
TINY_DIT = FlowMatchingConfig(12, 2, 3, 9, input_size=5)
TINY_VOCODER = BigVGANConfig(
    upsample_rates=(2, 3), upsample_kernel_sizes=(4, 5), upsample_initial_channel=8,
    resblock_kernel_sizes=(3, 5), resblock_dilation_sizes=((1, 3), (1, 3)), num_mels=5,
    sampling_rate=24_000, hop_size=6, n_fft=16, win_size=16,
)  # fmt: skip
TINY_OMNI = OmniAudioConfig(8, 2, 2, 12, num_mel_bins=5, n_window=4, output_dim=8)


def size_of(make) -> int:
    tree = nn.unbox(jax.eval_shape(make, jax.random.key(0)))
    return sum(x.size for x in jax.tree.leaves(tree["params"]))


def mel(bins: int):
    return jnp.zeros((1, 16, bins))


@pytest.mark.parametrize(
    ("count", "config", "make"),
    [
        (counts.kimi_params, TINY_KIMI, lambda c: functools.partial(kimi_audio.init, KimiAudio(c))),
        (
            counts.encoder_params,
            TINY_WHISPER,
            lambda c: lambda rng: WhisperEncoder(c).init(rng, mel(5)),
        ),
        (
            counts.tokenizer_params,
            TINY_TOKENIZER,
            lambda c: functools.partial(speech_tokenizer.init, WhisperVQEncoder(c)),
        ),
        (
            counts.dit_params,
            TINY_DIT,
            lambda c: functools.partial(flow_matching.init, FlowMatchingDiT(c)),
        ),
        (
            counts.vocoder_params,
            TINY_VOCODER,
            lambda c: functools.partial(bigvgan.init, BigVGAN(c, folded=True)),
        ),
        (
            counts.reward_params,
            counts.RewardSizes(TINY_OMNI, TINY_LM, 8, (1, 1, 1)),
            lambda c: (
                lambda rng: Qwen2_5OmniThinker(Qwen2_5OmniConfig(c.audio, c.text, 10)).init(
                    rng, mel(5), jnp.array([[10, 10, 1]]), method="init_all"
                )
            ),
        ),
    ],
)
def test_parameters_are_those_of_the_modules(count, config, make):
    assert count(config) == size_of(make(config))


def test_a_decoder_layer_by_hand():
    # q and o: 8 x 16 each; k and v: 8 x 8 each; gate, up, down: 8 x 12 each.
    assert counts.layer_weights(TINY_LM) == 2 * 128 + 2 * 64 + 3 * 96
    # Two norms of 8; biases of 16, 8 and 8.
    assert counts.layer_vectors(TINY_LM) == 16 + 32
    # 5 tokens after 4 others, 2 rows, 3 layers: 2 x 672 each, and over 16 wide heads two products
    # with half of 5 x 5 and with all of 5 x 4 keys.
    attention = 16 * (2 * 25 + 4 * 20)
    assert counts.stack_flops(TINY_LM, 3, 2, 5, 4) == 2 * 3 * (2 * 672 * 5 + attention)


def test_a_group_shares_its_prompt():
    args = (TINY_KIMI, 2, 4, 6, 5)
    shared, repeated = counts.kimi_flops(*args), counts.kimi_flops(*args, shared=False)
    adaptor = 2 * 2 * 6 * 16 * (20 + 16)
    # Three of four runs of each prompt are saved; an answer sees its prompt either way.
    saved = counts.stack_flops(TINY_KIMI.decoder, 5, 2 * 3, 6)
    assert repeated - (shared - adaptor) == pytest.approx(saved)


def test_windows_bound_attention():
    whole = counts.encoder_flops(TINY_WHISPER, 1, 40)
    windowed = counts.encoder_flops(TINY_WHISPER, 1, 40, 8)
    # 20 steps, 2 layers, 8 wide: each step sees 20 or 4.
    assert whole - windowed == 2 * 20 * 4 * (20 - 4) * 8


def test_adaptive_norms_are_counted_once_per_code():
    # One code, 4 frames, 2 blocks of 12: 4 D^2 + 8 D^2 per frame, 6 D^2 per code.
    per_frame = 2 * 12 * 144 + 4 * 4 * 12
    ends = 4 * 2 * 2 * 5 * 12 + 2 * 2 * 144
    assert counts.dit_flops(TINY_DIT, 1, 1) == 2 * (4 * per_frame + 2 * 6 * 144) + ends


def test_chunks_solve_what_they_held_back_again():
    whole = counts.solve_flops(TINY_DIT, 1, 30, 29, None)
    chunks = counts.Chunks(first=30, chunk=30, look_ahead=12, max_kv=900)
    assert counts.solve_flops(TINY_DIT, 1, 30, 29, chunks) == whole
    # 31 codes: a window of 30 and one of 12 + 30 that sees the 4 * 18 frames kept of the first;
    # the keys of what they keep cost a pass over 18 and 30.
    one = functools.partial(counts.dit_flops, TINY_DIT, 1)
    expected = 29 * (one(30) + one(42, 72)) + one(18) + one(30, 72)
    assert counts.solve_flops(TINY_DIT, 1, 31, 29, chunks) == expected
    # 375 codes: 12 windows after the first, which see more and more, 900 frames at the most.
    windows = chunks.windows(375)
    seen = [past for _, past in windows]
    assert len(windows) == 13 and seen == sorted(seen) and seen[-1] == 900


def test_vocoder_by_hand():
    # 3 frames: 7 x 5 x 8; then x2 by 4 taps 8 -> 4 from 3 steps, at 6 steps 4 convolutions of each
    # width 3 and 5; then x3 by 5 taps 4 -> 2 from 6 steps, at 18 steps the same; 7 taps 2 -> 1.
    products = 3 * 7 * 40 + 3 * 4 * 32 + 6 * 4 * 8 * 16 + 6 * 5 * 8 + 18 * 4 * 8 * 4 + 18 * 14
    assert counts.vocoder_flops(TINY_VOCODER, 1, 3) == 2 * products


def peta(flops: float) -> float:
    return flops / 1e15


def test_the_table_of_floors():
    """Sizes and operations of a step: 32 x 8 answers of 375 tokens, prompts of 160."""
    c = RELEASED.policy
    assert counts.kimi_params(c) == pytest.approx(9.77e9, rel=1e-3)
    assert counts.layer_weights(c.decoder) == pytest.approx(233.0e6, rel=1e-3)
    weights = 34 * counts.layer_weights(c.decoder) + counts.head_weights(c)
    assert weights == pytest.approx(9.13e9, rel=1e-3)
    assert counts.kv_bytes_per_token(c) == 69_632
    # Decoding: every token once through all weights, and its keys.
    decode = counts.kimi_flops(c, 32, 8, 160, 375) - counts.kimi_flops(c, 32, 8, 160, 0)
    assert peta(decode) == pytest.approx(1.77, abs=0.01)
    # The table runs a prompt for every answer, here for every group.
    repeated = peta(counts.kimi_flops(c, 32, 8, 160, 375, shared=False))
    assert repeated == pytest.approx(2.42, abs=0.01)
    assert 3 * repeated == pytest.approx(7.26, abs=0.02)
    assert peta(counts.kimi_flops(c, 32, 8, 160, 375)) == pytest.approx(1.86, abs=0.01)
    # Prompts: 5120 positions of language model, 32 pieces of 30 s of Whisper.
    prefill = counts.kimi_flops(c, 32, 8, 160, 0) + counts.encoder_flops(RELEASED.encoder, 32, 3000)
    assert peta(prefill) == pytest.approx(0.15, abs=0.02)
    # 1.53B weights in the blocks, 29 evaluations of 1500 frames a row: 34 PFLOP, 26 with the
    # adaptive norms once per code; attention and the ends add to either.
    solve = counts.solve_flops(RELEASED.dit, 256, 375, 29, None)
    attention = 256 * 29 * 16 * 4 * 1500**2 * 2304
    assert peta(solve - attention) == pytest.approx(25.7, abs=0.3)
    # The reward model hears 1100 tokens a row there, 28 layers of the same width.
    text = RELEASED.reward.text
    assert peta(counts.stack_flops(text, 28, 256, 1100)) == pytest.approx(3.74, abs=0.01)
    hear, read = counts.reward_flops(RELEASED.reward, 32, 8, 12.4, 30.0)
    # The query's share of tower and language model is paid once per group here.
    assert 0.48 < peta(hear) < 0.66 and 2.4 < peta(read) < 3.74


def test_released_sizes_of_the_other_parts():
    assert counts.encoder_params(RELEASED.encoder) == pytest.approx(637e6, rel=1e-2)
    assert counts.dit_params(RELEASED.dit) == pytest.approx(1.53e9 + 43e6 + 11e6, rel=1e-2)
    assert counts.reward_params(RELEASED.reward) == pytest.approx(8.26e9, rel=1e-2)
    assert math.isfinite(counts.vocoder_params(RELEASED.vocoder))
