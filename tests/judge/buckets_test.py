import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paras2s_jax.judge.buckets import Buckets


def _waves(*lens):
    return [np.full(n, i + 1, np.float32) for i, n in enumerate(lens)]


def test_rows_come_back_in_order_with_few_shapes():
    shapes = []

    @jax.jit
    def sums(waves, lens):
        shapes.append(waves.shape)  # Runs while tracing only: one entry per compilation.
        return {"sum": jnp.sum(waves, axis=1), "len": lens}

    buckets = Buckets((0.1, 0.2), batch_size=2)
    # 0.1 s = 1600 samples, 0.2 s = 3200: three short waves (two batches) and two long ones.
    lens = (100, 3200, 1600, 1601, 7)
    for _ in range(2):
        rows = buckets.run(sums, _waves(*lens))
        assert [row["len"] for row in rows] == list(lens)
        assert [row["sum"] for row in rows] == [(i + 1) * n for i, n in enumerate(lens)]
    assert sorted(shapes) == [(2, 1600), (2, 3200)]


def test_waves_of_like_lengths_share_a_batch():
    batches = []

    def note(waves, lens):
        batches.append(lens.tolist())
        return lens

    assert Buckets((0.1,), 2).run(note, _waves(5, 900, 7, 800)) == [5, 900, 7, 800]
    assert batches == [[5, 7], [800, 900]]


def test_nothing_in_nothing_out():
    assert Buckets((0.1,), 2).run(lambda waves, lens: lens, []) == []


def test_too_long_and_no_buckets_are_clear_errors():
    with pytest.raises(ValueError, match=r"0\.20 s exceeds the longest bucket of 0\.10 s"):
        Buckets((0.1,), 2).run(lambda waves, lens: lens, _waves(3200))
    with pytest.raises(ValueError, match="bucket length"):
        Buckets((), 2)
