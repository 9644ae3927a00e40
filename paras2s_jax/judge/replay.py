"""A judge that only remembers: tables made again without a model, a key, a network or a GPU.

Its stages are names: what `Judge.describe` wrote down when they last ran. Everything else comes
from the ledger, failures included, so that a table comes out as it was.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from paras2s_jax.data.records import write_text
from paras2s_jax.judge.chain import STYLE_PREFIX, Judge
from paras2s_jax.judge.interfaces import Heard, Sounds
from paras2s_jax.judge.ledger import Ledger, LedgerError

DESCRIPTION = "judge.json"


@dataclasses.dataclass(frozen=True)
class _Named:
    """A stage that has a name and is never run."""

    model_id: str
    settings: Mapping[str, Any]
    labels: tuple[str, ...] = ()
    max_dur_s: float = 0.0

    def _run(self, waves: Sequence) -> NoReturn:
        raise AssertionError("a replayed stage runs nothing")

    transcribe = name = _run


@dataclasses.dataclass(frozen=True)
class _NamedScorer:
    name: str
    version: str
    settings_hash: str

    def score(self, heard: Sequence[Heard], repeat: int = 0) -> NoReturn:
        raise AssertionError("a replayed scorer scores nothing")


class _NamedWaveScorer(_NamedScorer):
    def score_waves(self, pairs: Sequence[Sounds], repeat: int = 0) -> NoReturn:
        raise AssertionError("a replayed scorer scores nothing")


def replay_judge(path: Path, ledger: Ledger) -> Judge:
    """The judge whose description lies in `path`, replayed.

    Raises:
        LedgerError: there is no such file, or it describes no judge.
    """
    try:
        about = json.loads(Path(path).read_text(encoding="utf-8"))
        stages = {
            name: _Named(stage["model"], stage["settings"])
            for name, stage in about.items()
            if name != "score"
        }
        score = about["score"]
        # Names hold dashes themselves; only where the two are joined again matters.
        name, _, version = score["model"].rpartition("-")
        wants_waves = score.get("wants") == "waves"
        kind = _NamedWaveScorer if wants_waves else _NamedScorer
        scorer = kind(name, version, score["settings"]["hash"])
        # Only a scorer of words needs them.
        needed = stages.get if wants_waves else stages.__getitem__
        tone, transcriber = needed("tone"), needed("transcribe")
    except FileNotFoundError:
        raise LedgerError(
            f"{path}: no such file; only what has been judged can be replayed."
        ) from None
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise LedgerError(f"{path} describes no judge ({error!r}); judge again.") from error
    analyzers = {
        name.removeprefix(STYLE_PREFIX): stage
        for name, stage in stages.items()
        if name.startswith(STYLE_PREFIX)
    }
    repeats = score.get("num_repeats", 1)
    return Judge(transcriber, analyzers, tone, scorer, ledger, num_repeats=repeats, replay=True)


class Described(Protocol):
    """A judge that tells its stages."""

    def describe(self) -> dict[str, Any]: ...


def write_description(judge: Described, folder: Path) -> None:
    """Writes what `replay_judge` reads."""
    write_text(folder / DESCRIPTION, json.dumps(judge.describe(), indent=1) + "\n")
