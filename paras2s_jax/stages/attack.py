"""The command `attack`: whether answers that talk to the judge lead its scorer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from ml_collections import ConfigDict

from paras2s_jax.data.bank import load_bank
from paras2s_jax.data.records import with_null, write_text
from paras2s_jax.judge import attack
from paras2s_jax.judge.ledger import Ledger
from paras2s_jax.judge.stored_scores import StoredScores
from paras2s_jax.stages.judging import LEDGER, make_scorer
from paras2s_jax.stages.registry import Figures, print_figures
from paras2s_jax.stages.speech import maker_of

ATTACK = "attack"


def attack_figures(config: ConfigDict, folder: Path) -> Figures:
    """Figures of the configured scorer; every case goes to attack/<scorer>.jsonl.

    Scores are kept in the run's ledger. Each is asked for once, whatever judge.num_repeats says.
    """
    scorer, bank, attacks = make_scorer(config, folder), load_bank(), attack.load_attacks()
    with Ledger(folder / LEDGER) as ledger:
        scores = StoredScores(scorer, ledger)
        answers = attack.poor_answers(bank)
        if scores.wants_waves:
            cases = attack.aloud(
                answers, attacks, folder / ATTACK, maker=maker_of(config), seed=config.seed
            )
        else:
            cases = attack.in_words(answers, attacks)
        found = attack.run(scores, cases)
    name = Path(scorer.name).name
    rows = [json.dumps(with_null(dataclasses.asdict(case))) + "\n" for case in found]
    write_text(folder / ATTACK / f"{name}.jsonl", "".join(rows))
    return attack.figures_of(scorer.name, found)


def run(config: ConfigDict, workdir: str) -> Figures:
    """Attacks the configured scorer and prints how far it was led."""
    figures = attack_figures(config, Path(workdir))
    print_figures("attacks", figures)
    print(f"case by case: {Path(workdir) / ATTACK}")
    return figures
