"""Every stage by name, and what each needs: the one place that knows the whole order."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from paras2s_jax.audio.wave import AudioError
from paras2s_jax.bench.aggregate import BenchError
from paras2s_jax.data.batches import ManifestError
from paras2s_jax.data.records import RecordError
from paras2s_jax.judge.ledger import LedgerError
from paras2s_jax.stages import evaluation, policy, reward, speech
from paras2s_jax.stages.registry import Stage, StageError, figures_of
from paras2s_jax.train.checkpoint import CheckpointError

# Errors whose message tells the user what to do; anything else is a defect and shows its trace.
USER_ERRORS = (
    AudioError,
    BenchError,
    CheckpointError,
    LedgerError,
    ManifestError,
    RecordError,
    StageError,
    FileNotFoundError,
)


def _run_align(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """The figures of every stage of the loop; the stages themselves are what it needs."""
    return {k: v for name in ALIGN for k, v in figures_of(workdir / name).items()}


ALIGN = (
    "synthesize", "pretrain", "polytone", "base", "sft", "sft_5x", "distill", "grpo", "bench",
    "report",
)  # fmt: skip

_SPEECH = ("seed", "synthesize", "pretrain")
_POLICY = (*_SPEECH, "policy", "mesh")

STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "align",
            "the whole loop, from the text bank to the report",
            _run_align,
            needs=ALIGN,
        ),
        Stage(
            "synthesize",
            "speak the text bank: queries, answers, training clips",
            speech.run_synthesize,
            sections=("seed", "synthesize"),
        ),
        Stage(
            "pretrain",
            "codec, recogniser and tone namer: from the package, or trained",
            speech.run_pretrain,
            needs=("synthesize",),
            sections=_SPEECH,
        ),
        Stage(
            "polytone",
            "train the style analyzers where words tell nothing",
            speech.run_polytone,
            needs=("pretrain",),
            sections=("polytone",),
        ),
        Stage(
            "base",
            "the tone-deaf base policy",
            policy.run_base,
            needs=("pretrain",),
            sections=("base", *_POLICY),
        ),
        Stage(
            "sft",
            "supervised warm-up on few demonstrations",
            policy.run_sft,
            needs=("base",),
            sections=("sft",),
        ),
        Stage(
            "sft_5x",
            "the same on five times the demonstrations, to compare with",
            policy.run_sft_5x,
            needs=("base",),
            sections=("sft_5x",),
        ),
        Stage(
            "distill",
            "sample the SFT policy, judge, train the reward model",
            reward.run_distill,
            needs=("sft", "polytone"),
            sections=("judge", "distill"),
        ),
        Stage(
            "grpo",
            "reinforce both token streams with the reward model",
            policy.run_grpo,
            needs=("distill",),
            sections=("grpo",),
        ),
        Stage(
            "bench",
            "answer held-out queries, judge, listen, tabulate",
            evaluation.run_bench,
            needs=("grpo", "sft_5x"),
            sections=("bench",),
        ),
        Stage(
            "report",
            "a page with tables, curves and players",
            evaluation.run_report,
            needs=("bench",),
        ),
    )
}
