"""Torch files: unwrapped, without running what is pickled in them, and without torch an error."""

import argparse
import sys

import ml_dtypes
import numpy as np
import pytest
import torch

from paras2s_jax.convert import torch_files
from paras2s_jax.convert.checkpoint import Checkpoint, ConversionError

TENSORS = {
    "a.weight": torch.arange(6.0).reshape(2, 3).T,  # not contiguous
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "count": torch.tensor(3),
    "learned": torch.nn.Parameter(torch.ones(2)),
}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: {"state_dict": t, "step": 5},
        lambda t: {"generator": t},
        lambda t: {"model": {"state_dict": t}, "optimizer": None},
    ],
)
def test_tensors_are_found(tmp_path, wrap):
    torch.save(wrap(TENSORS), tmp_path / "x.pt")
    torch_files.to_safetensors(tmp_path / "x.pt", tmp_path / "out")
    found = Checkpoint(tmp_path / "out")
    assert set(found) == set(TENSORS)
    np.testing.assert_array_equal(found["a.weight"], [[0, 3], [1, 4], [2, 5]])
    assert found["half"].dtype == ml_dtypes.bfloat16 and found["half"].tolist() == [1.5, -2.0]
    assert found["count"].shape == () and found["count"] == 3
    np.testing.assert_array_equal(found["learned"], [1, 1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": TENSORS, "args": argparse.Namespace(a=1)}, "not a torch file of plain"),
        ({"weights": TENSORS}, r"holds \['weights'\]; tensors were looked for at"),
        ({}, r"holds \[\]"),
        (torch.ones(2), "holds a Tensor"),
    ],
)
def test_other_files_are_errors(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ConversionError, match=message):
        torch_files.read(tmp_path / "x.pt")


def test_a_truncated_file(tmp_path):
    torch.save(TENSORS, tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:200])
    with pytest.raises(ConversionError, match=r"x\.pt is not a torch file"):
        torch_files.read(tmp_path / "x.pt")


def test_torch_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConversionError, match=r"pip install 'paras2s-jax\[convert\]'"):
        torch_files.read(tmp_path / "x.pt")
