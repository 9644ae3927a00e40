"""Plans are balanced and deterministic; making them can stop and go on."""

import dataclasses
from collections import Counter, defaultdict

import pytest
import soundfile

from paras2s_jax.audio import styles
from paras2s_jax.data import records, speaking, synthesize
from paras2s_jax.data.bank import load_bank

BANK = load_bank()
SIZES = synthesize.Sizes()
TINY_SIZES = synthesize.Sizes(
    train_voices=1,
    test_voices=1,
    polytone_texts=1,
    polytone_voices=1,
    plain_takes=1,
    contrary_takes=1,
    answer_takes=0,
    tone_texts=0,
)


def tiny_bank():
    """One train and one test sentence, dialogue and leading text; all answers of one pair."""
    sentences = [next(s for s in BANK.sentences if s.split == p) for p in ("train", "test")]
    key = BANK.sentences[0].dimension, BANK.sentences[0].style_a
    leading = [next(row for row in BANK.leading if row.split == p) for p in ("train", "test")]
    return dataclasses.replace(
        BANK,
        sentences=tuple(sentences),
        dialogues=BANK.dialogues[1:3],
        leading=tuple(leading),
        answers={k: v[:1] for k, v in BANK.answers.items() if k[0] == key[0]},
    )


def test_voices_fit_style_and_split():
    def voices(style, split, num_voices):
        return synthesize.voices_for(style, split, num_voices, speaking.rng_of(0, "x"))

    for style in ("male", "female"):
        assert {styles.VOICES[name].gender for name in voices(style, "train", 4)} == {style}
    mixed = voices("sad", "train", 4)
    assert len(set(mixed)) == 4 and mixed == voices("surprised", "train", 4)
    assert Counter(styles.VOICES[name].gender for name in mixed) == {"male": 2, "female": 2}
    assert {styles.VOICES[name].split for name in voices("child", "test", None)} == {"test"}
    with pytest.raises(ValueError, match="ask for fewer"):
        voices("male", "test", 3)


def test_queries_cover_every_sentence_in_both_styles():
    rows = [clip.row for clip in synthesize.plan_queries(BANK, 0, SIZES)]
    # 4 dimensions x 2 styles x (45 train x 4 voices + 15 test x 2 voices) = 1440 + 240
    assert Counter(row.split for row in rows) == {"train": 1440, "test": 240}
    assert len({row.id for row in rows}) == len(rows)
    voices = defaultdict(set)
    for row in rows:
        assert styles.VOICES[row.voice].split == row.split
        assert row.contrast != row.style
        voices[row.sentence_id, row.style].add(row.voice)
    for row in rows:
        shared = voices[row.sentence_id, row.style] & voices[row.sentence_id, row.contrast]
        assert len(shared) == (
            0 if row.dimension == "gender" else len(voices[row.sentence_id, row.style])
        )


def test_answers_fit_and_bland_answers_do_not():
    queries = [clip.row for clip in synthesize.plan_queries(BANK, 0, SIZES)][:50]
    fitting = synthesize.plan_answers(BANK, queries, "demonstration", "demonstrations", 0)
    bland = synthesize.plan_answers(BANK, queries, "bland", "bland", 0)
    for query, good, dull in zip(queries, fitting, bland, strict=True):
        rubric = BANK.rubric[query.dimension, query.style]
        assert good.row.query_id == dull.row.query_id == query.id
        assert rubric.acts_done(good.row.text) == 1.0 and rubric.tones[good.row.tone] == 1.0
        assert rubric.acts_done(dull.row.text) == 0.0 and dull.row.tone == "flat"
        assert styles.ASSISTANT_VOICE.espeak == good.delivery.voice
    assert len({clip.row.text for clip in fitting}) > 3  # the choice varies


def test_polytone_words_tell_nothing_and_test_words_mislead():
    rows = [clip.row for clip in synthesize.plan_polytone(BANK, 0, SIZES)]
    sizes = Counter((row.attribute, row.set, row.label) for row in rows)
    for attribute in records.DIMENSIONS:
        for label in BANK.styles(attribute):
            assert sizes[attribute, "polytone", label] == 240  # 60 texts x 4 voices
            assert sizes[attribute, "plain", label] == 240  # 24 texts x 10 takes
            assert sizes[attribute, "test", label] == 80  # 10 texts x 8 takes
    labels, is_leading = defaultdict(list), {}
    suggested = {row.id: row.value for row in BANK.leading}
    for row in rows:
        split = "test" if row.set == "test" else "train"
        assert styles.VOICES[row.voice].split == split
        if row.set == "polytone":
            labels[row.attribute, row.text].append(row.label)
            is_leading[row.attribute, row.text] = row.text_id in suggested
        else:
            assert (suggested[row.text_id] == row.label) == (row.set == "plain")
    for (attribute, _), found in labels.items():
        assert Counter(found) == dict.fromkeys(BANK.styles(attribute), 4)
    assert Counter(is_leading.values()) == {True: 120, False: 120}  # 4 x 30 texts
    assert len({row.id for row in rows}) == len(rows)


def test_speech_has_the_same_texts_in_all_tones():
    tones = defaultdict(Counter)
    for clip in synthesize.plan_speech(BANK, 0, SIZES):
        tones[clip.row.kind, clip.row.split, clip.row.text][clip.row.tone] += 1
    for (kind, split, _), found in tones.items():
        assert set(found) == set(styles.TONES) and len(set(found.values())) == 1
        assert found["flat"] == (3 if (kind, split) == ("answer", "train") else 1)


def test_demonstrations_are_nested_and_even():
    queries = [clip.row for clip in synthesize.plan_queries(BANK, 0, SIZES)]
    train = [query for query in queries if query.split == "train"]
    small = synthesize.select_demonstrations(train, 80, seed=1)
    large = synthesize.select_demonstrations(train[::-1], 400, seed=1)
    assert large[:80] == small
    assert set(Counter((q.dimension, q.style) for q in large).values()) == {50}
    per_sentence = Counter((q.sentence_id, q.style) for q in large)
    assert len(per_sentence) == 360 and max(per_sentence.values()) == 2  # all of 45 x 8 first
    assert synthesize.select_demonstrations(train, 80, seed=2) != small
    with pytest.raises(ValueError, match="there are 1440 queries"):
        synthesize.select_demonstrations(train, 1441, seed=1)


def test_run_resumes_and_repairs(tmp_path):
    def run(**kwargs):
        return synthesize.run(
            tmp_path,
            bank=tiny_bank(),
            sizes=TINY_SIZES,
            num_workers=1,
            progress=False,
            **kwargs,
        )

    splits = ("train", "test")
    figures = run()
    assert figures["made/clips"] == figures["total/clips"] > 0
    queries = records.read_jsonl(tmp_path / "queries.jsonl", records.Query)
    assert [q.split for q in queries] == ["train", "train", "test", "test"]
    for name in ("demonstrations", "bland", "topline", "neutral_answers"):
        rows = records.read_jsonl(tmp_path / f"{name}.jsonl", records.Response)
        assert len(rows) == 2 and len(rows) == figures[f"{name}/clips"]
    records.read_jsonl(tmp_path / "polytone.jsonl", records.PolytoneClip)
    speech = records.read_jsonl(tmp_path / "speech.jsonl", records.SpeechClip)
    assert {clip.kind for clip in speech} == {"sentence", "dialogue", "leading", "answer"}
    spoken = {p: {c.text for c in speech if c.split == p and c.tone is None} for p in splits}
    assert spoken["train"] and spoken["test"] and spoken["train"].isdisjoint(spoken["test"])
    first, second = (tmp_path / query.wav for query in queries[:2])
    info = soundfile.info(first)
    assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
    assert queries[0].dur_s == pytest.approx(info.frames / 16_000, abs=1e-4)

    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    first.unlink()
    second.write_bytes(second.read_bytes()[:100])  # a copy that was cut off
    assert run()["made/clips"] == 2
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert run(seed=1)["made/clips"] > 0  # another seed never takes over the old wavs
