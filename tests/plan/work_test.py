import dataclasses
import runpy
from pathlib import Path

import pytest

from paras2s_jax.plan import counted, counts, work
from paras2s_jax.plan.aot import Compiled
from paras2s_jax.plan.sizes import sizes_of

CONFIG = Path(__file__).parents[2] / "configs" / "kimi_audio_7b.py"


def config_for(arg: str):
    return runpy.run_path(str(CONFIG))["get_config"](arg)


RELEASED = sizes_of(config_for("v5p-4x4x4"))


@pytest.fixture(scope="module")
def config():
    return config_for("v5p-4x4x4")


@pytest.fixture(scope="module")
def shape(config):
    return work.shape_of(config, "grpo", counts.kimi_params(RELEASED.policy))


def test_the_papers_step(config, shape):
    # 12.4 s at 12.5 Hz and 5 tokens around; 32 queries, 8 answers each, on 64 chips.
    assert (shape.prompts, shape.group, shape.prompt, shape.answer) == (32, 8, 160, 384)
    assert (shape.devices, shape.rows) == (64, 256)
    # 100,000 prompts, 32 a step; 320,000 answers for the judge; 10,000 twice in batches of 64.
    assert work.steps_of(config, "grpo") == 3125
    assert work.judge_calls(config, "distill") == 320_000
    assert work.judge_calls(config, "grpo") == 0
    assert work.steps_of(config, "sft") == 313


def test_a_policy_that_trains_adapters_has_no_gradients_of_its_weights(shape):
    forward = counts.kimi_flops(RELEASED.policy, 32, 8, 160, 384)
    assert work.update(RELEASED, shape).flops == 3 * forward
    adapters = dataclasses.replace(shape, full=False)
    assert work.update(RELEASED, adapters).flops == 2 * forward


def test_what_remat_computes_again(shape):
    forward = counts.kimi_flops(RELEASED.policy, 32, 8, 160, 384)
    heads = 2 * counts.head_weights(RELEASED.policy) * 256 * 384

    def again(**changes):
        return work.recompute(RELEASED, dataclasses.replace(shape, **changes))

    assert again(remat="none", chunked_logp=False) == 0
    assert again(remat="none", chunked_logp=True) == heads
    assert again(remat="full", chunked_logp=True) == pytest.approx(forward)
    assert again(remat="full", chunked_logp=False) == pytest.approx(forward - heads)
    # Attention: in 34 layers, 3584 wide, 2 T^2 and 4 T S.
    attention = 34 * 3584 * (256 * (2 * 384**2 + 4 * 384 * 160) + 32 * 2 * 160**2)
    assert again(remat="dots", chunked_logp=False) == pytest.approx(attention)
    executed = work.update(RELEASED, dataclasses.replace(shape, remat="dots")).executed
    assert executed / (3 * forward) < 1.1


def test_decoding_is_bound_by_reading_weights(shape):
    # Attention of 34 layers is split over 4, MLPs and both heads over 8; 69,632 bytes for each of
    # 5120 + 256 * 192 tokens over 64 devices.
    split = dataclasses.replace(shape, decode_heads=4, decode_tensor=8)
    attention = 34 * (2 * 3584 * 3584 + 2 * 3584 * 512)
    rest = 34 * 3 * 3584 * 18_944 + 2 * 168_448 * 3584
    step = 2 * (attention / 4 + rest / 8) + 69_632 * (5120 + 49_152) / 64
    assert work.rollout(RELEASED, split).hbm_bytes == pytest.approx(385 * step)


def test_the_optimizer_moves_30_bytes_a_parameter(shape):
    idle = work.update(RELEASED, dataclasses.replace(shape, trained_params=0)).hbm_bytes
    moved = work.update(RELEASED, shape).hbm_bytes - idle
    assert moved == pytest.approx(30 * 9.77e9 / 64, rel=1e-3)


def test_every_phase_has_its_work(config):
    sizes = sizes_of(config)
    for stage, phases in work.PHASES.items():
        shape = work.shape_of(config, stage, 1e9)
        for name, phase in phases.items():
            found = phase(sizes, shape)
            assert found.hbm_bytes > 0 and (found.flops > 0 or name == "reshard")


def test_the_table_of_the_whole_step(config, shape):
    """PFLOP of a step at R = 384 where a group shares its prompt; the table's floors are higher."""
    made = {
        name: phase(RELEASED, shape).flops / 1e15 for name, phase in work.PHASES["grpo"].items()
    }
    assert made["reference"] == pytest.approx(1.90, abs=0.02)
    assert made["update"] == pytest.approx(3 * made["reference"])
    assert made["rollout"] == pytest.approx(made["reference"])
    # Windows of 42 codes of which 30 are kept: more than the 26 PFLOP of whole answers.
    assert 34 < made["speak"] < 60


def test_what_gpus_need_is_counted(config):
    shape = work.shape_of(config_for("h100-8"), "grpo", counts.kimi_params(RELEASED.policy))
    phase = Compiled("update", None, {"policy": 100}, {})

    def count(name="update", **changes):
        changed = dataclasses.replace(shape, **changes)
        return counted.count(
            "grpo", dataclasses.replace(phase, phase=name), RELEASED, changed, 8192
        )

    def temps(**changes):
        return count(**changes).memory.temps

    # 8 devices: float32 gradients of 9.77B parameters, twice while they are added up.
    assert temps() > 2 * 4 * 9.76e9 / 8
    assert temps(remat="full") < temps(remat="dots") < temps(remat="none")
    assert temps(accum_steps=8) < temps(accum_steps=4)
    assert count().memory.arguments == 100
    # 4 micro-batches: weights gathered twice in bfloat16, gradients added once in float32.
    sent = sum(count(remat="dots").wire.values())
    assert sent == pytest.approx(4 * (2 * 2 + 4) * 9.766e9 * 7 / 8, rel=1e-3)
    # Keys and values of 256 x 384 and 32 x 160 tokens, 69,632 bytes each.
    cache = 69_632 * (256 * 384 + 32 * 160) / 8
    assert cache < temps(name="rollout") < 1.2 * cache
    for name in work.PHASES["grpo"]:
        assert count(name).memory.temps >= 0
