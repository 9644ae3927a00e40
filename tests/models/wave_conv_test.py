"""Convolutions over waves: lengths, and the fold of weight norm against torch."""

import jax
import numpy as np
import pytest
import torch

from paras2s_jax.models.wave_conv import (
    SameConv,
    fold_weight_norm,
    mean_over_time,
    num_frames,
    receptive_field,
)

KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)


def test_frames_of_the_released_stack():
    # 25 ms windows every 20 ms: 400 samples make one frame, 719 still one, 720 two.
    assert receptive_field(KERNELS, STRIDES) == 400
    assert [num_frames(n, KERNELS, STRIDES) for n in (400, 719, 720)] == [1, 1, 2]
    # 30 s: (480000 - 400) // 320 + 1.
    assert num_frames(480_000, KERNELS, STRIDES) == 1499
    assert num_frames(np.array([399, 720]), KERNELS, STRIDES).tolist() == [0, 2]


@pytest.mark.parametrize("kernel", [7, 8])
def test_weight_normed_convolution_equals_torch(kernel):
    torch.manual_seed(0)
    conv = torch.nn.Conv1d(12, 12, kernel, padding=kernel // 2, groups=3)
    conv = torch.nn.utils.parametrizations.weight_norm(conv, dim=2)
    weight = conv.parametrizations.weight
    with torch.no_grad():
        weight.original0.mul_(torch.rand(1, 1, kernel) + 0.5)
        x = torch.randn(2, 9, 12)
        want = conv(x.transpose(1, 2))[..., :9].transpose(1, 2)
    params = {
        "length": weight.original0.detach().numpy().transpose(2, 1, 0),
        "direction": weight.original1.detach().numpy().transpose(2, 1, 0),
        "bias": conv.bias.detach().numpy(),
    }
    folded = fold_weight_norm(params["direction"], params["length"])
    np.testing.assert_allclose(folded, conv.weight.detach().numpy().transpose(2, 1, 0), atol=1e-6)
    got = jax.jit(SameConv(kernel, 3, use_weight_norm=True).apply)({"params": params}, x.numpy())
    np.testing.assert_allclose(got, want.numpy(), atol=1e-5)


def test_mean_leaves_out_what_is_masked():
    x = np.array([[[1.0], [3.0], [100.0]], [[5.0], [7.0], [9.0]]])
    mask = np.array([[True, True, False], [True, True, True]])
    assert mean_over_time(x, mask).tolist() == [[2.0], [7.0]]
    # Nothing real: zero, not a division by zero.
    assert mean_over_time(x[:1], np.zeros((1, 3), bool)).tolist() == [[0.0]]
