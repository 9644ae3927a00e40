import dataclasses

import pytest

from paras2s_jax.plan import verdict
from paras2s_jax.plan.aot import Compiled, Memory
from paras2s_jax.plan.chart import memory_chart
from paras2s_jax.plan.hardware import CHIPS, GIB, PlanError, Topology, topology_of
from paras2s_jax.plan.verdict import PhasePlan
from paras2s_jax.plan.work import Phase

FOUR = Topology("v5e-2x2", CHIPS["v5e"], 4, "v5e:2x2")


def make_plan(phase="update", temps=2.0, **changes) -> PhasePlan:
    """GiB: policy 3 and inputs 1 are arguments, policy is given back; reference 4 stays beside."""
    memory = Memory(
        arguments=round(4.25 * GIB),
        outputs=3 * GIB,
        alias=3 * GIB,
        temps=round(temps * GIB),
        code=0,
    )
    compiled = Compiled(
        phase,
        memory,
        arguments={"policy": 3 * GIB, "inputs": GIB},
        others={"reference": 4 * GIB},
        flops=30e12,
        wire={"all-gather": 9e9, "all-reduce": 9e9},
    )
    made = PhasePlan(dataclasses.replace(compiled, **changes), Phase(100e12, 819e8), FOUR)
    return made


def test_memory_is_what_is_given_what_stays_and_what_comes_and_goes():
    plan = make_plan()
    # Padding of the arguments, a quarter, counts as temporary; donated results cost nothing.
    assert {name: size / GIB for name, size in plan.parts.items()} == {
        "policy": 3, "inputs": 1, "reference": 4, "temporaries": 2.25,
    }  # fmt: skip
    assert plan.hbm_bytes == 10.25 * GIB


def test_the_floor_is_the_longest_of_three_times():
    plan = make_plan()
    # 100 TFLOP on four chips of 197; 81.9 GB at 819 GB/s; 18 GB at 180 GB/s.
    assert plan.flops_s == pytest.approx(100 / (4 * 197))
    assert plan.hbm_s == pytest.approx(0.1) and plan.wire_s == pytest.approx(0.1)
    assert plan.floor_s == plan.flops_s and plan.bound == "flops"
    slow = make_plan(wire={"all-gather": 180e9})
    assert slow.floor_s == pytest.approx(1.0) and slow.bound == "links"
    # 30 TFLOP on each of four devices where the model needs 100.
    assert plan.executed_ratio == pytest.approx(1.2)
    assert make_plan(flops=None).executed_ratio is None


def test_a_plan_fits_or_is_refused_with_what_helps():
    good, bad = make_plan(), make_plan(temps=8.0)
    assert verdict.fits([good]) and not verdict.fits([good, bad])
    told = verdict.refusal([good, bad], "grpo")
    assert "does not fit v5e-2x2: update needs 16.2 GiB of a chip's 16 (usable 15.2" in told
    assert "temporaries 8.2, reference 4.0, policy 3.0" in told
    assert "--config.grpo.accum_steps" in told and "--config.policy.remat=full" in told


@pytest.mark.parametrize(
    ("phase", "stage", "knob"),
    [
        ("update", "distill", "--config.distill.model.remat=full"),
        ("reference", "grpo", "--config.grpo.accum_steps"),
        ("rollout", "respond", "--config.decode_mesh.tensor"),
        ("speak", "grpo", "config.mesh.data"),
        ("hear", "grpo", "larger slice"),
    ],
)
def test_knobs_suit_the_phase(phase, stage, knob):
    assert any(knob in text for text in verdict.knobs(make_plan(phase, temps=9.0), stage))


def test_much_optimizer_calls_for_adapters():
    plan = make_plan(arguments={"optimizer": 12 * GIB}, memory=None)
    assert any("lora" in text for text in verdict.knobs(plan, "grpo"))


def test_a_chart_has_a_bar_per_phase_and_the_chip():
    svg = memory_chart("a <plan>", [make_plan(), make_plan("hear", temps=0.0)])
    assert svg.startswith("<svg") and "a &lt;plan&gt;" in svg
    assert "temporaries: 2.25 GiB" in svg and ">hear</text>" in svg and ">10.2</text>" in svg
    assert "stroke-dasharray" in svg


def test_slices_by_name():
    found = topology_of("v5p-4x4x4")
    assert (found.num_chips, found.aot, found.chip.hbm_bytes) == (64, "v5p:4x4x4", 95 * GIB)
    with pytest.raises(PlanError, match=r"no topology 'v5p-64'; did you mean v5e-8x8|v5p-"):
        topology_of("v5p-64")
