import dataclasses
import functools
import json
import runpy
import threading
import time
from pathlib import Path

import pytest

from paras2s_jax.perf import plan as perf_plan
from paras2s_jax.plan import aot, compile, counts, hlo, work
from paras2s_jax.plan.hardware import PlanError, topology_of
from paras2s_jax.plan.sizes import sizes_of
from paras2s_jax.plan.verdict import PhasePlan
from paras2s_jax.plan.work import Phase

CONFIG = Path(__file__).parents[2] / "configs" / "kimi_audio_7b.py"


@pytest.fixture
def config():
    """Full width, one layer in each stack, four chips."""
    config = perf_plan.shallow(runpy.run_path(str(CONFIG))["get_config"]("v5e-8x8"), 1)
    config.topology = "v5e-2x2"
    for name, tensor in (("mesh", 2), ("decode_mesh", 4)):
        config[name].update(data=1, fsdp=4 // tensor, tensor=tensor)
    return config


def test_a_few_layers_are_planned_without_a_chip(config, tmp_path):
    """The released widths, compiled for a TPU that is not there."""
    config.policy.max_steps = 64
    topology = topology_of(config.topology)
    job = {"stage": "grpo", "topology": topology.name, "num_devices": 4, "phase": "rollout"}
    aot.write_config(config, tmp_path)
    aot.run_worker(tmp_path / "rollout", job, dump=True)
    made = aot.Compiled.load(tmp_path / "rollout" / aot.COMPILED)
    sizes = sizes_of(config)
    phase = work.rollout(sizes, work.shape_of(config, "grpo", 0))
    plan = PhasePlan(made, phase, topology)
    assert plan.compiled.memory.temps > 0 and plan.compiled.compile_s > 0
    # bfloat16 weights over four, but for the adaptor, which all devices hold.
    split = 2 * counts.kimi_params(sizes.policy) / 4
    assert split < plan.compiled.arguments["inputs"] < 1.1 * split
    # Full weights, moments, reference and reward model lie beside it, on four devices.
    assert set(plan.compiled.others) == {
        "policy", "optimizer", "reference", "reward model", "front end",
    }  # fmt: skip
    program = hlo.Program.load(aot.dumped(tmp_path / "rollout" / "hlo"))
    figures = perf_plan.read_decode(config, plan.compiled, program)
    assert figures["plan/decode/cache_copies"] == 0
    assert figures["plan/decode/allreduces_per_layer"] <= 2
    assert figures["plan/decode/spread"] == 1.0
    # A prompt needs no more of the last layers than their keys.
    assert 0.9 < plan.executed_ratio < 1.1


def test_a_plan_without_its_programs_is_not_read(config, tmp_path):
    with pytest.raises(PlanError, match=r"holds no compiled rollout: .*--phases=rollout,update"):
        perf_plan.run(config, plan=str(tmp_path))


def test_gpus_are_planned_by_counting(config, tmp_path):
    config.topology = "h100-8"
    for name in ("mesh", "decode_mesh"):
        config[name].update(data=1, fsdp=8, tensor=1)
    figures = compile.run(config, str(tmp_path), "grpo", chip_hour_price=2.0, judge_price=1.0)
    assert figures["plan/h100-8/fits"] == 1.0
    assert "plan/h100-8/flops_ratio" not in figures
    written = json.loads((tmp_path / "plan" / "grpo" / compile.PLAN).read_text())
    assert [phase["phase"] for phase in written["phases"]][-1] == "update"
    totals = written["totals"]
    assert totals["chips_cost"] == pytest.approx(2.0 * totals["chip_hours"])
    assert totals["step_s"] == pytest.approx(totals["floor_s"] / 0.4)
    assert "judge_cost" not in totals
    assert (tmp_path / "plan" / "grpo" / compile.CHART).read_text().startswith("<svg")


def test_phases_compiled_before_are_taken_as_they_are(config, tmp_path, monkeypatch):
    ran = []

    def run_worker(folder, job, dump=False):
        ran.append(job["phase"])
        folder.mkdir(parents=True, exist_ok=True)
        made = dataclasses.asdict(aot.Compiled(job["phase"], None, {}, {}))
        (folder / aot.COMPILED).write_text(json.dumps(made))
        described = {"trained_params": 1, "phases": [made | {"phase": "hear"}]}
        (folder / aot.DESCRIBED).write_text(json.dumps(described))

    monkeypatch.setattr(aot, "run_worker", run_worker)
    monkeypatch.setattr(aot, "check_compiler", lambda _: None)
    plan = functools.partial(compile.make, stage="grpo", folder=tmp_path)
    plan(config, topology=topology_of("v5e-2x2"), reuse=True)
    plan(config, topology=topology_of("v5e-2x2"), reuse=True)
    assert ran == [None, "hear", None]
    # Another config, or not asked for.
    plan(config, topology=topology_of("v5e-2x2"))
    config.policy.max_steps = 32
    plan(config, topology=topology_of("v5e-2x2"), reuse=True)
    assert ran[3:] == [None, "hear"] * 2


def test_phases_are_compiled_side_by_side_until_one_fails(config, tmp_path, monkeypatch):
    begun, both = [], threading.Barrier(2, timeout=20)

    def run_worker(folder, job, dump=False):
        begun.append(folder.name)
        if folder.name in ("hear", "rollout"):
            both.wait()
            raise PlanError(f"{folder.name} cannot be compiled")
        time.sleep(1.0)  # Goes on while those that wait are called off.

    monkeypatch.setattr(aot, "run_worker", run_worker)
    job = {"stage": "grpo", "topology": "v5e-2x2"}
    places = [tmp_path / name for name in ("hear", "rollout", "speak", "reward", "update")]
    with pytest.raises(PlanError, match=r"(hear|rollout) cannot be compiled"):
        compile._compile(places, job, 2)
    assert {"hear", "rollout"} <= set(begun) and "update" not in begun


def test_a_plan_that_does_not_fit_is_refused(config, tmp_path, monkeypatch):
    huge = aot.Compiled("update", aot.Memory(0, 0, 0, 99 << 30, 0), {}, {})
    plans = [PhasePlan(huge, Phase(1e15, 1e9), topology_of("v5e-2x2"))]
    monkeypatch.setattr(compile, "make", lambda *_: plans)
    with pytest.raises(PlanError, match=r"does not fit v5e-2x2: update needs 99\.0 GiB"):
        compile.run(config, str(tmp_path), "grpo")
    # What was found is written all the same.
    assert json.loads((tmp_path / "plan" / "grpo" / compile.PLAN).read_text())["phases"]


def test_the_judge_is_paid_for_what_distillation_samples(config):
    plans = [
        PhasePlan(aot.Compiled("update", None, {}, {}), Phase(1e15, 1e9), topology_of("v5e-2x2"))
    ]
    totals = compile.total(config, "distill", topology_of("v5e-2x2"), plans, 0.5, 0.0, 3.0)
    assert totals["judge_cost"] == pytest.approx(320_000 * 3 / 1000)


def test_a_missing_compiler_names_the_remedy(monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(PlanError, match=r"pip install libtpu \(or 'paras2s-jax\[tpu\]'\)"):
        aot.check_compiler(topology_of("v5e-8x8"))
    aot.check_compiler(topology_of("h100-8"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topology": ""}, "names no topology"),
        ({"topology": "v9-1"}, "no topology 'v9-1'"),
    ],
)
def test_configs_that_cannot_be_planned(config, tmp_path, change, message):
    config.update(change)
    with pytest.raises(PlanError, match=message):
        compile.run(config, str(tmp_path), "grpo")


def test_an_impossible_efficiency_is_refused(config, tmp_path):
    with pytest.raises(PlanError, match=r"efficiency is 0: give a share"):
        compile.run(config, str(tmp_path), "grpo", efficiency=0)
    with pytest.raises(PlanError, match="--jobs is 0: give how many"):
        compile.run(config, str(tmp_path), "grpo", jobs=0)


def test_a_mesh_of_another_size_is_refused_by_the_worker(config, tmp_path):
    config.topology = "h100-8"
    with pytest.raises(PlanError, match=r"config\.mesh .* is for 4 devices, the topology has 8"):
        compile.make(config, "grpo", topology_of("h100-8"), tmp_path)


def test_configs_reach_workers_as_they_are(config, tmp_path):
    aot.write_config(config, tmp_path)
    assert aot.read_config(tmp_path).to_dict() == config.to_dict()
