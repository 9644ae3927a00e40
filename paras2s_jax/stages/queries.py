"""The command `queries`: the built-in bank as speech to ask a voice model, and example answers."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from paras2s_jax.data.bank import load_bank
from paras2s_jax.data.records import Query, write_jsonl
from paras2s_jax.data.speaking import speak
from paras2s_jax.data.synthesize import Sizes, plan_answers, plan_queries
from paras2s_jax.stages.registry import Figures, StageError, print_figures
from paras2s_jax.stages.speech import QUERIES

# Folder of example answers -> who speaks them (`plan_answers`).
EXAMPLES = {"tone_deaf": "bland", "topline": "topline"}


def run(target: str, split: str, voices: int, sentences: int, seed: int, examples: bool) -> Figures:
    """Writes queries.jsonl with its wavs; a wav that is there already is kept.

    Args:
        target: the folder.
        split: whose sentences and voices; the judge and the policies here were trained on "train".
        voices: per sentence and style.
        sentences: of each dimension; 0: all.
        examples: also answers to them in examples/tone_deaf (the same for both styles) and
            examples/topline (with the true style known), named by the queries' ids.

    Raises:
        StageError: there are not so many voices.
    """
    folder, bank = Path(target), load_bank().first(sentences)
    sizes = Sizes(train_voices=voices, test_voices=voices)
    bank = dataclasses.replace(bank, sentences=tuple(bank.of(split)))
    try:
        clips = plan_queries(bank, seed, sizes)
    except ValueError as error:
        raise StageError(str(error)) from error
    queries, _ = speak(clips, folder, progress=True)
    if examples:
        for name, system in EXAMPLES.items():
            _answer(queries, folder, name, system, seed)
    write_jsonl(folder / QUERIES, queries)
    figures = {
        "queries/clips": len(queries),
        "queries/minutes": round(sum(query.dur_s for query in queries) / 60, 2),
    }
    print_figures(f"queries in {folder / QUERIES}", figures)
    return figures


def _answer(queries: Sequence[Query], folder: Path, name: str, system: str, seed: int) -> None:
    """One wav per query into examples/NAME."""
    spoken = plan_answers(load_bank(), queries, system, name, seed)
    rows, _ = speak(spoken, folder, progress=True)
    answers = folder / "examples" / name
    answers.mkdir(parents=True, exist_ok=True)
    for row in rows:
        shutil.copyfile(folder / row.wav, answers / f"{row.query_id}.wav")
