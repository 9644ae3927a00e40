import pytest

from paras2s_jax.plan.worker import needed_bytes


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile error. Ran out of memory in memory space "
            "hbm. Used 26.5G of 15.75G hbm. Exceeded hbm capacity by 10.75G.",
            round(26.5 * 2**30),
        ),
        ("Used 512.00M of 256.00M hbm", 512 * 2**20),
        ("INTERNAL: RET_CHECK failure", None),
        ("Ran out of memory in memory space vmem. Used 40.0M of 16.0M vmem.", None),
    ],
)
def test_what_a_program_that_does_not_fit_would_take(message, needed):
    assert needed_bytes(message) == needed
