"""Comparisons of two answers by a server: what it reads, what it may reply, what is kept."""

import json

import numpy as np
import pytest

from paras2s_jax.data.endpoint import ChatClient, Endpoint
from paras2s_jax.judge.duel import (
    REPLY_START,
    SHARES,
    Duel,
    DuelPrompt,
    EndpointComparer,
    LocalComparer,
    parse_winner,
)
from paras2s_jax.judge.interfaces import Failure, Heard
from paras2s_jax.judge.ledger import Ledger
from paras2s_jax.judge.score_prompt import ScorePrompt
from paras2s_jax.judge.stored_scores import StoredScores
from paras2s_jax.perf.chat_server import ChatServer

PROMPT = DuelPrompt.load("1", ScorePrompt.load())


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
        comparer = EndpointComparer(ChatClient(Endpoint(server.url, "m")), PROMPT)
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


def test_a_model_of_ours_names_the_likeliest_winner(model, tokenizer):
    short, long = heard("So sorry."), heard("I am so sorry to hear that.")
    duels = [Duel(short, long), Duel(long, short)]
    comparer = LocalComparer(*model, tokenizer, PROMPT, name="small", batch_size=1)
    found = dict(comparer.score(duels))
    lm, params = model
    for index, duel in enumerate(duels):
        text = tokenizer.apply_chat_template(
            PROMPT.messages(duel), tokenize=False, add_generation_prompt=True
        )
        ids = np.array([tokenizer.encode(text + REPLY_START, add_special_tokens=False)], np.int32)
        logits = np.asarray(lm.apply({"params": params}, ids)[0][0, -1])
        # Byte-level: each begins with its first letter.
        best = max(SHARES, key=lambda name: logits[tokenizer.convert_tokens_to_ids(name[0])])
        assert found[index].score == SHARES[best]
        assert sum(found[index].raw.values()) == pytest.approx(1.0, abs=1e-3)


def test_an_unknown_version_is_named():
    with pytest.raises(FileNotFoundError, match=r"no duel prompt version 'x' .* there are 1"):
        DuelPrompt.load("x", ScorePrompt.load())
