"""Verdicts that a user brings."""

import dataclasses
import math

import pytest

from paras2s_jax.data.records import Response, Verdict, write_jsonl
from paras2s_jax.stages.judging import given_verdicts
from paras2s_jax.stages.registry import StageError

RESPONSES = [Response(f"q{i}", "sft", sample, "", "") for i in range(2) for sample in range(2)]


def verdict(query_id, sample, score):
    names = {field.name: "" for field in dataclasses.fields(Verdict)}
    return Verdict(
        **names
        | {"query_id": query_id, "sample": sample, "score": score, "raw": {}, "status": "ok"}
        | {"style_source": "label", "content": None, "tone_fit": None}
    )


ALL = [
    verdict("q1", 1, 4.0),
    verdict("q0", 0, 1.0),
    verdict("q1", 0, math.nan),
    verdict("q0", 1, 2.0),
]


def test_they_come_in_the_order_of_the_answers(tmp_path):
    path = write_jsonl(tmp_path / "verdicts.jsonl", [*ALL, verdict("another run's", 0, 5.0)])
    found = given_verdicts(path, RESPONSES, tmp_path / "responses.jsonl")
    assert [(v.query_id, v.sample) for v in found] == [(r.query_id, r.sample) for r in RESPONSES]
    assert [v.score for v in found][:2] == [1.0, 2.0] and math.isnan(found[2].score)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (None, r"is not there: judge the answers in .*responses\.jsonl"),
        (ALL[1:], r"no verdict on 1 of the 4 answers in .*, first on sample 1 of query 'q1'"),
        ([*ALL, ALL[0]], r"two verdicts on sample 1 of query 'q1'"),
    ],
)
def test_wrong_ones_are_refused(tmp_path, rows, sentence):
    path = tmp_path / "verdicts.jsonl"
    if rows is not None:
        write_jsonl(path, rows)
    with pytest.raises(StageError, match=sentence) as error:
        given_verdicts(path, RESPONSES, tmp_path / "responses.jsonl")
    assert str(path) in str(error.value)
