"""The command `queries`: the judge's own test set, and example answers to it."""

import pytest

from paras2s_jax import cli
from paras2s_jax.audio import wave
from paras2s_jax.data.bank import load_bank
from paras2s_jax.data.records import DIMENSIONS, Query, read_jsonl


def run(folder, *flags):
    return cli.main(["paras2s", "queries", f"--output={folder}", "--sentences=1", *flags])


def test_queries_and_what_two_made_up_systems_answer(tmp_path):
    assert run(tmp_path, "--voices=1", "--examples") == 0
    queries = read_jsonl(tmp_path / "queries.jsonl", Query)
    # One sentence of each dimension, in both styles.
    assert len(queries) == 2 * len(DIMENSIONS)
    assert {query.split for query in queries} == {"test"}
    assert {query.sentence_id for query in queries} <= {row.id for row in load_bank().of("test")}
    for query in queries:
        assert len(wave.load(tmp_path / query.wav)) / 16_000 == pytest.approx(query.dur_s, abs=1e-3)
        for system in ("tone_deaf", "topline"):
            assert len(wave.load(tmp_path / "examples" / system / f"{query.id}.wav")) > 8000


def test_voices_that_are_not_there_are_refused(tmp_path, capsys):
    assert run(tmp_path, "--voices=99") == 2
    assert "99 test voices asked for" in capsys.readouterr().err
    assert not (tmp_path / "queries.jsonl").exists()
