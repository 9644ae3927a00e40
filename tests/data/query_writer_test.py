import hashlib
import json

import pytest

from paras2s_jax.data import query_writer
from paras2s_jax.data.endpoint import ChatClient, Endpoint, EndpointError
from paras2s_jax.data.query_writer import Candidate, likest, write_sentences
from paras2s_jax.data.records import read_jsonl
from paras2s_jax.perf.chat_server import ChatServer, Fault

STYLES = ("sad", "surprised")


class Writer:
    """Proposes numbered sentences; judges them by marks in their words."""

    def __init__(self):
        self.rounds = 0

    def __call__(self, body):
        prompt = body["messages"][0]["content"]
        if prompt.startswith("You write test sentences"):
            self.rounds += 1
            return self.propose()
        text = json.loads(prompt.split("DATA ")[1].splitlines()[1])
        if "gives it away" in prompt or "give it away" in prompt:
            return json.dumps({"reason": "it shows", "answer": "leaky" in text})
        if "both\nare natural" in prompt or "both are natural" in prompt:
            return json.dumps({"reason": "odd", "answer": "odd" not in text})
        return "maybe" if "vague" in text else json.dumps({"reason": "same", "answer": True})

    def propose(self):
        # Other words in every round, or the likeness test would find twins.
        words = [
            hashlib.sha256(f"{self.rounds}{mark}".encode()).hexdigest()[:8] for mark in "pqrst"
        ]
        one, two, three, four, five = words
        word = one
        texts = [
            f"My {one} {two} came back {three} {four} {five}.",
            f"A leaky {two} {three} {one} is {five}.",
            f"They showed odd {three} to {four} {two} {five}.",
            f"Something vague {four} reached {one} {five} {two}.",
            "I just bumped into my ex.",
        ]
        keys = {f"answer_to_{style}": "Be kind." for style in STYLES}
        return json.dumps({"sentences": [{"text": t, "topic": word} | keys for t in texts]})


def client(server):
    return ChatClient(Endpoint(server.url, "m", max_retries=0))


def ask(server, folder, num=3, **fields):
    known = ["I just bumped into my ex!"]
    return write_sentences(client(server), "emotion", STYLES, num, folder, known=known, **fields)


def test_filters_keep_what_passes_and_say_why_the_rest_does_not(tmp_path):
    with ChatServer(Writer()) as server:
        found = ask(server, tmp_path)
    assert len(found) == 3 and all("came back" in sentence.text for sentence in found)
    assert found[0].id == "emotion-new-0000" and found[0].contrast("sad") == "surprised"
    assert found[0].requirement == {"sad": "Be kind.", "surprised": "Be kind."}
    status = {
        row.text.split()[1] if row.text[0] in "A" else row.text.split()[0]: row.status
        for row in read_jsonl(tmp_path / "candidates.jsonl", Candidate)
    }
    assert status["leaky"] == "neutrality: it shows"
    assert status["They"] == "plausibility: odd"
    assert status["Something"].startswith("relevance: no yes or no in the reply 'maybe'")
    assert status["I"].startswith("duplicate: 100 % like")


def test_a_stopped_run_goes_on_with_what_it_has(tmp_path):
    with ChatServer(Writer()) as server:
        first = ask(server, tmp_path, 2)
        asked = len(server.requests)
        assert ask(server, tmp_path, 2) == first
        assert len(server.requests) == asked
        assert ask(server, tmp_path, 4)[:2] == first


def test_a_model_without_ideas_stops_with_the_reason(tmp_path):
    with (
        ChatServer(lambda body: "I would rather not.") as server,
        pytest.raises(EndpointError, match="no usable sentence for emotion 3 times"),
    ):
        ask(server, tmp_path)


def test_a_server_that_fails_is_an_error_not_an_empty_list(tmp_path):
    with (
        ChatServer(lambda body: Fault("status", 500)) as server,
        pytest.raises(EndpointError, match="no proposals: server error"),
    ):
        ask(server, tmp_path)


def test_a_sentence_nobody_judged_is_neither_kept_nor_rejected(tmp_path):
    writer, failed = Writer(), []

    def flaky(body):
        found = writer(body)
        if writer.rounds == 1 and "came back" in str(body) and not failed:
            failed.append(body)
            return Fault("status", 500)
        return found

    with ChatServer(flaky) as server:
        assert len(ask(server, tmp_path, 1)) == 1
    rows = read_jsonl(tmp_path / "candidates.jsonl", Candidate)
    # The first round's good sentence met the fault: the one that is kept is the second round's.
    assert failed and writer.rounds == 2
    assert sum("came back" in row.text for row in rows) == 1
    assert not any("server error" in row.status for row in rows)


def test_the_spend_cap_stops_and_keeps(tmp_path):
    # A call costs 1000 * 1 + 100 * 0 = $0.001: two proposals and some filters.
    with ChatServer(Writer()) as server:
        endpoint = Endpoint(server.url, "m", usd_per_million_in=1.0, usd_cap=0.02)
        with pytest.raises(EndpointError, match=r"\$0.02 of \$0.02 are spent; raise usd_cap"):
            write_sentences(ChatClient(endpoint), "emotion", STYLES, 50, tmp_path, known=[])
    kept = [r for r in read_jsonl(tmp_path / "candidates.jsonl", Candidate) if r.status == "kept"]
    assert kept


def test_the_estimate_by_hand():
    # 20 proposed in 2 rounds of 10, each asked about three times.
    found = query_writer.expected(10, 0.5)
    assert found.calls == 2 + 20 * 3
    assert found.tokens_out == 20 * 80 + 60 * 40
    assert 2000 < found.tokens_in < 10_000
    # Of the last round, too, all are asked about.
    assert query_writer.expected(3, 0.5).calls == 1 + 10 * 3


def test_likeness_ignores_the_order_of_words_and_marks():
    assert likest("My ex, I just bumped into!", ["i just bumped into my ex"]) == 100.0
    assert likest("The bus is late.", ["i just bumped into my ex"]) < query_writer.MAX_LIKENESS
    assert likest("anything", []) == 0.0


def test_every_dimension_has_words_for_the_prompts():
    from paras2s_jax.data.records import DIMENSIONS

    assert set(query_writer.ABOUT) == set(DIMENSIONS)
    for name in ("propose", *query_writer.FILTERS):
        assert "{style_a}" in query_writer._prompt(name)
