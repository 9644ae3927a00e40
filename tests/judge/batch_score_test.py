import http.server
import json
import threading

import pytest

from paras2s_jax.data.endpoint import ChatClient, Endpoint, EndpointError
from paras2s_jax.judge import batch_score
from paras2s_jax.judge.endpoint_score import EndpointScorer
from paras2s_jax.judge.interfaces import Heard
from paras2s_jax.judge.ledger import Ledger
from paras2s_jax.judge.score_prompt import ScorePrompt
from paras2s_jax.judge.stored_scores import StoredScores
from paras2s_jax.perf.chat_server import completion


class BatchServer:
    """Speaks /v1/files and /v1/batches; a batch is answered once `finish` has been called."""

    def __init__(self, answer):
        self.answer, self.files, self.batches = answer, {}, {}
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_POST(self):
                data = self.rfile.read(int(self.headers["content-length"]))
                if self.path == "/v1/files":
                    lines = [line for line in data.splitlines() if line.startswith(b"{")]
                    name = f"file-{len(outer.files)}"
                    outer.files[name] = b"\n".join(lines)
                    self._send({"id": name, "object": "file", "purpose": "batch"})
                elif self.path == "/v1/batches":
                    name, asked = f"batch-{len(outer.batches)}", json.loads(data)
                    outer.batches[name] = {"id": name, "object": "batch", "status": "in_progress"}
                    outer.batches[name] |= {"endpoint": asked["endpoint"], **asked}
                    self._send(outer.batches[name])

            def do_GET(self):
                *_, last = self.path.split("/")
                if last == "content":
                    self._send_bytes(outer.files[self.path.split("/")[-2]])
                else:
                    self._send(outer.batches[last])

            def _send(self, value):
                self._send_bytes(json.dumps(value).encode())

            def _send_bytes(self, data):
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def finish(self, status="completed"):
        for name, batch in self.batches.items():
            if batch["status"] == "in_progress":
                rows = [
                    json.loads(line) for line in self.files[batch["input_file_id"]].split(b"\n")
                ]
                found = [self.answer(row) for row in rows]
                lines = [json.dumps(row) for row in found if row is not None]
                self.files[f"out-{name}"] = "\n".join(lines).encode()
                batch |= {"status": status, "output_file_id": f"out-{name}"}

    def close(self):
        self._server.shutdown()
        self._server.server_close()


def good(row, text='{"reason": "ok", "score": 4}'):
    response = {"status_code": 200, "body": completion(text)}
    return {"custom_id": row["custom_id"], "response": response, "error": None}


def mixed(row):
    """Of four answers: a score, prose, an error, nothing."""
    words = json.loads(row["body"]["messages"][1]["content"].splitlines()[2])["answer_words"]
    if words == "a1":
        return good(row, "A solid four.")
    if words == "a2":
        response = {"status_code": 400, "body": {"error": {"message": "too long"}}}
        return {"custom_id": row["custom_id"], "response": response, "error": None}
    return None if words == "a3" else good(row)


@pytest.fixture
def made(tmp_path):
    server = BatchServer(mixed)
    client = ChatClient(Endpoint(server.url, "gpt-x"))
    scorer = EndpointScorer(client, ScorePrompt.load())
    ledger = Ledger(tmp_path / "ledger.sqlite")
    heard = [Heard("emotion", "q", "sad", f"a{n}", "gentle") for n in range(4)]
    yield server, client, scorer, ledger, StoredScores(scorer, ledger, progress=False), heard
    server.close()
    ledger.close()


def test_write_submit_collect(made, tmp_path):
    server, client, scorer, ledger, scores, heard = made
    folder = tmp_path / "batch"
    (path,) = batch_score.write(folder, scorer, scores.pending(heard))
    request = json.loads(path.read_text().splitlines()[0])
    assert request["url"] == "/v1/chat/completions" and request["body"]["model"] == "gpt-x"
    assert batch_score.collect(folder, client, ledger).waiting == (f"{path.name} (not submitted)",)
    assert batch_score.submit(folder, client) == ["batch-0"]
    assert batch_score.submit(folder, client) == []  # Not paid twice.
    assert batch_score.collect(folder, client, ledger).waiting == (f"{path.name} (in_progress)",)
    with pytest.raises(EndpointError, match="submit and collect it first"):
        batch_score.write(folder, scorer, scores.pending(heard))
    server.finish()
    found = batch_score.collect(folder, client, ledger)
    assert (found.num_scores, found.waiting) == (1, ())
    assert sorted(reason.split(":")[0] for reason in found.failures.values()) == [
        "bad request",
        "not answered; the batch is completed",
        "the reply is not the JSON asked for (Invalid JSON",
    ]
    # What failed is pending still; what was scored is not asked for again.
    assert {pending.item for pending in scores.pending(heard).values()} == set(heard[1:])
    assert not list(folder.iterdir())


def test_an_expired_batch_keeps_what_it_answered(made, tmp_path):
    server, client, scorer, ledger, scores, heard = made
    batch_score.write(tmp_path / "batch", scorer, scores.pending(heard))
    batch_score.submit(tmp_path / "batch", client)
    server.finish("expired")
    found = batch_score.collect(tmp_path / "batch", client, ledger)
    assert found.num_scores == 1
    assert "not answered; the batch is expired" in found.failures.values()


def test_many_requests_go_into_several_files(made, tmp_path, monkeypatch):
    _, client, scorer, _, scores, heard = made
    monkeypatch.setattr(batch_score, "MAX_REQUESTS", 3)
    files = batch_score.write(tmp_path / "batch", scorer, scores.pending(heard))
    assert [len(path.read_text().splitlines()) for path in files] == [3, 1]
    assert len(batch_score.submit(tmp_path / "batch", client)) == 2


def test_a_stop_between_upload_and_batch_is_not_paid_twice(made, tmp_path, monkeypatch):
    _, client, scorer, _, scores, heard = made
    (path,) = batch_score.write(tmp_path / "batch", scorer, scores.pending(heard))

    def stopped(**_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(client.api.batches, "create", stopped)
        batch_score.submit(tmp_path / "batch", client)
    with pytest.raises(EndpointError, match=f"metadata name {path.name}"):
        batch_score.submit(tmp_path / "batch", client)
