import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.data.records import Query, Response, Verdict

CONTRASTS = {"emotion": ("surprised", "sad"), "age": ("child", "adult")}


def make_query(sentence_id, style, *, dimension="emotion", voice="v1", topic="topic", dur_s=0.3):
    contrast = next(name for name in CONTRASTS[dimension] if name != style)
    query_id = f"{sentence_id}-{style}-{voice}"
    return Query(
        id=query_id,
        sentence_id=sentence_id,
        dimension=dimension,
        text=f"Words of {sentence_id}.",
        style=style,
        contrast=contrast,
        topic=topic,
        split="test",
        voice=voice,
        wav=f"queries/{query_id}.wav",
        dur_s=dur_s,
    )


def make_verdict(query_id, score, *, system="a", sample=0, **fields):
    verdict = Verdict(
        query_id=query_id,
        system=system,
        sample=sample,
        score=score,
        status="tone: too long" if math.isnan(score) else "ok",
        transcript_in="words",
        style_in="sad",
        style_source="analyzer",
        transcript_out="oh dear",
        tone_out="gentle",
        content=None,
        tone_fit=None,
        judge="rubric-1",
        raw={"score": {"reason": "fits"}},
    )
    return dataclasses.replace(verdict, **fields)


def tone(hz, dur_s=0.3):
    t = np.arange(round(dur_s * wave_lib.RATE_HZ)) / wave_lib.RATE_HZ
    return (0.1 * np.sin(2 * np.pi * hz * t)).astype(np.float32)


class StyleJudge:
    """Scores 4 where the answer's text names the query's style, else 2; NaN for 'broken'."""

    name = "rubric-1"

    def __init__(self):
        self.calls = []

    def describe(self):
        return {"score": {"model": self.name, "settings": {}}}

    def judge(self, pairs, *, use_labels=False):
        self.calls.append(len(pairs))
        verdicts = []
        for query, query_wav, response, wav in pairs:
            assert Path(query_wav).is_file() and Path(wav).is_file()
            score = (
                math.nan
                if response.text == "broken"
                else 2.0 + 2.0 * (query.style in response.text)
            )
            verdicts.append(
                make_verdict(
                    query.id,
                    score,
                    system=response.system,
                    sample=response.sample,
                    style_source="label" if use_labels else "analyzer",
                )
            )
        return verdicts


@pytest.fixture
def asked(tmp_path):
    """(queries, root): two sentences of two dimensions in both styles, with wavs."""
    queries = [
        make_query(f"{dimension}-{index}", style, dimension=dimension)
        for dimension, styles in CONTRASTS.items()
        for index in range(2)
        for style in styles
    ]
    for index, query in enumerate(queries):
        wave_lib.save(tmp_path / query.wav, tone(200 + 50 * index))
    return queries, tmp_path


@pytest.fixture
def recorded(asked):
    """Writes a responses.jsonl: recorded(name, text_of) -> its path."""
    queries, root = asked

    def write(name, text_of):
        from paras2s_jax.data.records import write_jsonl

        rows = []
        for query in queries:
            wav = f"{name}/{query.id}.wav"
            wave_lib.save(root / "made" / wav, tone(300))
            rows.append(Response(query.id, "writer", 0, text_of(query), wav))
        return write_jsonl(root / "made" / f"{name}.jsonl", rows)

    return write


@pytest.fixture
def make():
    """Factories for rows, as a namespace."""

    class Make:
        query = staticmethod(make_query)
        verdict = staticmethod(make_verdict)
        tone = staticmethod(tone)
        judge = StyleJudge

    return Make
