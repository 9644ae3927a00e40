"""Comparisons of two answers by a server: what it reads, what it may reply, what is kept."""

import json

import pytest

from paras2s_jax.data.endpoint import ChatClient, Endpoint
from paras2s_jax.judge.duel import Duel, EndpointComparer, parse_winner
from paras2s_jax.judge.interfaces import Failure, Heard
from paras2s_jax.judge.ledger import Ledger
from paras2s_jax.judge.score_prompt import ScorePrompt
from paras2s_jax.judge.stored_scores import StoredScores
from paras2s_jax.perf.chat_server import ChatServer


def heard(words, tone="gentle"):
    return Heard("emotion", "My dog died.", "sad", words, tone)


def prefers_longer(body):
    data = json.loads(body["messages"][1]["content"].splitlines()[2])
    assert set(data) == {"query_words", "query_style", "first", "second"}
    lens = [len(data[name]["answer_words"]) for name in ("first", "second")]
    winner = "tie" if lens[0] == lens[1] else "first" if lens[0] > lens[1] else "second"
    return json.dumps({"reason": "longer", "winner": winner})


def test_outcomes_follow_the_order_and_are_kept(tmp_path):
    short, long = heard("So sorry."), heard("I am so sorry to hear that.")
    duels = [Duel(short, long), Duel(long, short), Duel(short, short)]
    with ChatServer(prefers_longer) as server, Ledger(tmp_path / "ledger.sqlite") as ledger:
        comparer = EndpointComparer(ChatClient(Endpoint(server.url, "m")), ScorePrompt.load())
        found = StoredScores(comparer, ledger, progress=False).get(duels)
        assert [found[duel].score for duel in duels] == [0.0, 1.0, 0.5]
        assert StoredScores(comparer, ledger, progress=False).get(duels) == found
        assert len(server.requests) == 3
        system = server.requests[0]["messages"][0]["content"]
    assert "You compare how well two voice assistants" in system
    assert ScorePrompt.load().rubrics["emotion"] in system


@pytest.mark.parametrize(
    "reply", ["first", '{"winner": "first"}', '{"reason": "", "winner": "A"}', "", "[]"]
)
def test_anything_but_the_json_asked_for_is_a_failure(reply):
    found = parse_winner(reply)
    assert isinstance(found, Failure) and found.reason.startswith("the reply is not the JSON")


def test_a_block_of_code_is_taken_off():
    assert parse_winner('```json\n{"reason": "", "winner": "tie"}\n```').score == 0.5
