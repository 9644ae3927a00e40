import math

import numpy as np
import pytest

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.audio.synth import Delivery, EspeakSynthesizer
from paras2s_jax.bench import ear

ANSWERS = (
    "Wow, really? Tell me all about it!",
    "So sorry, I am here for you.",
    "Hey kiddo, picture a tiny busy robot!",
    "Certainly, sir. A dark suit looks great.",
    "It just works in that way.",
)


def speak(text, voice="en-us+m3", rate=170):
    synth = EspeakSynthesizer()
    wave = synth.speak(text, Delivery(voice, rate, 45, 50, 100))
    return wave_lib.resample(wave, synth.rate_hz, wave_lib.RATE_HZ)


def hearing(heard, expected, hit):
    return ear.Hearing("q", 0, heard, expected, hit, "key")


def test_names_each_answer_in_two_voices():
    listener = ear.Ear(ANSWERS)
    for voice, rate in (("en-us+m3", 160), ("en-us+f2", 210)):
        assert [listener.hear(speak(text, voice, rate)) for text in ANSWERS] == list(ANSWERS)


def test_hearing_does_not_depend_on_what_came_before():
    wave = speak(ANSWERS[1])
    fresh = ear.Ear(ANSWERS).hear(wave)
    listener = ear.Ear(ANSWERS)
    rng = np.random.default_rng(0)
    assert listener.hear(rng.normal(0, 0.2, 16000)) is None
    assert listener.hear(np.zeros(16000, np.float32)) is None
    assert listener.hear(wave) == fresh == ANSWERS[1]


def test_words_without_a_pronunciation_are_named():
    with pytest.raises(ear.EarError, match="lacks florbix, zzyq;"):
        ear.Ear(["The zzyq florbix sings."])
    ear.Ear(["The florbix sings."], {"florbix": "F L AO R B IH K S"})
    with pytest.raises(ear.EarError, match="no words"):
        ear.Ear(["?!"])


def test_files_are_heard_in_order_by_two_workers(tmp_path):
    paths = []
    for index in range(10):
        paths.append(tmp_path / f"{index}.wav")
        wave_lib.save(paths[-1], speak(ANSWERS[index % len(ANSWERS)]))
    expected = [ANSWERS[index % len(ANSWERS)] for index in range(10)]
    assert ear.hear_files(paths, ANSWERS, num_workers=2) == expected
    assert ear.hear_files(paths[:3], ANSWERS, num_workers=1) == expected[:3]
    assert ear.hear_files([], ANSWERS) == []


def test_nearest_answer_by_word_edits():
    assert ear.nearest("so SORRY i am here", ANSWERS) == ANSWERS[1]
    assert ear.nearest("it works that way", ANSWERS) == ANSWERS[4]
    assert ear.nearest(" ?! ", ANSWERS) is None
    # 1 edit of 2 words against 2 of 6: the longer answer shares more of its words.
    assert ear.nearest("a b c d x y", ["a x", "a b c d e f"]) == "a b c d e f"


def test_hit_rate():
    rows = [hearing("a", "a", True), hearing("b", "a", False), hearing(None, "a", False)]
    assert ear.hit_rate(rows) == pytest.approx(1 / 3)
    assert ear.hit_rate([*rows, hearing("a", None, False)]) == 0.25
    assert math.isnan(ear.hit_rate([hearing("a", None, False)]))


def test_key_follows_the_bytes_and_the_answers(tmp_path):
    path = tmp_path / "a.wav"
    wave_lib.save(path, np.zeros(100, np.float32))
    key = ear.hearing_key(path, ANSWERS)
    assert key == ear.hearing_key(path, ANSWERS[::-1])
    assert key != ear.hearing_key(path, ANSWERS[1:])
    wave_lib.save(path, np.full(100, 0.1, np.float32))
    assert key != ear.hearing_key(path, ANSWERS)
