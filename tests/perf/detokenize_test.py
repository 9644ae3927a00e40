"""Detokenizing in a batch and one by one, by networks so small that speed means nothing."""

import dataclasses

import numpy as np
import pytest

from paras2s_jax.models.bigvgan import BigVGANConfig
from paras2s_jax.models.detokenizer import FlowMatchingDetokenizer
from paras2s_jax.models.flow_matching import FlowMatchingConfig
from paras2s_jax.perf import detokenize
from paras2s_jax.perf.race import RaceError

SMALL = detokenize.Work(
    FlowMatchingConfig(hidden_size=12, depth=1, num_heads=2, semantic_vocab_size=32, input_size=5),
    BigVGANConfig(
        upsample_rates=(2,),
        upsample_kernel_sizes=(4,),
        upsample_initial_channel=8,
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((2,),),
        num_mels=5,
        sampling_rate=100,
        hop_size=2,
        n_fft=32,
        win_size=32,
    ),
    answers=3,
    min_codes=4,
    max_codes=13,
    rows_at_once=2,
    first=6,
    chunk=7,
    look_ahead=2,
    max_kv=50,
)


def test_batch_streams_and_whole_answers_agree():
    figures = detokenize.measure(SMALL, repeats=1).figures()
    assert figures["detokenize/recompilations"] == 0
    assert figures["detokenize/level"] > 100 * figures["detokenize/max_difference"] > 0
    for name in ("ratio", "whole_ratio", "audio_s_per_s"):
        assert figures[f"detokenize/{name}"] > 0


def test_waves_that_differ_are_refused(monkeypatch):
    stream = FlowMatchingDetokenizer.stream_chunk

    def louder(self, *args):
        state, mel, wave = stream(self, *args)
        return state, mel, 1.1 * wave

    monkeypatch.setattr(FlowMatchingDetokenizer, "stream_chunk", louder)
    with pytest.raises(RaceError, match="detokenize: answers differ"):
        detokenize.measure(SMALL, repeats=1)


def test_approximations_are_worse_with_fewer_steps():
    figures = detokenize.approximations(SMALL)
    errors = [figures[f"steps_{n}/mel_error"] for n in (15, 10, 5)]
    assert 0 < errors[0] < errors[1] < errors[2]
    assert 0 < figures["bfloat16/mel_error"] < errors[2]
    assert all(np.isfinite(list(figures.values())))


def test_lengths_are_spread_and_shuffled():
    codes, lens = dataclasses.replace(SMALL, answers=4).codes()
    assert codes.shape == (4, 13) and codes.max() < 32
    assert sorted(lens.tolist()) == [4, 7, 10, 13]
