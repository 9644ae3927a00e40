"""The 7B config: every topology loads, and its numbers divide."""

import math
from pathlib import Path

import pytest
from absl import flags

from paras2s_jax import cli
from paras2s_jax.models import axes
from paras2s_jax.models.kimi_audio import KimiAudioConfig
from paras2s_jax.stages.recipe import stages_of
from paras2s_jax.stages.registry import Runner

CONFIG = "configs/kimi_audio_7b.py"
CHIPS = {"v5e-8x8": 64, "v5e-16x16": 256, "v5p-4x4x4": 64, "v6e-8x8": 64, "h100-8": 8}
VARIANTS = [f"{name}{kind}" for name in CHIPS for kind in ("", ",lora")]


def load(arg, monkeypatch):
    monkeypatch.chdir(Path(cli.__file__).resolve().parents[1])
    return cli.load_config(CONFIG + (f":{arg}" if arg else ""))


@pytest.mark.parametrize("arg", VARIANTS)
def test_every_topology_divides(arg, monkeypatch):
    c = load(arg, monkeypatch)
    topology = arg.partition(",")[0]
    assert c.topology == topology
    model = KimiAudioConfig(**c.policy.model)
    for mesh in (c.mesh, c.decode_mesh):
        assert math.prod(mesh.values()) == CHIPS[topology]
        for size in (model.intermediate_size, model.vocab_size):
            assert size % mesh.tensor == 0
        assert c.grpo.num_prompts % mesh.data == 0
        assert c.grpo.num_prompts * c.grpo.group_size % (mesh.data * mesh.fsdp) == 0
    assert model.num_attention_heads % c.mesh.tensor == 0
    assert model.num_key_value_heads % c.mesh.tensor == 0
    ways = c.mesh.data * c.mesh.fsdp
    prompts, rest = divmod(c.grpo.num_prompts, c.grpo.accum_steps)
    assert rest == 0 == prompts % c.mesh.data == prompts * c.grpo.group_size % ways
    for section in (c.sft, c.distill):
        assert section.batch_size // section.accum_steps % ways == 0
    for rules in (c.rules, c.decode_rules):
        assert {name for name, _ in rules} <= {*axes.PARAM_AXES, *axes.ACTIVATION_AXES}


@pytest.mark.parametrize("arg", [None, "v5p-4x4x4,lora"])
def test_the_papers_figures(arg, monkeypatch):
    """paper.md, section 3."""
    c = load(arg, monkeypatch)
    assert c.topology == "v5p-4x4x4"
    assert (c.sft.lr, c.sft.batch_size, c.sft.num_demonstrations) == (1e-5, 64, 10_000)
    assert 2 * 10_000 <= c.sft.num_steps * c.sft.batch_size < 2 * 10_000 + 64
    assert (c.distill.num_queries, c.distill.num_samples, c.distill.lr) == (10_000, 32, 1e-6)
    assert (c.grpo.group_size, c.grpo.beta, c.grpo.num_prompts, c.grpo.lr) == (8, 0.2, 32, 5e-4)
    assert c.grpo.num_steps * c.grpo.num_prompts == 100_000
    is_lora = arg is not None
    assert (c.policy.lora.rank > 0) == is_lora == (c.policy.trainable == "^lora/")
    assert c.policy.param_dtype == ("bfloat16" if is_lora else "float32")


def test_the_longest_dialogue_fits(monkeypatch):
    c = load(None, monkeypatch)
    query_s, answer_s = c.sft.len_buckets_s
    assert math.ceil(query_s * 12.5) + 5 == 160
    assert math.ceil(answer_s * 12.5) + KimiAudioConfig().delay + 1 <= c.policy.max_steps
    # A sampled answer may fill every step behind the delay with speech.
    assert (c.policy.max_steps - KimiAudioConfig().delay) / 12.5 <= c.distill.pair_buckets_s[1]


@pytest.mark.parametrize(
    "arg", ["v5p-8x8", "v5p-4x4x4,", "v5p-4x4x4,full", "lora", "v5p-4x4x4,lora,x"]
)
def test_an_unknown_argument_is_refused(arg, monkeypatch):
    with pytest.raises(flags.Error, match="topologies are v5e-8x8, v5e-16x16, v5p-4x4x4"):
        load(arg, monkeypatch)


@pytest.mark.parametrize("kind", ["", ",lora"])
def test_a_run_may_move_to_another_topology(kind, monkeypatch):
    """What its folders say that they were made with is the same."""
    made_with = []
    for topology in CHIPS:
        c = load(topology + kind, monkeypatch)
        stages = stages_of(c)
        made_with.append(Runner(stages, c, "nowhere")._relevant(stages["grpo"]))
    assert all(settings == made_with[0] for settings in made_with)


def test_it_has_every_section_that_its_stages_read(monkeypatch):
    c = load(None, monkeypatch)
    stages = stages_of(c)
    known = {section for stage in stages.values() for section in stage.sections}
    assert known - set(c) == {"base", "sft_5x"}  # of stages that it does not have
