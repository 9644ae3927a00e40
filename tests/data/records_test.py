"""Strict jsonl: what is written comes back, and a wrong row is named."""

import json
import math

import pytest

from paras2s_jax.data import records

QUERY = records.Query(
    id="emotion-000-sad-m1",
    sentence_id="emotion-000",
    dimension="emotion",
    text="I just bumped into my ex.",
    style="sad",
    contrast="surprised",
    topic="ex",
    split="train",
    voice="m1",
    wav="wavs/q.wav",
    dur_s=1.5,
)
VERDICT = records.Verdict(
    query_id="q",
    system="sft",
    sample=0,
    score=math.nan,
    status="transcribe: empty",
    transcript_in="",
    style_in="sad",
    style_source="label",
    transcript_out="",
    tone_out="",
    content=None,
    tone_fit=None,
    judge="rubric",
    raw={"words": ["é"]},
)


def test_round_trip(tmp_path):
    path = records.write_jsonl(tmp_path / "sub" / "q.jsonl", [QUERY, QUERY])
    assert records.read_jsonl(path, records.Query) == [QUERY, QUERY]
    assert [p.name for p in path.parent.iterdir()] == ["q.jsonl"]  # no temporary file stays


def test_nan_score_is_null(tmp_path):
    path = records.write_jsonl(tmp_path / "v.jsonl", [VERDICT])
    assert json.loads(path.read_text())["score"] is None
    (back,) = records.read_jsonl(path, records.Verdict)
    assert math.isnan(back.score)
    assert back.raw == VERDICT.raw and back.content is None


def test_defaults_may_be_left_out(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"query_id":"q","system":"s","sample":0,"text":"t","wav":"a.wav"}\n\n')
    (row,) = records.read_jsonl(path, records.Response)
    assert row.tone is None and row.finished and row.dur_s == 0.0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dur_s": "1.5"}, r"q\.jsonl:2: key 'dur_s' must be float"),
        ({"dur_s": True}, r"q\.jsonl:2: key 'dur_s' must be float"),
        ({"dur_s": None}, r"q\.jsonl:2: key 'dur_s'"),
        ({"dimension": "mood"}, r"q\.jsonl:2: key 'dimension'"),
        ({"extra": 1}, r"q\.jsonl:2: unknown key 'extra'"),
    ],
)
def test_wrong_rows_are_named(tmp_path, change, message):
    good = records.to_dict(QUERY)
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | change) + "\n")
    with pytest.raises(records.RecordError, match=message):
        records.read_jsonl(path, records.Query)


@pytest.mark.parametrize("line, message", [("{", "not valid JSON"), ("[1]", "expected a JSON obj")])
def test_malformed_lines(tmp_path, line, message):
    path = tmp_path / "q.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(records.RecordError, match=rf"q\.jsonl:1: {message}"):
        records.read_jsonl(path, records.Query)


def test_missing_key_missing_file_and_infinity(tmp_path):
    path = tmp_path / "q.jsonl"
    values = records.to_dict(QUERY)
    path.write_text(json.dumps({k: v for k, v in values.items() if k != "voice"}))
    with pytest.raises(records.RecordError, match="key 'voice' of Query is missing"):
        records.read_jsonl(path, records.Query)
    path.write_text(json.dumps(values | {"dur_s": math.inf}))
    with pytest.raises(records.RecordError, match="must be finite"):
        records.read_jsonl(path, records.Query)
    with pytest.raises(records.RecordError, match=r"none\.jsonl: no such file"):
        records.read_jsonl(tmp_path / "none.jsonl", records.Query)


def test_bad_row_leaves_the_old_file(tmp_path):
    path = records.write_jsonl(tmp_path / "v.jsonl", [VERDICT])
    before = path.read_text()
    bad = records.Response(query_id="q", system="s", sample=0.5, text="", wav="")
    with pytest.raises(records.RecordError, match="key 'sample' must be int"):
        records.write_jsonl(path, [bad])
    assert path.read_text() == before


def test_append_repairs_a_torn_line(tmp_path):
    path = tmp_path / "q.jsonl"
    records.append_jsonl(path, QUERY)
    with open(path, "a") as file:
        file.write('{"id": "torn')  # a run killed while it wrote
    assert records.read_jsonl(path, records.Query, partial_tail=True) == [QUERY]
    with pytest.raises(records.RecordError, match=":2: not valid JSON"):
        records.read_jsonl(path, records.Query)
    records.append_jsonl(path, QUERY)
    assert records.read_jsonl(path, records.Query) == [QUERY, QUERY]
