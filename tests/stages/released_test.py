"""The stages of the 7B config on released checkpoints, both made small: full, and as adapters."""

import json
import math
import pathlib
import shutil

import jax
import numpy as np
import pytest

from paras2s_jax import cli
from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.convert import folders, from_pretrained
from paras2s_jax.convert.checkpoint import Checkpoint
from paras2s_jax.convert.stored import load_params
from paras2s_jax.data.records import Query, Response, Verdict, read_jsonl, write_jsonl
from paras2s_jax.models.sampling import Sampling
from paras2s_jax.stages import kimi, policy
from paras2s_jax.stages.recipe import stages_of
from paras2s_jax.stages.registry import Runner, StageError

QUERY_S, ANSWER_S = 0.5, 1.0
STEPS = 14
QUERIES, PROMPTS, GROUP = 4, 2, 4
GREEDY = Sampling(0.0)
ONE = {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A user's folder: four sentences in two styles, each answered once."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    queries, answers = [], []
    for sentence in range(4):
        for style, contrast in (("sad", "surprised"), ("surprised", "sad")):
            name = f"s{sentence}-{style}"
            durations = {"q": 0.4 + 0.02 * sentence, "a": 0.6}
            for kind, dur_s in durations.items():
                t = np.arange(round(dur_s * wave_lib.RATE_HZ)) / wave_lib.RATE_HZ
                tone = 0.2 * np.sin(2 * np.pi * (200 + 50 * sentence) * t)
                noise = 0.02 * rng.normal(size=len(t))
                wave_lib.save(folder / f"{name}.{kind}.wav", tone + noise, wave_lib.RATE_HZ)
            queries.append(
                Query(
                    id=name,
                    sentence_id=f"s{sentence}",
                    dimension="emotion",
                    text="I just met her.",
                    style=style,
                    contrast=contrast,
                    topic="people",
                    split="train",
                    voice="v",
                    wav=f"{name}.q.wav",
                    dur_s=durations["q"],
                )
            )
            answers.append(
                Response(name, "demonstration", 0, "the thing", f"{name}.a.wav", dur_s=0.6)
            )
    write_jsonl(folder / "queries.jsonl", queries)
    write_jsonl(folder / "demonstrations.jsonl", answers)
    return folder


def shrunk(load_config, converted, omni, data, verdicts, *, lora: bool):
    """configs/kimi_audio_7b.py with small numbers; nothing else about it is changed."""
    c = load_config("kimi_audio_7b", "v5p-4x4x4,lora" if lora else "v5p-4x4x4")
    c.mesh, c.decode_mesh = ONE, ONE
    c.data.folder = str(data)
    c.policy.checkpoint = str(converted)
    sizes = json.loads((converted / "config.json").read_text())
    c.policy.model = {name: sizes[name] for name in c.policy.model}
    c.policy.max_steps, c.policy.logp_chunk, c.policy.remat = STEPS, 4096, "none"
    c.policy.lora.rank = 4 if lora else 0
    c.policy.detokenizer.ode_steps = 3
    for section in (c.sft, c.distill, c.grpo):
        section.num_steps, section.warmup_steps = 2, 0
        section.accum_steps = 1
        # Far above the paper's, which two steps of bfloat16 would not show.
        section.lr = 1e-2
    c.sft.num_demonstrations, c.sft.batch_size = 8, 8
    c.sft.len_buckets_s, c.sft.token_buckets = (ANSWER_S,), (16,)
    # As many answers at one time as in RL, drawn alike: what is compiled serves both.
    c.distill.num_queries, c.distill.num_samples = QUERIES, GROUP
    c.distill.sample_batch_size, c.distill.batch_size = PROMPTS, 8
    c.distill.text_sampling, c.distill.audio_sampling = (
        c.policy.text_sampling,
        c.policy.audio_sampling,
    )
    c.distill.held_out_share = 0.4
    c.distill.len_buckets_s, c.distill.pair_buckets_s = (QUERY_S,), (ANSWER_S,)
    c.distill.verdicts = str(verdicts)
    c.distill.model.checkpoint = str(omni)
    c.distill.model.lora_rank, c.distill.model.remat = 4, "none"
    c.distill.model.text.num_hidden_layers = 2
    c.distill.model.audio.encoder_layers = 2
    c.grpo.group_size, c.grpo.num_prompts = GROUP, PROMPTS
    c.grpo.len_buckets_s = (QUERY_S,)
    return c.lock()


def judge(workdir, path):
    """Verdicts of a user's own judge on the sampled answers, one of which it could not score."""
    responses = read_jsonl(workdir / "distill" / "samples" / "responses.jsonl", Response)
    verdicts = [
        Verdict(
            query_id=response.query_id,
            system=response.system,
            sample=response.sample,
            score=math.nan if at == 0 else 1.0 + at % 5,
            status="score: no reply" if at == 0 else "ok",
            transcript_in="",
            style_in="",
            style_source="label",
            transcript_out="",
            tone_out="",
            content=None,
            tone_fit=None,
            judge="mine",
            raw={},
        )
        for at, response in enumerate(responses)
    ]
    write_jsonl(path, reversed(verdicts))
    return responses


def train(config, workdir, verdicts):
    """sft -> distill, judged in between -> grpo. Returns: the figures of distill."""
    runner = Runner(stages_of(config), config, workdir)
    with pytest.raises(StageError, match=r"verdicts\.jsonl .* is not there: judge the answers in"):
        runner.run("grpo")
    responses = judge(workdir, verdicts)
    assert len(responses) == QUERIES * GROUP
    stamp = (workdir / "sft" / "summary.json").stat().st_mtime_ns
    runner.run("grpo")
    assert (workdir / "sft" / "summary.json").stat().st_mtime_ns == stamp
    assert {path.name for path in workdir.iterdir() if path.is_dir()} == {"sft", "distill", "grpo"}
    figures = json.loads((workdir / "distill" / "summary.json").read_text())["figures"]
    soundless = sum(response.dur_s == 0 for response in responses[1:])
    assert figures["reward/unscored"] == 1 + soundless
    metrics = [json.loads(row) for row in (workdir / "grpo" / "metrics.jsonl").open()]
    assert [row["step"] for row in metrics] == [1, 2]
    assert all(np.isfinite(row["loss"]) for row in metrics)


def respond(policy, data, target):
    """With the shapes of respond_test.py, which compiles the same program."""
    queries = [row for row in read_jsonl(data / "queries.jsonl", Query) if row.style == "sad"]
    source = write_jsonl(data / "two.jsonl", queries[:2])
    flags = [f"--checkpoint={policy}", f"--input={source}", f"--output={target}"]
    short = ["--max_steps=14", "--dtype=float32", "--batch_size=2"]
    assert cli.main(["paras2s", "respond", *flags, *short]) == 0
    answers = read_jsonl(target / "responses.jsonl", Response)
    assert len(answers) == 2 and all((target / answer.wav).is_file() for answer in answers)


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.fixture(scope="module")
def run(load_config, converted, omni, data, tmp_path_factory):
    """A whole run on one device, all weights trained; its folder is a relative one."""
    workdir = tmp_path_factory.mktemp("run")
    verdicts = workdir / "verdicts.jsonl"
    config = shrunk(load_config, converted, omni, data, verdicts, lora=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workdir.parent)
        train(config, pathlib.Path(workdir.name), verdicts)
    return workdir


def test_all_weights_on_one_device(converted, data, run, tmp_path):
    base = from_pretrained(converted)[1]
    sft, grpo = (load_params(run / name / "policy" / "params")[0] for name in ("sft", "grpo"))
    assert {x.dtype for x in jax.tree.leaves(grpo)} == {np.dtype(np.float32)}
    assert not equal(sft["params"], base) and not equal(grpo, sft)
    # The reward model's own weights are only linked to.
    rewards = run / "distill" / "reward_model"
    assert set(load_params(rewards / "adapter")[0]) == {"lora"}
    assert not (rewards / "params").exists()
    respond(run / "grpo" / "policy", data, tmp_path / "answers")
    folders.export(str(run / "grpo" / "policy"), str(tmp_path / "released"))
    assert (tmp_path / "released" / "vocoder" / "model.safetensors").is_file()
    head = Checkpoint(tmp_path / "released")["lm_head.weight"]
    np.testing.assert_array_equal(head.T, grpo["params"]["text_head"]["kernel"])


def test_adapters_on_eight_devices(load_config, converted, omni, data, run, tmp_path):
    """sft -> grpo, with the reward model of the other run."""
    config = shrunk(load_config, converted, omni, data, run / "verdicts.jsonl", lora=True).unlock()
    config.mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    config.decode_mesh = {"data": 2, "fsdp": 1, "tensor": 4}
    shutil.copytree(run / "distill" / "reward_model", tmp_path / "distill" / "reward_model")
    policy.run_sft(config, tmp_path)
    policy.run_grpo(config, tmp_path)
    adapters = {}
    for name in ("sft", "grpo"):
        folder = tmp_path / name / "policy"
        assert (folder / "params").resolve() == (converted / "params").resolve()
        adapters[name] = load_params(folder / "adapter")[0]["lora"]
        assert {x.dtype for x in jax.tree.leaves(adapters[name])} == {np.dtype(np.float32)}
    assert np.any(adapters["sft"]["trunk"]["layers"]["mlp"]["up_proj"]["b"])
    assert not equal(adapters["grpo"], adapters["sft"])
    folders.export(str(tmp_path / "grpo" / "policy"), str(tmp_path / "peft"), lora="adapter")
    peft = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (peft["r"], peft["lora_alpha"]) == (4, 128.0)
    # Folded in where nothing is trained: so `respond` takes it.
    folded = kimi.assemble(tmp_path / "grpo" / "policy", text=GREEDY, audio=GREEDY).variables
    plain = from_pretrained(converted, dtype="bfloat16")[1]
    assert set(folded) == {"params"} and not equal(folded["params"], plain)
