"""Builders on fake data, in the manner of tensorflow-datasets."""

import csv
import os

import numpy as np
import pytest
import tensorflow_datasets as tfds

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.data.datasets import iemocap_queries, meld_queries, paras2s_bench, queries
from paras2s_jax.data.records import Query, read_jsonl


def tone(path, dur_s):
    t = np.arange(round(dur_s * 16_000)) / 16_000
    wave_lib.save(path, (0.2 * np.sin(2 * np.pi * 150 * t)).astype(np.float32), 16_000)


def fake_iemocap(root):
    """One dialogue: a good row of each kind, and one for every reason to be left out."""
    rows = [
        ("Ses01F_impro01_F000", "sad", "I do not know what to say.", 2.0),
        ("Ses01F_impro01_M000", "exc", "We are going to the coast tomorrow.", 2.0),
        ("Ses01F_impro01_F001", "neu", "Please put it on the table.", 2.0),
        ("Ses01F_impro01_F002", "ang", "What?", 2.0),
        ("Ses01F_impro01_F003", "ang", "You never told me [LAUGHTER] about it.", 2.0),
        ("Ses01F_impro01_F004", "sur", "They came back on the same day.", 0.5),
        ("Ses01F_impro01_F005", "xxx", "It was the first of the month.", 2.0),
    ]
    session = root / iemocap_queries.FOLDER / "Session1"
    labels, words = [], []
    for name, label, text, dur_s in rows:
        labels.append(f"[6.2901 - 8.2357]\t{name}\t{label}\t[2.5000, 2.5000, 2.5000]\nC-E1:\tx;\n")
        words.append(f"{name} [006.2901-008.2357]: {text}\n")
        tone(session / "sentences/wav/Ses01F_impro01" / f"{name}.wav", dur_s)
    for kind, lines in (("EmoEvaluation", labels), ("transcriptions", words)):
        path = session / "dialog" / kind / "Ses01F_impro01.txt"
        path.parent.mkdir(parents=True)
        path.write_text("".join(lines))


def fake_meld(root):
    folder = root / meld_queries.FOLDER
    folder.mkdir(parents=True)
    rows = [
        ("Why do all you\x92re coffee mugs have numbers?", "Mark", "surprise", 0, 0, 2.0),
        ("I am so happy to see you here.", "Rachel", "joy", 0, 1, 2.0),
        ("It is on the shelf over there.", "Mark", "neutral", 0, 2, 2.0),
        ("Oh my God.", "Rachel", "surprise", 1, 0, 2.0),
        ("This one goes on and on for ever.", "Ross", "sadness", 1, 1, 13.0),
    ]
    with open(folder / meld_queries.LABELS, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Sr No.", *meld_queries.COLUMNS, "Sentiment"])
        for number, (text, speaker, emotion, dialogue, utterance, dur_s) in enumerate(rows):
            writer.writerow([number, text, speaker, emotion, dialogue, utterance, "x"])
            tone(folder / "wav" / f"dia{dialogue}_utt{utterance}.wav", dur_s)


FAKES = {
    iemocap_queries.IemocapQueries: fake_iemocap,
    meld_queries.MeldQueries: fake_meld,
}


def build(builder_class, root):
    manual = root / "manual"
    FAKES[builder_class](manual)
    builder = builder_class(data_dir=root / "data")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=manual, try_download_gcs=False)
    )
    return builder


def exported(builder, root, split="test"):
    path = queries.export(builder, split, root / "out")
    return read_jsonl(path, Query)


def test_iemocap_keeps_emotional_words_of_a_fair_length(tmp_path):
    rows = exported(build(iemocap_queries.IemocapQueries, tmp_path), tmp_path)
    assert [(row.id, row.style, row.contrast, row.voice) for row in rows] == [
        ("iemocap-Ses01F_impro01_F000", "sad", "happy", "Session1-F"),
        ("iemocap-Ses01F_impro01_M000", "happy", "sad", "Session1-M"),
    ]
    assert rows[0].topic == "iemocap" and rows[0].dur_s == pytest.approx(2.0)
    wave = wave_lib.load(tmp_path / "out" / rows[0].wav)
    assert len(wave) == 32_000 and np.abs(wave).max() == pytest.approx(0.2, abs=1e-3)


def test_meld_keeps_emotional_words_of_a_fair_length(tmp_path):
    rows = exported(build(meld_queries.MeldQueries, tmp_path), tmp_path)
    assert [(row.id, row.style, row.voice) for row in rows] == [
        ("meld-dia0_utt0", "surprised", "Mark"),
        ("meld-dia0_utt1", "happy", "Rachel"),
    ]
    assert rows[0].text == "Why do all you're coffee mugs have numbers?"


def test_a_list_of_kept_names_is_obeyed(tmp_path):
    manual = tmp_path / "manual"
    manual.mkdir()
    (manual / "kept_ids.txt").write_text("dia0_utt1\n")
    rows = exported(build(meld_queries.MeldQueries, tmp_path), tmp_path)
    assert [row.id for row in rows] == ["meld-dia0_utt1"]


@pytest.mark.parametrize("module", [iemocap_queries, meld_queries])
def test_a_missing_corpus_says_where_it_belongs(tmp_path, module):
    with pytest.raises(FileNotFoundError, match=str(module.FOLDER)):
        next(module._utterances(tmp_path))


def test_the_bench_speaks_its_own_bank(tmp_path, monkeypatch):
    spoken = paras2s_bench._spoken
    monkeypatch.setattr(paras2s_bench, "_spoken", lambda split, _: spoken(split, 3))
    builder = paras2s_bench.Paras2sBench(data_dir=tmp_path / "data")
    builder.download_and_prepare()
    assert builder.info.splits["test"].num_examples == 3
    rows = exported(builder, tmp_path)
    assert {row.split for row in rows} == {"test"} and rows[0].style != rows[0].contrast
    assert os.path.getsize(tmp_path / "out" / rows[0].wav) > 10_000


def test_an_example_is_its_query_again():
    query = Query("a", "s", "age", "hi", "child", "adult", "t", "test", "v", "", 0.5)
    wave = np.linspace(-1, 1, 8000, dtype=np.float32)
    example = queries.example_of(query, wave)
    back, sound = queries.query_of(
        {k: v.encode() if isinstance(v, str) else v for k, v in example.items()}
    )
    assert (back.id, back.style, back.wav) == ("a", "child", "wavs/a.wav")
    np.testing.assert_allclose(sound, wave, atol=1 / 32_767)
