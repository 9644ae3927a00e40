import jax
import numpy as np
import pytest

from paras2s_jax.align import phases
from paras2s_jax.audio import styles, synth, wave
from paras2s_jax.data.tokenizer import normalize
from paras2s_jax.judge.classifier import WaveClassifier
from paras2s_jax.judge.transcribe import WhisperTranscriber
from paras2s_jax.stages import assembly, policy, speech
from paras2s_jax.stages.recipe import ALIGN, stages_of
from paras2s_jax.stages.registry import StageError
from paras2s_jax.train.checkpoint import load_part

PARTS = speech.PACKAGED / "tiny"


def _speak(text, delivery):
    maker = synth.EspeakSynthesizer()
    return wave.resample(maker.speak(text, delivery), maker.rate_hz, wave.RATE_HZ)


@pytest.mark.parametrize("name", ["tiny", "kimi_audio_7b"])
def test_every_stage_needs_stages_and_config_sections_that_exist(load_config, name):
    config = load_config(name)
    stages = stages_of(config)
    needed, todo = set(), ["align"]
    while todo:
        needed.add(stage := stages[todo.pop()])
        todo += stage.needs
    for stage in needed:
        assert set(stage.sections) <= set(config), stage.name


@pytest.mark.parametrize("name", ["tiny", "kimi_audio_7b"])
def test_the_loop_names_each_stage_after_what_it_needs(load_config, name):
    stages = stages_of(load_config(name))
    loop = stages["align"].needs
    for place, stage in enumerate(loop):
        assert set(stages[stage].needs) <= set(loop[:place]), stage


def test_what_the_small_loop_needs(load_config):
    config = load_config("tiny")
    stages = stages_of(config)
    assert stages["align"].needs == ALIGN
    assert stages["sft"].needs == stages["sft_5x"].needs == ("base",)
    assert set(stages["distill"].needs) == {"sft", "analyzers", "pretrain"}
    config.distill.verdicts = "verdicts.jsonl"
    assert "analyzers" not in stages_of(config)["distill"].needs
    config.data.folder = "mine"
    assert stages_of(config)["sft"].needs == ("base",)


def test_a_judge_that_is_told_the_styles_needs_no_analyzers(load_config):
    config = load_config("tiny", "quick")
    assert "analyzers" in stages_of(config)["align"].needs
    config.judge.analyzers = dict.fromkeys(config.judge.analyzers, "")
    stages = stages_of(config)
    for name in ("align", "distill", "grpo", "bench"):
        assert "analyzers" not in stages[name].needs


def test_a_released_policy_on_a_users_data_needs_nothing_that_is_packaged(load_config):
    config = load_config("kimi_audio_7b")
    stages = stages_of(config)
    assert stages["sft"].needs == ()
    assert stages["distill"].needs == ("sft",)
    assert stages["grpo"].needs == ("distill",)
    assert stages["bench"].needs == ("sft", "grpo", "analyzers")
    assert not {"base", "sft_5x"} & set(stages["align"].needs)
    config.data.folder = ""
    assert stages_of(config)["sft"].needs == ("synthesize",)
    config.grpo.audit_every = 10
    assert stages_of(config)["grpo"].needs == ("distill", "pretrain")
    config.grpo.health.gap_every = 20
    assert stages_of(config)["grpo"].needs == ("distill", "analyzers")


def test_the_base_of_a_released_policy_is_not_trained(load_config, tmp_path):
    with pytest.raises(StageError, match="start with the stage sft"):
        policy.run_base(load_config("kimi_audio_7b"), tmp_path)


def test_the_config_refuses_an_argument_it_does_not_know(load_config):
    assert load_config("tiny", "from_scratch").pretrain.source == "train"
    assert load_config("tiny", "quick").pretrain.source == "tiny"
    with pytest.raises(ValueError, match="nope"):
        load_config("tiny", "nope")


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


def test_the_shipped_base_policy_answers_speech_with_speech(load_config, tmp_path):
    made = assembly.assemble(load_config("tiny"), tmp_path)
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
