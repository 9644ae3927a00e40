"""Tones by a server that takes audio: what it is sent, what it may answer, what is kept."""

import base64
import io
import math

import numpy as np
import pytest
import soundfile

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.data.endpoint import ChatClient, Endpoint, EndpointError
from paras2s_jax.data.records import Query, Response
from paras2s_jax.judge.chain import Judge
from paras2s_jax.judge.endpoint_tone import EndpointToneCaptioner
from paras2s_jax.judge.interfaces import Score, Transcript
from paras2s_jax.judge.ledger import Ledger
from paras2s_jax.judge.tone_prompt import tone_prompt
from paras2s_jax.perf.chat_server import ChatServer, Fault

LEVELS = (0.1, 0.3, 0.5)


def level_of(body):
    """What the server hears: the level of a constant wave."""
    part = body["messages"][0]["content"][0]
    wave, rate_hz = soundfile.read(io.BytesIO(base64.b64decode(part["input_audio"]["data"])))
    assert part["type"] == "input_audio" and rate_hz == wave_lib.RATE_HZ
    return round(float(wave.max()), 2)


def captioner(server, **options):
    return EndpointToneCaptioner(ChatClient(Endpoint(server.url, "ears", **options)))


def waves():
    return [np.full(800, level, np.float32) for level in LEVELS]


def test_every_wave_is_sent_with_the_question_and_named():
    with ChatServer(
        lambda body: {0.1: "Flat.", 0.3: "warm, gentle", 0.5: "wry"}[level_of(body)]
    ) as s:
        found = dict(captioner(s).caption(waves()))
        body = s.requests[0]
    assert found == {0: "flat", 1: "warm gentle", 2: "wry"}
    assert body["messages"][0]["content"][1] == {"type": "text", "text": tone_prompt()}
    assert (body["modalities"], body["model"], body["temperature"]) == (["text"], "ears", 0.0)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("The voice sounds warm to me.", "the reply has 6 words, not one or two"),
        ({"refusal": "I cannot listen."}, "refused: I cannot listen."),
        (Fault("status", 400), "bad request: "),
        (Fault("not_json"), "broken reply: "),
    ],
)
def test_other_replies_are_failures_with_their_reason(answer, reason):
    with ChatServer(lambda body: answer) as server:
        ((_, found),) = captioner(server, max_retries=0).caption(waves()[:1])
    assert found.reason.startswith(reason)


def test_a_busy_server_is_asked_again():
    faults = [Fault("status", 429, {"retry-after-ms": "1"}), Fault("status", 500)]
    with ChatServer(lambda body: faults.pop() if faults else "calm") as server:
        assert dict(captioner(server, concurrency=1).caption(waves()[:1])) == {0: "calm"}
        assert len(server.requests) == 3


class Words:
    model_id, settings, max_dur_s = "words", {}, 2.0

    def transcribe(self, waves):
        return [Transcript("yes", -0.1) for _ in waves]


class Warm:
    name, version, settings_hash = "warm", "1", "0"

    def score(self, heard, repeat=0):
        for index, item in enumerate(heard):
            yield index, Score(4.0 if item.tone_out == "warm" else 1.0, None, None, "")


def judge(pairs, ledger, server):
    tone = captioner(server, concurrency=1, max_retries=0)
    return Judge(Words(), {}, tone, Warm(), ledger, progress=False).judge(pairs, use_labels=True)


def test_what_was_paid_for_is_kept_when_the_server_goes(tmp_path):
    query = Query("q", "s", "emotion", "hi", "sad", "glad", "t", "test", "v", "q.wav", 0.1)
    pairs = []
    for number, level in enumerate((0.05, *LEVELS)):
        path = tmp_path / f"{number}.wav"
        wave_lib.save(path, np.full(1600, level, np.float32), wave_lib.RATE_HZ)
        pairs.append((query, tmp_path / "0.wav", Response("q", "s", number, "", path.name), path))
    pairs, asked = pairs[1:], []

    def dies(body):
        asked.append(level_of(body))
        return "warm" if len(asked) < 3 else Fault("status", 401)

    ledger = Ledger(tmp_path / "ledger.sqlite")
    with ChatServer(dies) as server, pytest.raises(EndpointError, match="refuses the key"):
        judge(pairs, ledger, server)
    with ChatServer(lambda body: "warm") as server:
        found = judge(pairs, ledger, server)
        assert len(server.requests) == 1  # Two of the three were paid for and kept.
        assert judge(pairs, ledger, server) == found and len(server.requests) == 1
    assert [(v.score, v.tone_out) for v in found] == [(4.0, "warm")] * 3


def test_a_failure_is_seen_and_asked_for_again(tmp_path):
    query = Query("q", "s", "emotion", "hi", "sad", "glad", "t", "test", "v", "q.wav", 0.1)
    path = tmp_path / "a.wav"
    wave_lib.save(path, np.full(1600, 0.3, np.float32), wave_lib.RATE_HZ)
    pairs, ledger = (
        [(query, path, Response("q", "s", 0, "", "a.wav"), path)],
        Ledger(tmp_path / "l"),
    )
    with ChatServer(lambda body: Fault("status", 400)) as server:
        (verdict,) = judge(pairs, ledger, server)
    assert math.isnan(verdict.score) and verdict.status.startswith("tone: bad request")
    with ChatServer(lambda body: "warm") as server:
        (verdict,) = judge(pairs, ledger, server)
    assert verdict.score == 4.0


def test_an_unknown_prompt_version_is_named():
    with pytest.raises(FileNotFoundError, match=r"no tone prompt version 'x' .* there are 1"):
        tone_prompt("x")
