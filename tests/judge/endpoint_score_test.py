import json

import pytest

from paras2s_jax.data import endpoint
from paras2s_jax.data.endpoint import ChatClient, Endpoint, EndpointError
from paras2s_jax.judge.endpoint_score import EndpointScorer
from paras2s_jax.judge.interfaces import Failure, Heard
from paras2s_jax.judge.score_prompt import SCHEMA, ScorePrompt
from paras2s_jax.perf.chat_server import ChatServer, Fault


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    import openai._base_client as base

    monkeypatch.setattr(base, "INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr(base, "MAX_RETRY_DELAY", 0.001)
    monkeypatch.setattr(endpoint, "wait_exponential_jitter", lambda **_: lambda state: 0.001)


def heard(answer="So sorry."):
    return Heard("emotion", "My dog died.", "sad", answer, "gentle")


def scorer(server, *, concurrency=4, max_retries=1, **options):
    client = ChatClient(
        Endpoint(server.url, "gpt-x", concurrency=concurrency, max_retries=max_retries)
    )
    return EndpointScorer(client, ScorePrompt.load(), **options)


def by_length(body):
    """A score that the test can work out: the length of the answer's words."""
    data = body["messages"][1]["content"].splitlines()[2]
    return json.dumps({"reason": "ok", "score": len(json.loads(data)["answer_words"])})


def test_scores_come_back_to_their_items():
    items = [heard("x" * n) for n in (3, 1, 5, 2)]
    with ChatServer(by_length) as server:
        found = dict(scorer(server).score(items))
    assert [found[i].score for i in range(4)] == [3.0, 1.0, 5.0, 2.0]
    assert found[0].raw == {"reply": '{"reason": "ok", "score": 3}', "tokens": [1000, 100]}


def test_the_request_asks_for_the_schema_and_a_seed_per_repeat():
    with ChatServer(by_length) as server:
        list(scorer(server, temperature=0.7).score([heard("abc")], repeat=2))
        (request,) = server.requests
    assert request["model"] == "gpt-x" and request["seed"] == 2 and request["temperature"] == 0.7
    assert request["response_format"] == {"type": "json_schema", "json_schema": SCHEMA}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("I would say a solid 4.", "not the JSON asked for"),
        ({"refusal": "I cannot rate this."}, "refused: I cannot rate this."),
        (Fault("status", 500), "server error"),
        (Fault("truncated"), "broken reply"),
        (Fault("status", 400), "bad request"),
    ],
)
def test_what_is_no_score_is_a_failure(answer, reason):
    with ChatServer(lambda body: answer) as server:
        ((_, found),) = scorer(server).score([heard()])
    assert isinstance(found, Failure) and reason in found.reason


def test_a_failure_leaves_the_others_alone():
    def answer(body):
        return "prose" if "zz" in body["messages"][1]["content"] else by_length(body)

    with ChatServer(answer) as server:
        found = dict(scorer(server).score([heard("abc"), heard("zz"), heard("ab")]))
    assert isinstance(found[1], Failure)
    assert [found[i].score for i in (0, 2)] == [3.0, 2.0]


def test_a_wrong_key_stops_the_run():
    with (
        ChatServer(lambda body: Fault("status", 401)) as server,
        pytest.raises(EndpointError, match="refuses the key"),
    ):
        list(scorer(server).score([heard()]))


def test_names_and_hash_follow_what_changes_a_score():
    with ChatServer(by_length) as one, ChatServer(by_length) as other:
        first = scorer(one)
        assert (first.name, first.version) == ("gpt-x", "prompt1")
        assert first.settings_hash == scorer(other).settings_hash
        assert first.settings_hash != scorer(one, temperature=1.0).settings_hash
        assert first.settings_hash != scorer(one, response_format="none").settings_hash
        with pytest.raises(ValueError, match="choose one of"):
            scorer(one, response_format="xml")
