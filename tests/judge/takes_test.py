import dataclasses

import numpy as np
import pytest

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.data.records import Query, read_jsonl
from paras2s_jax.judge.takes import Choice, choose_takes


class Analyzer:
    """Takes a wave's level for the probability that it is sad."""

    labels = ("sad", "surprised")

    def __init__(self):
        self.calls = 0

    def name(self, waves):
        self.calls += 1
        sad = np.array([wave.max() for wave in waves])
        return ["sad"] * len(waves), np.stack([sad, 1 - sad], axis=1)


@pytest.fixture
def takes(tmp_path):
    """Two queries, in three takes each of levels 0.2, 0.8, 0.6 and 0.9, 0.95, 0.7."""
    found = {}
    for style, levels in (("sad", (0.2, 0.8, 0.6)), ("surprised", (0.9, 0.95, 0.7))):
        query = Query(style, "s", "emotion", "words", style, "x", "t", "test", "v", "", 0.1)
        found[style] = []
        for number, level in enumerate(levels):
            wav = f"{style}{number}.wav"
            wave_lib.save(tmp_path / wav, np.full(1600, level, np.float32), 16_000)
            found[style].append(dataclasses.replace(query, id=f"{style}.{number}", wav=wav))
    return found


def test_the_best_take_is_kept_and_queries_nobody_hears_are_not(takes, tmp_path):
    found = choose_takes(takes, tmp_path, {"emotion": Analyzer()})
    # Sad: 0.8 of take 1. Surprised: at most 0.3, of take 2.
    assert [(query.id, query.wav) for query in found] == [("sad", "sad1.wav")]
    both = choose_takes(takes, tmp_path, {"emotion": Analyzer()}, min_prob=0.2)
    assert [query.wav for query in both] == ["sad1.wav", "surprised2.wav"]


def test_choices_are_noted_and_not_made_twice(takes, tmp_path):
    analyzer, log = Analyzer(), tmp_path / "takes.jsonl"
    first = choose_takes(takes, tmp_path, {"emotion": analyzer}, log=log)
    assert choose_takes(takes, tmp_path, {"emotion": analyzer}, log=log) == first
    assert analyzer.calls == 2
    rows = read_jsonl(log, Choice)
    assert rows[0] == Choice("sad", "sad1.wav", 0.8, 3, True) and not rows[1].is_kept


def test_other_takes_are_chosen_from_anew(takes, tmp_path):
    analyzer, log = Analyzer(), tmp_path / "takes.jsonl"
    choose_takes(takes, tmp_path, {"emotion": analyzer}, log=log)
    fewer = {"sad": takes["sad"][:1]}
    (found,) = choose_takes(fewer, tmp_path, {"emotion": analyzer}, min_prob=0.1, log=log)
    assert found.wav == "sad0.wav" and analyzer.calls == 3


def test_what_the_analyzer_does_not_know_is_named(takes, tmp_path):
    with pytest.raises(ValueError, match="no analyzer for emotion"):
        choose_takes(takes, tmp_path, {})
    analyzer = Analyzer()
    analyzer.labels = ("sad", "happy")
    with pytest.raises(ValueError, match="knows sad, happy, not 'surprised'"):
        choose_takes(takes, tmp_path, {"emotion": analyzer})
