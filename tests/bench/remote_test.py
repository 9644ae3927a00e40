import base64
import dataclasses
import io

import numpy as np
import pytest
import soundfile

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.audio.synth import Delivery
from paras2s_jax.bench import remote
from paras2s_jax.bench.remote import ChatSystem, PipelineSystem
from paras2s_jax.data import endpoint
from paras2s_jax.data.endpoint import ChatClient, Endpoint
from paras2s_jax.data.records import Response, read_jsonl
from paras2s_jax.perf.chat_server import ChatServer, Fault, audio_message


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    import openai._base_client as base

    monkeypatch.setattr(base, "INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr(base, "MAX_RETRY_DELAY", 0.001)
    monkeypatch.setattr(endpoint, "wait_exponential_jitter", lambda **_: lambda state: 0.001)


def wav_bytes(dur_s=0.2, rate_hz=24_000):
    out = io.BytesIO()
    t = np.arange(round(dur_s * rate_hz)) / rate_hz
    soundfile.write(out, 0.1 * np.sin(2 * np.pi * 220 * t), rate_hz, format="WAV")
    return out.getvalue()


def heard(body):
    """The wave in a request: float[L]."""
    data = body["messages"][-1]["content"][0]["input_audio"]["data"]
    return soundfile.read(io.BytesIO(base64.b64decode(data)))[0]


def client(server, **fields):
    return ChatClient(Endpoint(server.url, "gpt-audio", **({"max_retries": 1} | fields)))


def test_answers_are_wavs_at_16_khz_with_their_words(asked, tmp_path):
    queries, root = asked
    with ChatServer(lambda body: audio_message(wav_bytes(), "hello")) as server:
        found = ChatSystem("gpt", client(server)).respond(queries, root, tmp_path / "gpt")
        request = server.requests[0]
    assert [row.query_id for row in found] == [query.id for query in queries]
    assert all(row.text == "hello" and row.dur_s == pytest.approx(0.2) for row in found)
    assert len(wave_lib.load(tmp_path / "gpt" / found[0].wav)) == 3200
    assert request["modalities"] == ["text", "audio"] and request["audio"]["format"] == "wav"


def test_the_server_hears_the_query(asked, tmp_path):
    queries, root = asked
    seen = []
    with ChatServer(lambda body: seen.append(heard(body)) or audio_message(wav_bytes(), "")) as s:
        ChatSystem("gpt", client(s)).respond(queries[:1], root, tmp_path / "gpt")
    np.testing.assert_allclose(seen[0], wave_lib.load(root / queries[0].wav), atol=1e-4)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Fault("status", 500), "server error"),
        (Fault("truncated"), "broken reply"),
        ({"refusal": "I cannot talk about that."}, "refused: I cannot talk"),
        ("Only words.", "no audio, only the words 'Only words.'"),
        (audio_message(b"", ""), "no audio"),
        (audio_message(wav_bytes(0.0), ""), "contains no samples"),
        (audio_message(b"RIFFnonsense", ""), "not readable as audio"),
    ],
)
def test_what_is_no_answer_is_noted_and_asked_again(asked, tmp_path, answer, error):
    queries, root = asked
    answers = [answer, answer]  # One retry.
    good = audio_message(wav_bytes(), "hello")
    with ChatServer(lambda body: answers.pop() if answers else good) as server:
        system = ChatSystem("gpt", client(server, concurrency=1, max_retries=1))
        first = system.respond(queries, root, tmp_path / "gpt")
        answers.clear()
        failed = [row for row in first if row.error]
        assert failed and error in failed[0].error and failed[0].wav == ""
        asked_before = len(server.requests)
        second = system.respond(queries, root, tmp_path / "gpt")
        assert len(server.requests) - asked_before == len(failed)
    assert not any(row.error for row in second)
    assert [row for row in second if row in first] == [row for row in first if not row.error]
    assert not any(row.error for row in read_jsonl(tmp_path / "gpt" / "responses.jsonl", Response))


def test_another_voice_or_prompt_starts_anew(asked, tmp_path):
    queries, root = asked
    with ChatServer(lambda body: audio_message(wav_bytes(), "x")) as server:
        system = ChatSystem("gpt", client(server))
        system.respond(queries, root, tmp_path)
        system.respond(queries, root, tmp_path)
        assert len(server.requests) == len(queries)
        dataclasses.replace(system, voice="ash").respond(queries, root, tmp_path)
        assert len(server.requests) == 2 * len(queries)


class Tones:
    """A synthesizer of tones; "…" is what it cannot say."""

    name, rate_hz = "tones", 16_000

    def __init__(self):
        self.spoken = []

    def speak(self, text, delivery):
        if text == "…":
            raise wave_lib.AudioError("nothing to say")
        self.spoken.append((text, delivery.voice))
        return np.full(1600, 0.1, np.float32)


def pipeline(server, **fields):
    return PipelineSystem(
        name="pipe",
        client=client(server),
        hear=lambda queries, waves: [query.text.lower() for query in queries],
        hearer="echo-1",
        synthesizer=Tones(),
        delivery=lambda query: Delivery(f"voice-{query.style}", 170, 50, 50, 100),
        **fields,
    )


def test_the_pipeline_reads_words_alone(asked, tmp_path):
    queries, root = asked
    with ChatServer(lambda body: body["messages"][1]["content"].upper()) as server:
        system = pipeline(server)
        found = system.respond(queries, root, tmp_path)
        prompts = {request["messages"][0]["content"] for request in server.requests}
    assert [row.text for row in found] == [query.text.upper() for query in queries]
    # Nothing that the LLM reads depends on the style.
    assert prompts == {remote.ASSISTANT}
    assert len(system.synthesizer.spoken) == len(queries)


def test_the_informed_pipeline_knows_the_style(asked, tmp_path):
    queries, root = asked
    with ChatServer(lambda body: "fine") as server:
        pipeline(server, informed=True).respond(queries, root, tmp_path)
        prompts = [request["messages"][0]["content"] for request in server.requests]
    assert {style for style in ("sad", "surprised", "child") if any(style in p for p in prompts)}
    assert all(any(query.style in prompt for prompt in prompts) for query in queries)


@pytest.mark.parametrize(
    ("reply", "error"),
    [("", "no words"), ("…", "nothing to say"), (Fault("status", 503), "server error")],
)
def test_the_pipeline_notes_what_it_cannot_say(asked, tmp_path, reply, error):
    queries, root = asked
    with ChatServer(lambda body: reply) as server:
        found = pipeline(server).respond(queries[:2], root, tmp_path)
    assert all(error in row.error for row in found)
