"""The synthetic checkpoint is one that converts; memory and speed are not tested here."""

import numpy as np

from paras2s_jax.convert.checkpoint import Checkpoint
from paras2s_jax.perf import convert


def test_a_small_checkpoint_is_converted_and_measured(tmp_path, monkeypatch):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    monkeypatch.setattr(convert, "SIZES", convert.SIZES | sizes)
    monkeypatch.setattr(convert, "SHARD_BYTES", 30_000)
    convert.write_release(tmp_path / "r", 1e-4)
    checkpoint = Checkpoint(tmp_path / "r")
    assert len(list((tmp_path / "r").glob("*.safetensors"))) > 2
    assert 1e5 <= checkpoint.nbytes < 1.3e5
    value = checkpoint["model.layers.0.mlp.up_proj.weight"].astype(np.float32)
    assert np.abs(value).max() < 0.02 and len(np.unique(value)) > 100
    figures = convert.run(1e-4, str(tmp_path / "s"))
    assert figures["convert/checkpoint_gb"] == checkpoint.nbytes / 1e9
    assert figures["convert/gb_per_s"] > 0 and figures["convert/peak_over_baseline_gb"] < 1
    assert not list((tmp_path / "s").iterdir())
