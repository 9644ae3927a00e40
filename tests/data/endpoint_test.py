import dataclasses

import pytest

from paras2s_jax.data import endpoint
from paras2s_jax.data.endpoint import CallFailure, ChatClient, Endpoint, EndpointError, Reply
from paras2s_jax.perf.chat_server import ChatServer, Fault, audio_message

BODY = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    """Waits between attempts say nothing here and would take seconds."""
    import openai._base_client as base

    monkeypatch.setattr(base, "INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr(base, "MAX_RETRY_DELAY", 0.001)
    monkeypatch.setattr(endpoint, "wait_exponential_jitter", lambda **_: lambda state: 0.001)


def client(server, **fields):
    settings = {"base_url": server.url, "model": "m", "timeout_s": 5.0, "max_retries": 2}
    return ChatClient(Endpoint(**(settings | fields)))


def after(*faults, then="fine"):
    """Gives out the faults one by one, then only `then`."""
    left = list(faults)
    return lambda body: left.pop(0) if left else then


def test_a_reply_with_its_usage_and_price():
    with ChatServer(lambda body: body["messages"][0]["content"].upper()) as server:
        found = client(server, usd_per_million_in=2.0, usd_per_million_out=10.0)
        reply = found.chat(BODY)
        assert isinstance(reply, Reply) and reply.text == "HELLO"
        assert (reply.tokens_in, reply.tokens_out, reply.finish_reason) == (1000, 100, "stop")
        # 1000 tokens at 2 $ a million, 100 at 10 $ a million.
        assert found.usd == pytest.approx(0.003)
        assert found.calls == 1 and server.requests[0]["model"] == "m"


def test_audio_comes_as_bytes_and_stays_out_of_the_raw_reply():
    with ChatServer(lambda body: audio_message(b"RIFFdata", "hello there")) as server:
        reply = client(server).chat(BODY)
    assert (reply.audio, reply.text) == (b"RIFFdata", "hello there")
    assert reply.raw["choices"][0]["message"]["audio"]["data"] == "<8 bytes>"


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", 500),
        Fault("status", 429, {"retry-after-ms": "1"}),
        Fault("close"),
        Fault("truncated"),
        Fault("not_json"),
    ],
    ids=lambda fault: f"{fault.kind}{fault.value or ''}",
)
def test_passing_faults_are_retried(fault):
    with ChatServer(after(fault, fault)) as server:
        assert client(server).chat(BODY).text == "fine"
        assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault("status", 503), "server error"),
        (Fault("status", 429, {"retry-after-ms": "1"}), "rate limit"),
        (Fault("close"), "connection"),
        (Fault("truncated"), "broken reply"),
    ],
)
def test_lasting_faults_are_failures(fault, kind):
    with ChatServer(lambda body: fault) as server:
        found = client(server).chat(BODY)
        assert isinstance(found, CallFailure) and found.kind == kind
        assert len(server.requests) == 3


def test_a_hanging_server_times_out():
    with ChatServer(lambda body: Fault("hang", 1.0)) as server:
        found = client(server, timeout_s=0.1, max_retries=0).chat(BODY)
    assert found.kind == "timeout" and found.paid


def test_a_request_that_the_server_refuses_is_not_repeated():
    with ChatServer(lambda body: Fault("status", 400)) as server:
        assert client(server).chat(BODY).kind == "bad request"
        assert len(server.requests) == 1


def test_a_wrong_key_or_model_stops_without_showing_the_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with ChatServer(lambda body: Fault("status", 401)) as server:
        with pytest.raises(EndpointError, match=r"refuses the key in \$OPENAI_API_KEY") as error:
            client(server).chat(BODY)
        assert "sk-secret" not in str(error.value)
        assert server.requests[0]["headers"]["authorization"] == "Bearer sk-secret"
    with (
        ChatServer(lambda body: Fault("status", 404)) as server,
        pytest.raises(EndpointError, match="knows no model 'm'"),
    ):
        client(server).chat(BODY)


def test_a_server_elsewhere_needs_a_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(EndpointError, match=r"set \$OPENAI_API_KEY"):
        ChatClient(Endpoint("https://api.openai.com/v1", "m"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_url": "ftp://x"}, "is no http"),
        ({"base_url": "https://me:secret@x/v1"}, "holds a password"),
        ({"model": ""}, "no model named"),
        ({"concurrency": 0}, "at least 1"),
        ({"usd_cap": 1.0}, "usd_cap needs"),
    ],
)
def test_impossible_endpoints_are_refused(fields, message):
    with pytest.raises(EndpointError, match=message) as error:
        Endpoint(**({"base_url": "http://localhost/v1", "model": "m"} | fields))
    assert "secret" not in str(error.value)


def test_many_calls_come_back_with_their_index():
    bodies = [{"messages": [{"role": "user", "content": str(n)}]} for n in range(20)]
    with ChatServer(lambda body: body["messages"][0]["content"]) as server:
        found = dict(client(server, concurrency=4).chat_many(bodies))
    assert {index: reply.text for index, reply in found.items()} == {n: str(n) for n in range(20)}


def test_the_budget_ends_further_calls():
    with ChatServer(lambda body: "x") as server:
        # Each call costs 0.001 $: after two, nothing starts any more.
        found = client(server, usd_per_million_in=1.0, usd_cap=0.002, concurrency=1)
        results = [result for _, result in found.chat_many([BODY] * 5)]
        assert [isinstance(result, Reply) for result in results] == [True, True, *[False] * 3]
        assert results[-1].kind == "spend cap" and len(server.requests) == 2


def test_a_server_that_is_gone_stops_the_run_after_some_calls():
    with ChatServer(after(*[f"{n}" for n in range(3)], then=Fault("close"))) as server:
        got = []
        with pytest.raises(EndpointError, match="16 times in a row"):
            for _, result in client(server, max_retries=0, concurrency=1).chat_many([BODY] * 50):
                got.append(result)
        assert sum(isinstance(result, Reply) for result in got) == 3
        assert len(got) == 3 + endpoint.GIVE_UP_AFTER


def test_calls_are_paced(monkeypatch):
    waits, clock = [], [100.0]
    monkeypatch.setattr(endpoint.time, "sleep", waits.append)
    monkeypatch.setattr(endpoint.time, "monotonic", lambda: clock[0])
    paced = ChatClient(Endpoint("http://localhost/v1", "m", requests_per_minute=120.0))
    for _ in range(3):
        paced._pace.wait()
    # Two a second: at once, after 0.5 s, after 1 s.
    assert waits == [0.0, 0.5, 1.0]


def test_settings_never_hold_the_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    assert "sk-secret" not in str(dataclasses.asdict(Endpoint("http://localhost/v1", "m")))
