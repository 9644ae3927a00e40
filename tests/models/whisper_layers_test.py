"""Parts of Whisper that are computed in another form on some platforms."""

import jax
import numpy as np
import pytest

from paras2s_jax.models.whisper_layers import every_second


@pytest.mark.parametrize("steps", [4, 7, 8])
@pytest.mark.parametrize("padding", [(1, 1), (2, 0), (0, 0)])
def test_three_taps_at_stride_two_are_one_product(steps, padding):
    rng = np.random.default_rng(steps)
    x = rng.normal(size=(2, steps, 5)).astype(np.float32)
    kernel = rng.normal(size=(3, 5, 4)).astype(np.float32)
    wanted = jax.lax.conv_general_dilated(
        x, kernel, (2,), [padding], dimension_numbers=("NWC", "WIO", "NWC")
    )
    np.testing.assert_allclose(every_second(x, kernel, padding), wanted, rtol=1e-5, atol=1e-5)
