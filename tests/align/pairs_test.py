"""Joining queries and responses."""

import dataclasses

import pytest

from paras2s_jax.align import pairs
from paras2s_jax.data.batches import ManifestError


def test_paths_are_relative_to_one_root(spoken, tmp_path):
    queries, responses, _ = spoken
    rows, root = pairs.pair_rows(
        queries, tmp_path / "speech", responses, tmp_path / "distill" / "samples"
    )
    assert root == tmp_path.resolve()
    assert rows[1]["query"] == "speech/1.wav"
    assert rows[1]["answer"] == "distill/samples/4.wav"
    assert (rows[1]["text"], rows[1]["query_id"], rows[1]["sentence_id"]) == ("sad", "q1", "s0")


def test_rows_for_rl_tell_no_words_and_no_labels(spoken):
    rows = pairs.query_rows(spoken[0])
    assert rows[0] == {"query": "0.wav", "query_id": "q0"}


def test_a_response_to_an_unknown_query_is_named(spoken, tmp_path):
    queries, responses, _ = spoken
    with pytest.raises(ManifestError, match="'q5'"):
        pairs.pair_rows(queries[:5], tmp_path, responses, tmp_path)


def test_answers_move_to_the_same_sentence_in_its_other_style(spoken):
    query, response = spoken[0][0], spoken[1][0]

    def asked(name, sentence, style, contrast):
        return dataclasses.replace(
            query, id=name, sentence_id=sentence, style=style, contrast=contrast
        )

    queries = [
        asked("s0-sad", "s0", "sad", "surprised"),
        asked("s0-surprised-a", "s0", "surprised", "sad"),
        asked("s0-surprised-b", "s0", "surprised", "sad"),
        asked("s1-sad", "s1", "sad", "surprised"),
    ]
    given = [dataclasses.replace(response, query_id=q.id) for q in queries]
    moved = pairs.in_other_style(queries, given, seed=0)
    # Nobody asked s1 in the other style: its answer has nowhere to go.
    assert len(moved) == 3
    assert moved[0].query_id in ("s0-surprised-a", "s0-surprised-b")
    assert [row.query_id for row in moved[1:]] == ["s0-sad"] * 2
    assert [dataclasses.replace(row, query_id="") for row in moved] == [
        dataclasses.replace(row, query_id="") for row in given[:3]
    ]
    assert pairs.in_other_style(queries, given, seed=0) == moved
