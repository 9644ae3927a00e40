"""What a race measures, on calls whose times are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paras2s_jax.perf import race


def test_ratios_by_hand():
    # Pairs 9 / 2, 6 / 4, 4 / 5 -> median 1.5; fastest calls 4 and 2 -> 2.
    # Processor time 4 / 2 -> 2.
    result = race.Race(
        "x", (2.0, 4.0, 5.0), (9.0, 6.0, 4.0), (2.0, 3.0, 3.0), (4.0, 5.0, 6.0), (0.5, 0.7)
    )
    assert result.ratio == 1.5 and result.best_ratio == 2.0
    assert result.figures() == {
        "x/ratio": 1.5,
        "x/best_ratio": 2.0,
        "x/cpu_ratio": 2.0,
        "x/ours_ms": 2000.0,
        "x/theirs_ms": 4000.0,
        "x/load": 0.7,
        "x/recompilations": 0,
    }


def test_calls_alternate_and_the_first_are_dropped():
    calls = []
    result = race.race(
        "x", lambda: calls.append("ours"), lambda: calls.append("theirs"), repeats=3, warmup=1
    )
    assert calls == ["ours", "theirs"] * 4
    assert len(result.ours_s) == len(result.theirs_s) == 3


def test_only_compilations_after_the_warm_up_count():
    sizes = iter([3, 3, 4, 4, 5])
    double = jax.jit(lambda x: 2 * x)
    result = race.race(
        "x", lambda: double(np.zeros(next(sizes))), lambda: None, repeats=4, warmup=1
    )
    assert result.compiled == 2


def test_answers_that_differ_stop_the_race():
    assert race.check_equal("x", jnp.ones(3), np.ones(3), 0.0) == 0.0
    with pytest.raises(race.RaceError, match=r"x: answers differ by 0.5, more than 0.1"):
        race.check_equal("x", np.ones(3), np.full(3, 1.5), 0.1)
    with pytest.raises(race.RaceError, match="differ"):
        race.check_equal("x", np.array([np.nan]), np.ones(1), 0.1)
    with pytest.raises(race.RaceError, match=r"shapes \(3,\) and \(2,\)"):
        race.check_equal("x", np.ones(3), np.ones(2), 0.1)


def test_laps_keep_the_fastest_of_each_part():
    laps = race.Laps()
    assert laps("double", lambda x: 2 * x, 3) == 6
    laps.seconds = {"double": [0.5, 0.25], "halve": [1.0]}
    assert laps.best_ms("ours") == {"ours_double_ms": 250.0, "ours_halve_ms": 1000.0}
