"""Styles: voices and splits are disjoint; contrasts and tones differ where one can hear it."""

import itertools

import librosa
import numpy as np
import pytest

from paras2s_jax.audio import styles
from paras2s_jax.audio.synth import EspeakSynthesizer

ESPEAK = EspeakSynthesizer()
TEXT = "My sister has moved to a new town."
TEST_VOICES = [name for name, voice in styles.VOICES.items() if voice.split == "test"]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def heard(delivery) -> dict[str, float]:
    """Median F0 in Hz, duration in s, root mean square, spectral centroid in Hz."""
    samples = ESPEAK.speak(TEXT, delivery)
    setup = {"frame_length": 1024, "hop_length": 512}
    f0 = librosa.yin(samples, fmin=55, fmax=600, sr=ESPEAK.rate_hz, **setup)
    rms = librosa.feature.rms(y=samples, **setup)[0][: len(f0)]
    centroid = librosa.feature.spectral_centroid(y=samples, sr=ESPEAK.rate_hz)
    return {
        "f0": float(np.median(f0[rms > 0.4 * rms.max()])),
        "dur": len(samples) / ESPEAK.rate_hz,
        "rms": float(np.sqrt(np.mean(samples**2))),
        "centroid": float(centroid.mean()),
    }


def test_voices_cover_both_genders_in_both_splits():
    count = {
        (gender, split): sum(
            v.gender == gender and v.split == split for v in styles.VOICES.values()
        )
        for gender in ("male", "female")
        for split in ("train", "test")
    }
    assert min(count["male", "train"], count["female", "train"]) >= 4
    assert min(count["male", "test"], count["female", "test"]) >= 2
    espeak = [voice.espeak for voice in styles.VOICES.values()]
    assert len(set(espeak)) == len(espeak)
    assert styles.ASSISTANT_VOICE.espeak not in espeak


def test_server_voices_keep_the_splits_apart():
    assert set(styles.OPENAI_VOICES) == {
        voice.espeak for voice in [*styles.VOICES.values(), styles.ASSISTANT_VOICE]
    }
    by_split = {}
    for voice in [*styles.VOICES.values(), styles.ASSISTANT_VOICE]:
        by_split.setdefault(voice.split, set()).add(styles.OPENAI_VOICES[voice.espeak])
    for one, other in itertools.combinations(by_split.values(), 2):
        assert not one & other


@pytest.mark.parametrize("name", TEST_VOICES)
def test_emotions_are_apart(name):
    surprised, sad = (heard(styles.delivery(name, s, rng())) for s in ("surprised", "sad"))
    assert surprised["f0"] > 1.5 * sad["f0"]
    assert surprised["rms"] > 2.0 * sad["rms"]
    assert surprised["dur"] < 0.75 * sad["dur"]


@pytest.mark.parametrize("name", TEST_VOICES)
def test_sarcasm_is_apart(name):
    sincere, sarcastic = (heard(styles.delivery(name, s, rng())) for s in ("sincere", "sarcastic"))
    assert sincere["dur"] < 0.75 * sarcastic["dur"]
    assert sincere["rms"] > 1.4 * sarcastic["rms"]
    assert sincere["f0"] > 1.1 * sarcastic["f0"]


@pytest.mark.parametrize("name", TEST_VOICES)
def test_children_are_smaller_than_adults(name):
    child, adult = (heard(styles.delivery(name, s, rng())) for s in ("child", "adult"))
    assert child["f0"] > 1.4 * adult["f0"]
    assert child["f0"] > 200
    assert child["centroid"] > 1.05 * adult["centroid"]


def test_men_and_women_are_apart():
    f0 = {
        name: heard(styles.delivery(name, voice.gender, rng()))["f0"]
        for name, voice in styles.VOICES.items()
    }
    male = [f0[name] for name, voice in styles.VOICES.items() if voice.gender == "male"]
    female = [f0[name] for name, voice in styles.VOICES.items() if voice.gender == "female"]
    assert max(male) * 1.3 < min(female)


def test_tones_differ_in_at_least_two_ways():
    sound = {tone: heard(styles.tone_delivery(tone, rng())) for tone in styles.TONES}
    spread = {
        tone: styles.ASSISTANT_TONES[tone].pitch_range >= 50 for tone in styles.TONES
    }  # Melody, which the median does not show.
    for one, other in itertools.combinations(styles.TONES, 2):
        differences = [
            max(sound[one][key], sound[other][key]) / min(sound[one][key], sound[other][key]) > 1.12
            for key in ("f0", "dur", "rms")
        ]
        assert sum(differences) + (spread[one] != spread[other]) >= 2, (one, other)


def test_longest_answers_stay_short():
    text = "Please take all the time you need today."
    for tone in styles.TONES:
        for seed in range(3):
            samples = ESPEAK.speak(text, styles.tone_delivery(tone, rng(seed)))
            assert len(samples) / ESPEAK.rate_hz < 2.8, tone


def test_deliveries_repeat_by_seed_and_vary_between_seeds():
    for make in (
        lambda r: styles.delivery("adam", "sad", r),
        lambda r: styles.tone_delivery("wry", r),
    ):
        assert make(rng(3)) == make(rng(3))
        assert len({make(rng(seed)) for seed in range(10)}) > 5


def test_every_delivery_is_one_that_espeak_accepts():
    for name, voice in styles.VOICES.items():
        for style in styles.QUERY_STYLES:
            if style in ("male", "female") and style != voice.gender:
                continue
            assert ESPEAK.speak("Hello.", styles.delivery(name, style, rng(7))).size


def test_assistant_is_always_the_same_speaker():
    deliveries = [styles.tone_delivery(tone, rng(i)) for i, tone in enumerate(styles.TONES)]
    assert {(d.voice, d.tract_scale) for d in deliveries} == {("en-us+f2", 1.0)}


def test_wrong_names_are_errors():
    with pytest.raises(ValueError, match="unknown voice 'nobody'; known: alex"):
        styles.delivery("nobody", "sad", rng())
    with pytest.raises(ValueError, match="unknown query style 'angry'; known: neutral"):
        styles.delivery("adam", "angry", rng())
    with pytest.raises(ValueError, match="'adam' is male and cannot speak as 'female'"):
        styles.delivery("adam", "female", rng())
    with pytest.raises(ValueError, match="unknown tone 'angry'; known: flat"):
        styles.tone_delivery("angry", rng())


@pytest.mark.parametrize("voice, style", [("adam", "surprised"), ("f1", "child"), ("f1", "sad")])
def test_milder_style_lies_between_everyday_speech_and_the_full_style(voice, style):
    neutral, mild, full = (
        styles.delivery(voice, name, rng(), strength)
        for name, strength in (("neutral", 1.0), (style, 0.5), (style, 1.0))
    )
    for field in ("rate_wpm", "pitch", "pitch_range", "volume", "tract_scale"):
        ends = sorted((getattr(neutral, field), getattr(full, field)))
        assert ends[0] <= getattr(mild, field) <= ends[1]
    assert mild not in (full, neutral)
    assert styles.delivery(voice, style, rng(), 0.0).rate_wpm == neutral.rate_wpm


def test_milder_genders_approach_each_other():
    distance = []
    for strength in (1.0, 0.4):
        man = heard(styles.delivery("adam", "male", rng(), strength))
        woman = heard(styles.delivery("f1", "female", rng(), strength))
        distance.append(abs(np.log(woman["f0"] / man["f0"])))
    assert distance[1] < 0.8 * distance[0]


def test_strength_is_a_share():
    with pytest.raises(ValueError, match=r"strength 1\.5"):
        styles.delivery("adam", "sad", rng(), 1.5)
