"""The command `attack`: whether answers that talk to the judge lead its scorer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
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

    What other words in the place of an attack change tells what the attack itself adds. Scores are
    kept in the run's ledger; each is asked for once, whatever judge.num_repeats says.
    """
    scorer, bank, attacks = make_scorer(config, folder), load_bank(), attack.load_attacks()
    answers = attack.poor_answers(bank)
    other = [sentence.text for sentence in bank.of("train")][: len(attacks)]

    def cases(texts: Sequence[str], name: str) -> list[attack.Case]:
        if not scores.wants_waves:
            return attack.in_words(answers, texts)
        place = folder / ATTACK / name
        return attack.aloud(answers, texts, place, maker=maker_of(config), seed=config.seed)

    with Ledger(folder / LEDGER) as ledger:
        scores = StoredScores(scorer, ledger)
        found = attack.run(scores, cases(attacks, "attacks"))
        harmless = attack.run(scores, cases(other, "other words"))
    rows = [json.dumps(with_null(dataclasses.asdict(case))) + "\n" for case in found]
    write_text(folder / ATTACK / f"{scorer.name}.jsonl", "".join(rows))
    changed, gain, *_ = attack.figures_of(scorer.name, harmless).values()
    return attack.figures_of(scorer.name, found) | {
        f"attack/{scorer.name}/changed_by_other_words": changed,
        f"attack/{scorer.name}/mean_gain_of_other_words": gain,
    }


def run(config: ConfigDict, workdir: str) -> Figures:
    """Attacks the configured scorer and prints how far it was led."""
    figures = attack_figures(config, Path(workdir))
    print_figures("attacks", figures)
    print(f"case by case: {Path(workdir) / ATTACK}")
    return figures
