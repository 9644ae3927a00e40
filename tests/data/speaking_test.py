"""Spoken clips depend on what they are, not on where, when or after what they are made."""

from paras2s_jax.audio import styles
from paras2s_jax.data import records, speaking


def test_rng_depends_on_seed_and_name_only():
    draw = speaking.rng_of(3, "queries", "emotion-000-sad-anna").integers(10**9)
    assert draw == speaking.rng_of(3, "queries", "emotion-000-sad-anna").integers(10**9)
    assert draw != speaking.rng_of(4, "queries", "emotion-000-sad-anna").integers(10**9)
    assert draw != speaking.rng_of(3, "queries", "emotion-000-sad-bella").integers(10**9)


def _clip(voice: str) -> speaking.Clip:
    text = "My old friend is moving away in May."
    row = records.SpeechClip(voice, text, wav="", split="train", dur_s=0.0, kind="sentence")
    delivery = styles.delivery(voice, "child", speaking.rng_of(0, voice))
    return speaking.Clip(row, "voices", voice, text, delivery)


def test_every_voice_sounds_the_same_in_every_process_and_order(tmp_path):
    clips = [_clip(voice) for voice in styles.VOICES]
    alone, made = speaking.speak(clips, tmp_path / "1", num_workers=1)
    together, _ = speaking.speak(clips[::-1], tmp_path / "2", num_workers=2)
    assert made == len(clips) and alone == together[::-1]
    for row in alone:
        assert (tmp_path / "1" / row.wav).read_bytes() == (tmp_path / "2" / row.wav).read_bytes()
