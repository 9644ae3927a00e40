from paras2s_jax.perf import faults


def test_nothing_is_lost_or_paid_twice():
    figures = faults.run(queries=10, kills=1, seed=1)
    assert figures["faults/lost"] == 0
    assert figures["faults/paid_twice"] == 0
    assert figures["faults/mean_difference"] == 0
    # Each of 10 queries is answered once and scored in two styles: more calls than questions, for
    # the faults, and some of these were seen as failures.
    assert figures["faults/calls"] > 30
    assert figures["faults/seen_failures"] > 0
    assert 0 <= figures["faults/in_flight"] <= faults.CONCURRENCY
