import base64
import contextlib
import http
import json
import threading
import time

import numpy as np
import pytest
from websockets.sync.server import serve

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.bench import realtime
from paras2s_jax.bench.realtime import RealtimeSystem
from paras2s_jax.data.endpoint import Endpoint, EndpointError


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(realtime, "wait_exponential_jitter", lambda **_: lambda state: 0.001)


class Server:
    """Speaks the protocol: hears a query's samples, then does what `answer(session, pcm)` says."""

    def __init__(self, answer, status=None):
        self.answer, self.sessions, self.settings, self.paths = answer, [], [], []

        def refuse(connection, request):
            self.paths.append((request.path, request.headers["Authorization"]))
            return connection.respond(http.HTTPStatus(status), "no\n") if status else None

        self._server = serve(self._session, "127.0.0.1", 0, process_request=refuse)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.socket.getsockname()[1]}/v1"

    def _session(self, socket):
        pcm = b""
        with contextlib.suppress(Exception):
            for text in socket:
                event = json.loads(text)
                if event["type"] == "session.update":
                    self.settings.append(event["session"])
                elif event["type"] == "input_audio_buffer.append":
                    pcm += base64.b64decode(event["audio"])
                elif event["type"] == "response.create":
                    self.sessions.append(np.frombuffer(pcm, "<i2"))
                    self.answer(socket, pcm)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._server.shutdown()


def send(socket, kind, **fields):
    socket.send(json.dumps({"type": kind, **fields}))


def speak(socket, pcm, *, beta=False, status="completed"):
    """Half a second of a constant, in two parts, with its words."""
    data = np.full(6000, 3277, "<i2").tobytes()
    prefix = "response.audio" if beta else "response.output_audio"
    send(socket, "session.created")
    for word in ("hello ", "there"):
        send(socket, f"{prefix}.delta", delta=base64.b64encode(data).decode())
        send(socket, f"{prefix}_transcript.delta", delta=word)
    send(socket, "response.done", response={"status": status, "status_details": {"reason": "x"}})


def system(server, **fields):
    settings = {"timeout_s": 5.0, "max_retries": 1, "concurrency": 2} | fields
    return RealtimeSystem("live", Endpoint(server.url, "gpt-realtime", **settings))


@pytest.mark.parametrize("beta", [False, True])
def test_answers_of_both_versions_of_the_protocol(asked, tmp_path, beta):
    queries, root = asked
    with Server(lambda socket, pcm: speak(socket, pcm, beta=beta)) as server:
        found = system(server).respond(queries, root, tmp_path)
    assert [row.text for row in found] == ["hello there"] * len(queries)
    assert all(row.dur_s == pytest.approx(0.5) for row in found)
    wave = wave_lib.load(tmp_path / found[0].wav)
    assert np.median(wave) == pytest.approx(0.1, abs=0.002)
    assert server.paths[0][0] == "/v1/realtime?model=gpt-realtime"
    assert server.settings[0]["audio"]["output"]["voice"] == "alloy"


def test_the_server_hears_the_whole_query_at_24_khz(asked, tmp_path, monkeypatch):
    queries, root = asked
    monkeypatch.setattr(realtime, "CHUNK_BYTES", 1000)
    with Server(speak) as server:
        system(server).respond(queries[:1], root, tmp_path)
    wave = wave_lib.load(root / queries[0].wav, 24_000)
    np.testing.assert_allclose(server.sessions[0] / 32_767, wave, atol=1e-4)


def refuses(socket, pcm):
    send(socket, "error", error={"message": "content policy"})


def says_nothing(socket, pcm):
    send(socket, "response.done", response={"status": "completed"})


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (refuses, "content policy"),
        (says_nothing, "no audio"),
        (lambda socket, pcm: speak(socket, pcm, status="failed"), "the answer is failed"),
        (lambda socket, pcm: socket.send("not json"), "broken event"),
        (lambda socket, pcm: socket.close(), "closed before the answer"),
        (lambda socket, pcm: time.sleep(1.0), "timeout: no answer in 0.2 s"),
    ],
)
def test_failures_are_noted_and_asked_again(asked, tmp_path, answer, error):
    queries, root = asked
    failing = [True]

    def sometimes(socket, pcm):
        (answer if failing[0] else speak)(socket, pcm)

    with Server(sometimes) as server:
        timeout_s = 0.2 if "timeout" in error else 5.0
        asking = system(server, timeout_s=timeout_s, max_retries=0)
        first = asking.respond(queries[:2], root, tmp_path)
        assert all(error in row.error for row in first)
        failing[0] = False
        second = system(server).respond(queries[:2], root, tmp_path)
    assert [row.error for row in second] == ["", ""]


def test_a_lost_connection_is_tried_again(asked, tmp_path):
    queries, root = asked
    lost = [lambda socket, pcm: socket.close()]

    def answer(socket, pcm):
        (lost.pop() if lost else speak)(socket, pcm)

    with Server(answer) as server:
        (found,) = system(server).respond(queries[:1], root, tmp_path)
        assert found.error == "" and len(server.sessions) == 2
        # What is there is not asked for again.
        system(server).respond(queries[:1], root, tmp_path)
        assert len(server.sessions) == 2


def test_a_wrong_key_stops_and_is_not_shown(asked, tmp_path, monkeypatch):
    queries, root = asked
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with Server(speak, status=401) as server, pytest.raises(EndpointError) as error:
        system(server).respond(queries[:1], root, tmp_path)
    assert "refuses the key" in str(error.value) and "sk-secret" not in str(error.value)
    assert server.paths[0][1] == "Bearer sk-secret"


def test_a_server_that_is_gone_stops_the_run(asked, tmp_path, monkeypatch):
    queries, root = asked
    monkeypatch.setattr(realtime, "GIVE_UP_AFTER", 3)
    with (
        Server(lambda socket, pcm: socket.close()) as server,
        pytest.raises(EndpointError, match="3 times in a row"),
    ):
        system(server, max_retries=0, concurrency=1).respond(queries, root, tmp_path)
