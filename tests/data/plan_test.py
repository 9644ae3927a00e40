import itertools

import numpy as np
import pytest

from paras2s_jax.data import plan


def rng(seed=0):
    return np.random.default_rng(seed)


def test_rows_in_order_are_completed_by_padding_or_by_the_first():
    ranks = np.zeros(5, int)
    once = plan.order_rows(ranks, batch_size=2, shuffle=False, repeat=False, rng=rng())
    assert once.tolist() == [[0, 1], [2, 3], [4, -1]]
    again = plan.order_rows(ranks, batch_size=2, shuffle=False, repeat=True, rng=rng())
    assert again.tolist() == [[0, 1], [2, 3], [4, 0]]


def test_a_batch_larger_than_the_data_repeats_it():
    out = plan.order_rows(np.zeros(2, int), batch_size=5, shuffle=True, repeat=True, rng=rng())
    assert sorted(np.bincount(out.ravel())) == [2, 3]


@pytest.mark.parametrize("repeat", [False, True])
def test_shuffled_rows_all_appear_and_ranks_do_not_mix(repeat):
    # 32 rows of rank 0 and 32 of rank 1: with whole windows, all 16 batches of 4 can be pure.
    ranks = np.arange(64) % 2
    out = plan.order_rows(ranks, batch_size=4, shuffle=True, repeat=repeat, rng=rng())
    assert sorted(out.ravel()) == list(range(64))
    assert (ranks[out] == ranks[out][:, :1]).all()
    # Batches of both ranks alternate at random, not all short ones first.
    assert (np.diff(ranks[out][:, 0]) != 0).sum() > 1


def test_the_incomplete_batch_stays_last():
    for seed in range(5):
        out = plan.order_rows(
            np.zeros(11, int), batch_size=3, shuffle=True, repeat=False, rng=rng(seed)
        )
        assert (out[:-1] >= 0).all()
        assert (out[-1] == -1).sum() == 1


def test_groups_stay_whole_and_fill_gaps():
    # Sizes 3, 2, 2, 1 into batches of 4: {3 + 1}, {2 + 2}.
    groups = [np.array([0, 1, 2]), np.array([3, 4]), np.array([5, 6]), np.array([7])]
    out = plan.order_groups(np.zeros(8, int), groups, batch_size=4, shuffle=False, rng=rng())
    assert out.tolist() == [[0, 1, 2, 7], [3, 4, 5, 6]]


def test_groups_give_equally_many_batches_whatever_the_order():
    sizes = [3, 1, 2, 2, 5, 1, 4, 3, 3, 2]
    starts = np.cumsum([0, *sizes])
    groups = [np.arange(a, b) for a, b in itertools.pairwise(starts)]
    ranks = np.arange(starts[-1]) % 3
    plans = [
        plan.order_groups(ranks, groups, batch_size=6, shuffle=True, rng=rng(seed))
        for seed in range(8)
    ]
    assert len({len(p) for p in plans}) == 1
    assert len({p.tobytes() for p in plans}) > 1
    for out in plans:
        assert sorted(out[out >= 0]) == list(range(starts[-1]))
        for group in groups:
            assert (np.isin(out, group).sum(axis=1) > 0).sum() == 1


def test_a_group_larger_than_a_batch_is_an_error():
    with pytest.raises(ValueError, match="group of 3 rows exceeds batch_size 2"):
        plan.order_groups(np.zeros(3, int), [np.arange(3)], batch_size=2, shuffle=False, rng=rng())
