"""The bank keeps its promises: sizes, disjoint splits, and rubrics that fit the answers."""

import re
from collections import Counter

import pytest

from paras2s_jax.audio import styles
from paras2s_jax.data.bank import has_cue, load_bank
from paras2s_jax.data.records import DIMENSIONS

BANK = load_bank()
PAIRS = [(dimension, style) for dimension in DIMENSIONS for style in BANK.styles(dimension)]


def words(text):
    return re.findall(r"[a-z']+", text.lower())


def test_counts():
    counts = Counter((s.dimension, s.split) for s in BANK.sentences)
    assert counts == {(d, s): n for d in DIMENSIONS for s, n in (("train", 45), ("test", 15))}
    assert len(BANK.dialogues) >= 40
    leading = Counter((row.attribute, row.value) for row in BANK.leading)
    assert set(leading) == set(PAIRS) and min(leading.values()) >= 24
    for key in PAIRS:
        assert len(BANK.answers[key]) == 3
        assert {row.split for row in BANK.leading if row.value == key[1]} == {"train", "test"}
    for dimension in DIMENSIONS:
        assert len(BANK.answers[dimension, "neutral"]) == 2


def test_sentences_are_short_and_unique():
    texts = [row.text for row in (*BANK.sentences, *BANK.dialogues, *BANK.leading)]
    assert [text for text, count in Counter(texts).items() if count > 1] == []
    assert [s.text for s in BANK.sentences if not 4 <= len(s.text.split()) <= 8] == []
    assert len({s.id for s in BANK.sentences}) == len(BANK.sentences)


def test_topics_of_the_splits_are_disjoint():
    train = {s.topic for s in BANK.of("train")}
    test = {s.topic for s in BANK.of("test")}
    assert train & test == set()
    assert len(test) == 60  # one topic per test sentence


def test_voices_of_the_splits_are_disjoint():
    by_split = Counter((v.split, v.gender) for v in styles.VOICES.values())
    assert by_split["train", "male"] >= 4 and by_split["train", "female"] >= 4
    assert by_split["test", "male"] >= 2 and by_split["test", "female"] >= 2
    espeak = {
        split: {v.espeak for v in styles.VOICES.values() if v.split == split}
        for split in ("train", "test")
    }
    assert espeak["train"] & espeak["test"] == set()
    assert styles.ASSISTANT_VOICE.espeak not in espeak["train"] | espeak["test"]


def test_frames_tell_the_dimension():
    frames = {
        "emotion": r"\bjust\b",
        "sarcasm": r"quite a|really something|was some|never \w+( in)? such|^What .+ (was|had)\b",
        "age": r"^(How do|Why|Where do|What makes|Can you explain)",
        "gender": r"^(I need (something|clothes)|What should I wear)",
    }
    for sentence in BANK.sentences:
        told = [name for name, frame in frames.items() if re.search(frame, sentence.text)]
        assert told == [sentence.dimension], sentence.text


def test_test_words_are_mostly_known_from_train_texts():
    known = {word for text in BANK.texts("train") for word in words(text)}
    for dimension in DIMENSIONS:
        used = [word for s in BANK.of("test", dimension) for word in words(s.text)]
        assert sum(word in known for word in used) / len(used) > 0.9


@pytest.mark.parametrize("dimension, style", PAIRS)
def test_rubric_fits_the_answers(dimension, style):
    rubric = BANK.rubric[dimension, style]
    (contrast,) = set(BANK.styles(dimension)) - {style}
    assert BANK.tones[dimension, style] in styles.TONES
    assert set(rubric.tones) == set(styles.TONES)
    assert rubric.tones[BANK.tones[dimension, style]] == 1.0
    assert all(0 <= fit <= 1 for fit in rubric.tones.values())
    for text in BANK.answers[dimension, style]:
        assert rubric.acts_done(text) == 1.0, text
        assert not has_cue(text, rubric.bland), text
    for text in BANK.answers[dimension, contrast]:
        assert rubric.acts_done(text) == 0.0, text
    for text in BANK.answers[dimension, "neutral"]:
        assert rubric.acts_done(text) == 0.0, text
        assert has_cue(text, rubric.bland), text


def test_no_sentence_answers_itself():
    """An echo of the query must not count as an answer."""
    spoken = {row.text for row in (*BANK.sentences, *BANK.dialogues, *BANK.leading)}
    answers = [text for texts in BANK.answers.values() for text in texts]
    assert len(set(answers)) == len(answers) and spoken.isdisjoint(answers)
    for sentence in BANK.sentences:
        for style in (sentence.style_a, sentence.style_b):
            assert BANK.rubric[sentence.dimension, style].acts_done(sentence.text) == 0.0


def test_answers_are_short_and_distinct():
    for texts in BANK.answers.values():
        for text in texts:
            assert 5 <= len(text.split()) <= 8, text
    every = [set(words(text)) for texts in BANK.answers.values() for text in texts]
    for index, left in enumerate(every):
        for right in every[:index]:
            assert len(left & right) / len(left | right) <= 0.6, (left, right)


def test_cues_are_whole_words():
    assert has_cue("Ha, that BAD?", ("that bad",))
    assert not has_cue("what a hat", ("ha",))
    assert not has_cue("bad that", ("that bad",))
    assert has_cue("Yes, ma'am.", ("ma'am",))


def test_the_first_of_each_group():
    bank = load_bank()
    small = bank.first(2)
    assert bank.first(0) is bank
    counts = Counter((row.dimension, row.split) for row in small.sentences)
    assert counts == {(name, split): 2 for name in DIMENSIONS for split in ("train", "test")}
    for dimension in DIMENSIONS:
        assert small.of("test", dimension) == bank.of("test", dimension)[:2]
    assert Counter(row.split for row in small.dialogues) == {"train": 2, "test": 2}
    assert set(Counter((row.value, row.split) for row in small.leading).values()) == {2}
    assert small.answers is bank.answers
