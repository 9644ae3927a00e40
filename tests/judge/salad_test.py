from collections import Counter

from paras2s_jax.audio import styles
from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.judge import salad

TEXTS = ("The cat, sat!", "a dog ran", "The dog's new hat")


def test_words_are_mixed_evenly_and_spoken(tmp_path):
    clips = salad.speak(TEXTS, tmp_path, 12, seed=3, progress=False)
    words = Counter(word for clip in clips for word in clip.text.split())
    # the cat sat a dog ran dog's new hat
    assert set(words) == {"the", "cat", "sat", "a", "dog", "ran", "dog's", "new", "hat"}
    assert max(words.values()) - min(words.values()) <= 1
    assert all(salad.MIN_WORDS <= len(c.text.split()) <= salad.MAX_WORDS for c in clips)
    assert {clip.kind for clip in clips} == {"salad"}
    tones = [clip.tone for clip in clips]
    assert None in tones and set(tones) - {None} <= set(styles.TONES)
    for clip in clips:
        assert len(wave_lib.load(tmp_path / clip.wav)) / wave_lib.RATE_HZ > 0.3
    assert salad.speak(TEXTS, tmp_path, 12, seed=3, progress=False) == clips
    # A larger salad holds the smaller one, so that nothing is spoken twice.
    assert salad.speak(TEXTS, tmp_path, 14, seed=3, progress=False)[:12] == clips
