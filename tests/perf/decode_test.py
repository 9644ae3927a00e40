"""Measures of decoding on models so small that speed means nothing: answers agree."""

import dataclasses

import pytest

from paras2s_jax.models.qwen2 import Qwen2Config
from paras2s_jax.perf import decode


def test_a_group_has_the_first_token_of_its_prompt():
    config = Qwen2Config(31, 16, 20, 2, 4, 2)
    assert decode.group_prefill(config, prompt=5, group_size=2, repeats=1) > 0


def test_halving_gives_the_same_answers():
    config = dataclasses.replace(decode.POLICY, hidden_size=16, intermediate_size=20)
    found = decode.halving(config, prompts=2, group_size=4, max_steps=40, halvings=2, repeats=1)
    assert found["ratio"] > 0 and 0.1 < found["live_share"] <= 1


def test_copy_bandwidth_counts_reads_and_writes(monkeypatch):
    # 1024 bytes read and as many written in 2 s.
    monkeypatch.setattr(decode, "_seconds", lambda call: call() is None or 2.0)
    assert decode.copy_bandwidth(1024, repeats=2) == pytest.approx(1024.0)
