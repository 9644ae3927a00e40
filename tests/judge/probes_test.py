import dataclasses
import math

import numpy as np
import pytest

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.data.bank import load_bank
from paras2s_jax.data.records import Query
from paras2s_jax.judge import probes, score
from paras2s_jax.judge.chain import Judge
from paras2s_jax.judge.interfaces import Transcript
from paras2s_jax.judge.ledger import Ledger


def test_order_share_by_hand():
    ranked = {"fitting": 5.0, "wrong_style": 3.6, "wrong_words": 1.8, "noise": 1.0, "silence": 1.0}
    # 3 > 2 > 1 > 0, 0: 4 + 3 + 2 = 9 pairs.
    assert probes.order_share([ranked]) == 1.0
    # One swap of neighbours costs one pair of nine.
    assert probes.order_share([ranked | {"wrong_style": 5.5}]) == pytest.approx(8 / 9)
    # A tie is wrong: both pairs of wrong_words with the wordless ones.
    assert probes.order_share([ranked | {"wrong_words": 1.0}]) == pytest.approx(7 / 9)
    # A failed verdict spoils each of its pairs: fitting is in four.
    assert probes.order_share([ranked | {"fitting": math.nan}]) == pytest.approx(5 / 9)
    # Noise and silence are not compared with each other.
    assert probes.order_share([ranked, ranked | {"noise": 0.5}]) == 1.0


class KnowingStage:
    """Knows each wave's words or tone by its samples."""

    model_id, settings, max_dur_s = "knowing", {}, 10.0

    def __init__(self, answers, labels=()):
        self._answers, self.labels = answers, labels

    def transcribe(self, waves):
        return [Transcript(self._answers.get(wave.tobytes(), ""), 0.0) for wave in waves]

    def name(self, waves):
        names = [self._answers.get(wave.tobytes(), self.labels[0]) for wave in waves]
        return names, np.array([[name == label for label in self.labels] for name in names], float)


@pytest.fixture(scope="module")
def bank():
    return load_bank()


def _queries(bank, root):
    queries = []
    for dimension in ("emotion", "gender"):
        sentence = bank.of("test", dimension)[0]
        for style in bank.styles(dimension):
            wav = f"{sentence.id}-{style}.wav"
            level = 0.01 * (1 + len(queries))
            wave_lib.save(root / wav, np.full(800, level, np.float32), wave_lib.RATE_HZ)
            queries.append(
                Query(
                    id=wav.removesuffix(".wav"),
                    sentence_id=sentence.id,
                    dimension=dimension,
                    text=sentence.text,
                    style=style,
                    contrast=sentence.contrast(style),
                    topic=sentence.topic,
                    split="test",
                    voice="v",
                    wav=wav,
                    dur_s=0.05,
                )
            )
    return queries


def _judge(bank, made, tmp_path, *, deaf_to_tone=False):
    waves = {wave_lib.load(probe.wav).tobytes(): probe.response for probe in made}
    tones = tuple(next(iter(bank.rubric.values())).tones)
    answers = {} if deaf_to_tone else {key: row.tone or tones[0] for key, row in waves.items()}
    return Judge(
        KnowingStage({key: row.text for key, row in waves.items()}),
        {},
        KnowingStage(answers, tones),
        score.RubricScorer(bank.rubric),
        Ledger(tmp_path / f"ledger-{deaf_to_tone}.sqlite"),
        progress=False,
    )


def test_all_knowing_judge_orders_every_pair(bank, tmp_path):
    queries = _queries(bank, tmp_path)
    made = probes.build(queries, bank, tmp_path / "probes", seed=3)
    assert len(made) == 5 * len(queries)
    figures, verdicts = probes.run(_judge(bank, made, tmp_path), made, tmp_path, use_labels=True)
    assert [verdict.status for verdict in verdicts] == ["ok"] * (len(made) + len(queries))
    assert figures["judge/echo_order"] == 1.0 and figures["judge/probe/echo"] < 2.5
    assert figures["judge/probe_order"] == 1.0
    assert figures["judge/probe/silence"] == figures["judge/probe/noise"] == 1.0
    assert figures["judge/probe/fitting"] == pytest.approx(5.0)
    assert figures["judge/tone_accuracy"] == 1.0 and figures["judge/word_error"] == 0.0
    assert figures["judge/probe_failed"] == 0.0
    assert math.isnan(figures["judge/style_accuracy"])  # Labels were used.


def test_tone_deaf_judge_is_found_out(bank, tmp_path):
    queries = _queries(bank, tmp_path)
    made = probes.build(queries, bank, tmp_path / "probes", seed=3)
    judge = _judge(bank, made, tmp_path, deaf_to_tone=True)
    figures, _ = probes.run(judge, made, tmp_path, use_labels=True)
    # Echoes are heard as well, and no part of the order.
    assert not math.isnan(figures["judge/probe/echo"])
    # Fitting words score alike in both tones: that pair of the nine is lost, no other.
    assert figures["judge/probe_order"] == pytest.approx(8 / 9)


def test_build_is_deterministic_and_resynthesis_replaces_the_spoken_waves(bank, tmp_path):
    queries = _queries(bank, tmp_path)[:1]
    plain = probes.build(queries, bank, tmp_path / "a", seed=1)
    again = probes.build(queries, bank, tmp_path / "b", seed=1)
    halved = probes.build(
        queries, bank, tmp_path / "a", seed=1, resynthesize=lambda waves: [w / 2 for w in waves]
    )
    assert [p.kind for p in plain] == list(probes.RANKS)
    for first, second, half in zip(plain, again, halved):
        wave = wave_lib.load(first.wav)
        np.testing.assert_array_equal(wave, wave_lib.load(second.wav))
        factor = 2 if first.kind in probes.SPOKEN else 1
        np.testing.assert_allclose(wave, factor * wave_lib.load(half.wav), atol=1e-4)
        assert dataclasses.replace(half.response, wav="") == dataclasses.replace(
            first.response, wav=""
        )
