"""Races of models so small that speed means nothing: answers agree, a shape compiles once."""

import pytest

from paras2s_jax.models.qwen2 import Qwen2Config
from paras2s_jax.models.whisper_layers import WhisperConfig
from paras2s_jax.perf import forward
from paras2s_jax.perf.race import RaceError

SMALL = {
    "whisper_encoder": lambda: forward.whisper_encoder(
        WhisperConfig(12, 2, 3, 20, num_mel_bins=5, max_source_positions=24), rows=2, repeats=1
    ),
    "decode": lambda: forward.greedy(
        Qwen2Config(31, 16, 20, 2, 4, 2), rows=2, prompt=5, steps=4, repeats=1
    ),
    "log_mel": lambda: forward.log_mel(rows=2, seconds=1, repeats=1),
}


@pytest.mark.parametrize("name", SMALL)
def test_race_on_a_small_model(name):
    assert set(SMALL) == set(forward.RACES)
    result = SMALL[name]()
    assert result.name == name and result.ratio > 0 and result.compiled == 0


def test_unknown_race_is_refused():
    with pytest.raises(RaceError, match="there is no race sprint"):
        forward.run(races="decode,sprint")
