"""Scores from the ledger, and from the scorer where the ledger has none."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from paras2s_jax.judge.interfaces import Failure, Item, Score, Scorer, WaveScorer
from paras2s_jax.judge.ledger import Ledger, ledger_key

STAGE = "score"


class Pending(NamedTuple):
    """A pair that is still to be scored, for the repeat-th time."""

    item: Item
    repeat: int


class StoredScores:
    """Asks the scorer what the ledger does not know; stores every answer as it comes.

    num_repeats: how often each pair is scored. replay: what the ledger does not know is a failure,
    the one that it had if it is noted; the scorer is only asked for its name. wants_waves: whether
    the scorer is given Sounds instead of Heard.
    """

    def __init__(
        self,
        scorer: Scorer | WaveScorer,
        ledger: Ledger,
        *,
        num_repeats: int = 1,
        progress: bool = True,
        replay: bool = False,
    ):
        if num_repeats < 1:
            raise ValueError(f"num_repeats {num_repeats} must be at least 1")
        self._scorer, self._ledger, self._replay = scorer, ledger, replay
        self._num_repeats, self._progress = num_repeats, progress
        self.wants_waves = isinstance(scorer, WaveScorer)

    def describe(self) -> dict[str, Any]:
        """The scorer's name, settings and repeats: what a table says of it."""
        scorer = self._scorer
        return {
            "model": f"{scorer.name}-{scorer.version}",
            "settings": {"hash": scorer.settings_hash},
            **({"num_repeats": self._num_repeats} if self._num_repeats > 1 else {}),
            **({"wants": "waves"} if self.wants_waves else {}),
        }

    def get(self, items: Sequence[Item]) -> dict[Item, Score | Failure]:
        """One answer per pair: the mean of its repeats, the first failure where all failed."""
        items = list(dict.fromkeys(items))
        found: dict[Item, list[Score | Failure]] = {item: [] for item in items}
        for repeat in range(self._num_repeats):
            for item, answer in self._ask(items, repeat).items():
                found[item].append(answer)
        return {item: _combined(answers) for item, answers in found.items()}

    def pending(self, items: Sequence[Item]) -> dict[str, Pending]:
        """Ledger key -> what has no score yet."""
        items = list(dict.fromkeys(items))
        keys = {
            self._key(item, repeat): Pending(item, repeat)
            for repeat in range(self._num_repeats)
            for item in items
        }
        stored = self._ledger.get_many(keys)
        return {key: pending for key, pending in keys.items() if key not in stored}

    def _ask(self, items: Sequence[Item], repeat: int) -> dict[Item, Score | Failure]:
        keys = {item: self._key(item, repeat) for item in items}
        stored = self._ledger.get_many(keys.values())
        answers = {item: Score(**stored[key]) for item, key in keys.items() if key in stored}
        missing = [item for item in items if item not in answers]
        if self._replay:
            found = replayed_failures(self._ledger, [keys[item] for item in missing])
            return answers | {item: found[keys[item]] for item in missing}
        ask = self._scorer.score_waves if self.wants_waves else self._scorer.score
        quiet = not self._progress or not missing
        with tqdm(total=len(missing), desc="judge: score", unit="pair", disable=quiet) as bar:
            for index, answer in ask(missing, repeat):
                item = missing[index]
                answers[item] = answer
                if isinstance(answer, Score):
                    # One by one: an answer may have cost money, and the next may be the end.
                    store(self._ledger, {keys[item]: answer})
                else:
                    store_failures(self._ledger, STAGE, {keys[item]: answer})
                bar.update()
        return {item: answers[item] for item in items}

    def _key(self, item: Item, repeat: int) -> str:
        about = self.describe()
        inputs = item.identity | ({"repeat": repeat} if repeat else {})
        return ledger_key(STAGE, inputs, about["model"], about["settings"])


def store(ledger: Ledger, scores: Mapping[str, Score]) -> None:
    """Puts scores under their keys; a single answer has no repeats."""
    rows = {}
    for key, score in scores.items():
        rows[key] = dataclasses.asdict(score)
        del rows[key]["repeats"]
    ledger.put_many(STAGE, rows)


def store_failures(ledger: Ledger, stage: str, failures: Mapping[str, Failure]) -> None:
    """Notes why keys have no output."""
    ledger.put_failures(stage, {k: dataclasses.asdict(failure) for k, failure in failures.items()})


def replayed_failures(ledger: Ledger, keys: Sequence[str]) -> dict[str, Failure]:
    """A failure for every key: the one that was noted, or that the ledger does not know it."""
    noted = {key: Failure(**values) for key, values in ledger.failures(keys).items()}
    unknown = Failure("not in the ledger; judge it without --replay")
    return {key: noted.get(key, unknown) for key in keys}


def _combined(found: Sequence[Score | Failure]) -> Score | Failure:
    scores = [answer for answer in found if isinstance(answer, Score)]
    if len(found) == 1 or not scores:
        return found[0]
    return dataclasses.replace(
        scores[0],
        score=float(np.mean([answer.score for answer in scores])),
        raw=[answer.raw for answer in found],
        repeats=tuple(answer.score if isinstance(answer, Score) else None for answer in found),
    )
