"""The judge of a config, as distillation and the bench use it."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from paras2s_jax.data.bank import load_bank
from paras2s_jax.data.records import DIMENSIONS
from paras2s_jax.judge.chain import Judge
from paras2s_jax.judge.classifier import WaveClassifier
from paras2s_jax.judge.ledger import Ledger
from paras2s_jax.judge.score import RubricScorer
from paras2s_jax.judge.style import StyleAnalyzers
from paras2s_jax.judge.transcribe import WhisperTranscriber
from paras2s_jax.stages.speech import TONE_FILE, parts_dir


def make_judge(config: ConfigDict, workdir: Path) -> Judge:
    """Recogniser, PolyTone analyzers, tone namer, rubric; verdicts go to the run's ledger."""
    folder, batch_size = parts_dir(config, workdir), config.judge.batch_size
    return Judge(
        WhisperTranscriber.load(folder, batch_size=batch_size),
        StyleAnalyzers.load(workdir / "analyzers", DIMENSIONS, batch_size=batch_size),
        WaveClassifier.load(folder / TONE_FILE, batch_size=batch_size),
        RubricScorer(load_bank().rubric),
        Ledger(workdir / "ledger.sqlite"),
    )
