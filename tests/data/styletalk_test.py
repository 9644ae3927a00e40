import csv

import numpy as np
import pytest

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.data import styletalk
from paras2s_jax.data.records import Query, RecordError, Response, read_jsonl

HEAD = ("context_id", "audio_id", "curr_text", "curr_emotion", "res_text", "res_emotion", "speaker")
ROWS = (
    ("d1", "a1", "I got the job.", "cheerful", "Great!", "cheerful", "f1"),
    ("d1", "a2", "I  got the JOB.", "sad", "Oh, what is wrong?", "gentle", "f1"),
    ("d2", "a3", "It is raining.", "neutral", "Take a coat.", "neutral", "m1"),
)


def write(tmp_path, rows=ROWS, head=HEAD):
    path = tmp_path / "styletalk.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    for row in rows:
        wave = np.full(2400, 0.1, np.float32)
        wave_lib.save(tmp_path / "waves" / f"{row[1]}.wav", wave, 24_000)
    return path


def test_turns_in_two_styles_become_queries_with_answers(tmp_path):
    path = write(tmp_path)
    assert styletalk.import_csv(path, tmp_path / "waves", tmp_path / "out") == (2, 1)
    queries = read_jsonl(tmp_path / "out" / "queries.jsonl", Query)
    assert [(q.style, q.contrast) for q in queries] == [("cheerful", "sad"), ("sad", "cheerful")]
    assert queries[0].sentence_id == queries[1].sentence_id
    assert len(wave_lib.load(tmp_path / "out" / queries[0].wav)) == 1600
    answers = read_jsonl(tmp_path / "out" / "answers.jsonl", Response)
    assert [(a.query_id, a.text, a.tone) for a in answers][1] == (
        queries[1].id,
        "Oh, what is wrong?",
        "gentle",
    )


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(RecordError, match="no such file"):
        styletalk.import_csv(tmp_path / "x.csv", tmp_path, tmp_path / "out")
    path = write(tmp_path, head=("context_id", "audio_id", "text", *HEAD[3:]))
    with pytest.raises(RecordError, match="no column curr_text"):
        styletalk.import_csv(path, tmp_path / "waves", tmp_path / "out")
    path = write(tmp_path, rows=(ROWS[0], ("d1", "../../etc/passwd", *ROWS[1][2:])))
    with pytest.raises(wave_lib.AudioError):
        styletalk.import_csv(path, tmp_path / "waves", tmp_path / "out")
