import pytest

from paras2s_jax.perf import judge
from paras2s_jax.perf.race import RaceError


def test_both_ways_give_the_same_verdicts(monkeypatch):
    monkeypatch.setattr(judge, "NUM_SPOKEN", 4)
    figures = judge.run(pairs=6, single=2, batch_size=4)
    assert figures["judge/pairs"] == 6
    assert figures["judge/throughput_ratio"] == pytest.approx(
        figures["judge/pairs_per_s"] / figures["judge/single_pairs_per_s"]
    )


def test_different_verdicts_are_refused():
    judge._check_equal([3.0, 4.0], [3.0, 4.00001])
    with pytest.raises(RaceError, match="differ by up to 1"):
        judge._check_equal([3.0, 4.0], [3.0, 5.0])
    with pytest.raises(RaceError):
        judge._check_equal([float("nan")], [3.0])
