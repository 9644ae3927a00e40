import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from paras2s_jax.align import phases
from paras2s_jax.audio import styles, synth, wave
from paras2s_jax.data.tokenizer import normalize
from paras2s_jax.judge.classifier import WaveClassifier
from paras2s_jax.judge.transcribe import WhisperTranscriber
from paras2s_jax.stages import policy, speech
from paras2s_jax.stages.recipe import ALIGN, STAGES
from paras2s_jax.train.checkpoint import load_part

ROOT = Path(__file__).resolve().parents[2]
PARTS = speech.PACKAGED / "tiny"


def _config(arg=None):
    spec = importlib.util.spec_from_file_location("tiny", ROOT / "configs" / "tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


def _speak(text, delivery):
    maker = synth.EspeakSynthesizer()
    return wave.resample(maker.speak(text, delivery), maker.rate_hz, wave.RATE_HZ)


def test_every_stage_needs_stages_and_config_sections_that_exist():
    config = _config()
    for stage in STAGES.values():
        assert set(stage.needs) <= set(STAGES), stage.name
        assert set(stage.sections) <= set(config), stage.name


def test_the_loop_names_each_stage_after_what_it_needs():
    for place, name in enumerate(ALIGN):
        assert set(STAGES[name].needs) <= set(ALIGN[:place]), name


def test_the_config_refuses_an_argument_it_does_not_know():
    assert _config("from_scratch").pretrain.source == "train"
    with pytest.raises(ValueError, match="nope"):
        _config("nope")


def test_the_shipped_parts_are_small_and_complete():
    names = {*speech.PART_FILES, speech.BASE_FILE}
    assert names == {path.name for path in PARTS.iterdir()}
    assert sum(path.stat().st_size for path in PARTS.iterdir()) < 8e6


def test_the_shipped_recogniser_and_tone_namer_hear_what_is_said_and_how():
    answers = 4 * [
        ("Wow, really? Tell me all about it!", "excited"),
        ("So sorry, I am here for you.", "gentle"),
        ("Technically, many factors interact here.", "formal"),
    ]
    rng = np.random.default_rng(7)
    waves = [_speak(text, styles.tone_delivery(tone, rng)) for text, tone in answers]
    heard = WhisperTranscriber.load(PARTS, batch_size=12).transcribe(waves)
    assert [row.text for row in heard] == [normalize(text) for text, _ in answers]
    tones, _ = WaveClassifier.load(PARTS / speech.TONE_FILE, batch_size=12).name(waves)
    hits = [found == tone for found, (_, tone) in zip(tones, answers, strict=True)]
    assert np.mean(hits) > 0.9


def test_the_shipped_base_policy_answers_speech_with_speech(tmp_path):
    config = _config()
    made = policy.assemble(config, tmp_path)
    variables, _ = load_part(PARTS / speech.BASE_FILE, "float32")
    delivery = styles.delivery("f3", "neutral", np.random.default_rng(0))
    query = _speak("How does a rocket fly so high?", delivery)
    waves = np.zeros((1, 48_000), np.float32)
    waves[0, : len(query)] = query
    batch = {"query": waves, "query_len": np.array([len(query)])}
    respond = phases.Responder(made.policy, group_size=2)
    rollout, answers = respond(variables, made.frontend, batch, jax.random.key(0))
    assert rollout.finished.all()
    assert (answers.lens > 0.4 * wave.RATE_HZ).all()
    assert np.isfinite(answers.waves).all()
    assert (np.abs(answers.waves).max(axis=-1) > 0.02).all()
