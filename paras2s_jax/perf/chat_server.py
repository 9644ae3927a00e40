"""A chat server for measures and tests: speaks /v1/chat/completions, and fails as it is told."""

import base64
import contextlib
import http.client
import http.server
import json
import sys
import threading
import time
from collections.abc import Callable

# body -> str (the reply's text) | dict (merged into the message) | Fault
Answer = Callable[[dict], object]


class Fault:
    """What goes wrong instead of a reply.

    kind: "status" (code, with headers), "hang" (seconds), "truncated", "close", "not_json".
    """

    def __init__(self, kind, value=None, headers=()):
        self.kind, self.value, self.headers = kind, value, dict(headers)


class ChatServer:
    """Counts every request in `requests`; `served` are those that got a whole reply."""

    def __init__(self, answer: Answer):
        self.answer, self.requests, self.served = answer, [], []
        self._lock = threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer._lock:
                    outer.requests.append(
                        {
                            "path": self.path,
                            "headers": {k.lower(): v for k, v in self.headers.items()},
                            **body,
                        }
                    )
                found = outer.answer(body)
                if isinstance(found, Fault):
                    self._fail(found)
                else:
                    self._send(200, json.dumps(completion(found)).encode())
                    with outer._lock:
                        outer.served.append(body)

            def _send(self, status, data, headers=(), length=None):
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(length or len(data)))
                for name, value in dict(headers).items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(data)

            def _fail(self, fault):
                if fault.kind == "status":
                    error = {"error": {"message": f"status {fault.value}", "type": "test"}}
                    self._send(fault.value, json.dumps(error).encode(), fault.headers)
                elif fault.kind == "hang":
                    time.sleep(fault.value)
                    self.close_connection = True
                elif fault.kind == "truncated":
                    whole = json.dumps(completion("cut off")).encode()
                    self._send(200, whole[: len(whole) // 2])
                elif fault.kind == "not_json":
                    self._send(200, b'{"hello": 1}')
                elif fault.kind == "close":
                    self.close_connection = True
                    self.connection.close()
                else:
                    raise ValueError(fault.kind)

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def settle(self):
        """Waits until every request made so far has its reply, or has been given up."""
        probe = http.client.HTTPConnection(*self._server.server_address)
        probe.request("GET", "/")  # Connections are accepted in turn: this one is the last.
        probe.getresponse()
        probe.close()
        while self._server.num_open:
            time.sleep(0.01)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._server.shutdown()
        self._server.server_close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    num_open = 0
    _lock = threading.Lock()

    def process_request(self, request, client_address):
        with self._lock:
            self.num_open += 1
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self.num_open -= 1

    def handle_error(self, request, client_address):
        """Clients that hang up, because they time out or are killed, are what this is for."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def completion(found) -> dict:
    """A whole reply around a text, or around a dict of the message's fields."""
    message = {"role": "assistant", "content": None, "refusal": None}
    message |= {"content": found} if isinstance(found, str) else found
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message, "logprobs": None}],
        "usage": {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100},
    }


def audio_message(wav: bytes, transcript: str) -> dict:
    """The message of a reply that speaks."""
    data = base64.b64encode(wav).decode()
    return {"audio": {"id": "a", "data": data, "expires_at": 0, "transcript": transcript}}
