"""The judge of a config, as distillation and the bench use it; or verdicts that a user brings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from paras2s_jax.data.bank import load_bank
from paras2s_jax.data.records import DIMENSIONS, Response, Verdict, read_jsonl
from paras2s_jax.judge.chain import Judge
from paras2s_jax.judge.classifier import WaveClassifier
from paras2s_jax.judge.ledger import Ledger
from paras2s_jax.judge.score import RubricScorer
from paras2s_jax.judge.style import StyleAnalyzers
from paras2s_jax.judge.transcribe import WhisperTranscriber
from paras2s_jax.stages.registry import StageError
from paras2s_jax.stages.speech import TONE_FILE, parts_dir


def make_judge(config: ConfigDict, workdir: Path, *, progress: bool = True) -> Judge:
    """Recogniser, PolyTone analyzers, tone namer, rubric; verdicts go to the run's ledger."""
    folder, batch_size = parts_dir(config, workdir), config.judge.batch_size
    return Judge(
        WhisperTranscriber.load(folder, batch_size=batch_size),
        StyleAnalyzers.load(workdir / "analyzers", DIMENSIONS, batch_size=batch_size),
        WaveClassifier.load(folder / TONE_FILE, batch_size=batch_size),
        RubricScorer(load_bank().rubric),
        Ledger(workdir / "ledger.sqlite"),
        progress=progress,
    )


def given_verdicts(path: Path, responses: Sequence[Response], answers: Path) -> list[Verdict]:
    """Verdicts of a user's own judge, in the order of the responses.

    path: jsonl of Verdict. answers: the jsonl of the responses, to name it.

    Raises:
        StageError: there is no such file yet, or a response has no verdict in it, or two.
        RecordError: a row is no verdict.
    """
    if not path.is_file():
        raise StageError(
            f"{path} (distill.verdicts) is not there: judge the answers in {answers}, write one "
            "verdict a line into it, and run the same command again."
        )
    found: dict[tuple[str, int], Verdict] = {}
    for verdict in read_jsonl(path, Verdict):
        key = (verdict.query_id, verdict.sample)
        if key in found:
            raise StageError(
                f"{path} has two verdicts on sample {key[1]} of query {key[0]!r}; keep one."
            )
        found[key] = verdict
    keys = [(response.query_id, response.sample) for response in responses]
    lacking = [key for key in keys if key not in found]
    if lacking:
        raise StageError(
            f"{path} has no verdict on {len(lacking)} of the {len(keys)} answers in {answers}, "
            f"first on sample {lacking[0][1]} of query {lacking[0][0]!r}; add them (score null "
            "where the judge failed)."
        )
    return [found[key] for key in keys]
