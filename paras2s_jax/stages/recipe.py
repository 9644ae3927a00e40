"""Every stage by name, and what each needs: the one place that knows the whole order."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from paras2s_jax.stages.registry import Lazy, Stage, figures_of


def _lazy(module: str, function: str) -> Lazy:
    return Lazy(f"paras2s_jax.stages.{module}", function)


def _run_align(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """The figures of every stage of the loop; the stages themselves are what it needs."""
    loop = stages_of(config)["align"].needs
    return {k: v for name in loop for k, v in figures_of(workdir / name).items()}


ALIGN = (
    "synthesize", "pretrain", "analyzers", "base", "sft", "sft_5x", "distill", "grpo", "bench",
    "report",
)  # fmt: skip

_SPEECH = ("seed", "synthesize", "pretrain")
_DATA = ("seed", "data")
_POLICY = (*_DATA, "policy")

# What some need depends on the config: see `stages_of`.
STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "align",
            "the whole loop, from the text bank to the report",
            _run_align,
        ),
        Stage(
            "synthesize",
            "speak the text bank: queries, answers, training clips",
            _lazy("speech", "run_synthesize"),
            sections=("seed", "synthesize"),
        ),
        Stage(
            "pretrain",
            "codec, recogniser and tone namer: from the package, or trained",
            _lazy("speech", "run_pretrain"),
            needs=("synthesize",),
            sections=_SPEECH,
        ),
        Stage(
            "analyzers",
            "train the style analyzers where words tell nothing (PolyTone)",
            _lazy("speech", "run_analyzers"),
            needs=("pretrain",),
            sections=("polytone",),
        ),
        Stage(
            "polytone",
            "train them where words agree with the voice too, and compare",
            _lazy("speech", "run_polytone"),
            needs=("analyzers",),
            sections=("polytone",),
        ),
        Stage(
            "base",
            "the tone-deaf base policy",
            _lazy("policy", "run_base"),
            needs=("pretrain",),
            sections=("base", *_SPEECH, *_POLICY),
            on_all=True,
        ),
        Stage(
            "sft",
            "supervised warm-up on few demonstrations",
            _lazy("policy", "run_sft"),
            sections=("sft", *_POLICY),
            on_all=True,
        ),
        Stage(
            "sft_5x",
            "the same on five times the demonstrations, to compare with",
            _lazy("policy", "run_sft_5x"),
            sections=("sft_5x", *_POLICY),
            on_all=True,
        ),
        Stage(
            "distill",
            "sample the SFT policy, judge, train the reward model",
            _lazy("reward", "run_distill"),
            sections=("judge", "distill", *_POLICY),
            on_all=True,
        ),
        Stage(
            "grpo",
            "reinforce both token streams with the reward model",
            _lazy("policy", "run_grpo"),
            sections=("grpo", *_POLICY),
            on_all=True,
        ),
        Stage(
            "retention",
            "reinforce at other KL weights: what becomes of neutral dialogue",
            _lazy("policy", "run_retention"),
            needs=("grpo",),
            sections=("retention",),
            on_all=True,
        ),
        Stage(
            "bench",
            "answer held-out queries, judge, listen, tabulate",
            _lazy("evaluation", "run_bench"),
            sections=("bench",),
        ),
        Stage(
            "report",
            "a page with tables, curves and players",
            _lazy("evaluation", "run_report"),
            needs=("bench",),
        ),
    )
}


def stages_of(config: ConfigDict) -> dict[str, Stage]:
    """The stages, each with all that it needs under this config.

    A released policy needs no base, a user's own data no speech, a user's own verdicts no judge;
    small models stand on the packaged parts; the bench needs the policies that it benches.
    """
    c = config
    speech = () if c.data.folder else ("synthesize",)
    start = speech if c.policy.checkpoint else ("base",)
    trains = "trained" in c.judge.analyzers.values()
    analyzers = ("analyzers",) if trains else ()
    judge = () if c.distill.verdicts else analyzers
    parts = () if c.distill.model.checkpoint else ("pretrain",)
    # Who listens meanwhile: the judge, which has its own recogniser, or a recogniser alone.
    listeners = ("analyzers",) if c.grpo.health.gap_every else ()
    listeners = listeners or (("pretrain",) if c.grpo.audit_every else ())
    needs = {
        "sft": start,
        "sft_5x": start,
        "distill": ("sft", *judge, *parts),
        "grpo": ("distill", *listeners),
        "bench": (*(name for name in c.bench.systems if name != "base"), *analyzers),
    }
    spared = {"base"} if c.policy.checkpoint else set()
    spared |= {"sft_5x"} - set(c.bench.systems)
    spared |= set() if trains else {"analyzers"}
    needs["align"] = tuple(name for name in ALIGN if name not in spared)
    return {
        name: dataclasses.replace(stage, needs=needs.get(name, stage.needs))
        for name, stage in STAGES.items()
    }
