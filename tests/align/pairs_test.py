"""Joining queries and responses."""

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
