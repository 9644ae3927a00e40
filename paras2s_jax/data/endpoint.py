"""An OpenAI-compatible chat server: many calls at a time, retried, paced, within a budget.

What a call cannot do is a CallFailure, for its caller to count; what no call could do (a wrong
key, an unknown model, a server that is gone) stops with an EndpointError.
"""

import base64
import concurrent.futures
import dataclasses
import io
import json
import os
import threading
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import soundfile
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from paras2s_jax.audio import wave as wave_lib

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
# So many failures in a row, without one success between, are a server that is gone.
GIVE_UP_AFTER = 16
# Kind of the failures of calls that were not made because enough was spent.
SPEND_CAP = "spend cap"


class EndpointError(RuntimeError):
    """No call can succeed before the user changes something; the message says what."""


@dataclasses.dataclass(frozen=True)
class CallFailure:
    """A call without a usable reply. kind: one or two words; raw: what the server said, if it did.

    paid: whether the server may have charged for it.
    """

    kind: str
    message: str
    raw: Any = None
    paid: bool = False


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a chat call gave: text and, where it was asked for, audio (a file's bytes).

    raw: the whole reply as JSON, without the audio; tokens_in, tokens_out: as the server counts.
    """

    text: str
    raw: dict[str, Any]
    refusal: str | None = None
    audio: bytes | None = None
    finish_reason: str | None = None
    tokens_in: int = 0
    tokens_out: int = 0


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """How a server is reached. The key is read from the environment and never stored or shown.

    base_url: up to and with /v1. api_key_env: name of the variable with the key; a local server
    needs none. concurrency: calls at a time. requests_per_minute: 0 = no limit. max_retries: of a
    call, on timeouts, 408, 409, 429 (as long as Retry-After says) and 5xx. usd_per_million_in,
    usd_per_million_out: prices of tokens; usd_cap: no call starts once so much is spent in this
    run, 0 = none.
    """

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    requests_per_minute: float = 0.0
    timeout_s: float = 60.0
    max_retries: int = 5
    usd_per_million_in: float = 0.0
    usd_per_million_out: float = 0.0
    usd_cap: float = 0.0

    def __post_init__(self):
        parts = urllib.parse.urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EndpointError(
                f"base_url {self.base_url!r} is no http(s) address; it looks like "
                "https://api.openai.com/v1"
            )
        if parts.username or parts.password:
            raise EndpointError(
                f"base_url holds a password; put the key into ${self.api_key_env} instead"
            )
        if not self.model:
            raise EndpointError("no model named; give the name that the server knows it by")
        if self.concurrency < 1:
            raise EndpointError(f"concurrency {self.concurrency} must be at least 1")
        if self.usd_cap and not (self.usd_per_million_in or self.usd_per_million_out):
            raise EndpointError(
                "usd_cap needs usd_per_million_in and usd_per_million_out to count with"
            )

    @property
    def api_key(self) -> str:
        """Raises EndpointError where a server that is not local has none."""
        key = os.environ.get(self.api_key_env, "")
        if key or urllib.parse.urlsplit(self.base_url).hostname in LOCAL_HOSTS:
            return key or "none"
        raise EndpointError(f"set ${self.api_key_env} to the key of {self.base_url}")


class Pace:
    """Starts of calls, evenly spread; for several threads. per_minute: 0 = no limit."""

    def __init__(self, per_minute: float):
        self._gap_s = 60.0 / per_minute if per_minute else 0.0
        self._next_start, self._lock = 0.0, threading.Lock()

    def wait(self) -> None:
        """Waits until the next call may start."""
        if not self._gap_s:
            return
        with self._lock:
            start = max(time.monotonic(), self._next_start)
            self._next_start = start + self._gap_s
        time.sleep(max(0.0, start - time.monotonic()))


class ChatClient:
    """Calls of one Endpoint; may be used from several threads.

    api: the openai client, for what is not a chat call. calls, usd: attempts that reached the
    network, and what the replies cost, so far.
    """

    def __init__(self, endpoint: Endpoint):
        import openai  # Takes a second, which runs without a server need not wait.

        self.endpoint = endpoint
        self.calls, self.usd = 0, 0.0
        self._errors = openai
        self.api = openai.OpenAI(
            base_url=endpoint.base_url,
            api_key=endpoint.api_key,
            timeout=endpoint.timeout_s,
            max_retries=endpoint.max_retries,
        )
        self._lock = threading.Lock()
        self._pace = Pace(endpoint.requests_per_minute)

    def chat(self, body: Mapping[str, Any]) -> Reply | CallFailure:
        """One chat completion. body: messages and options of /v1/chat/completions, without model.

        Raises:
            EndpointError: no call could succeed.
        """
        endpoint = self.endpoint
        if endpoint.usd_cap and self.usd >= endpoint.usd_cap:
            return CallFailure(
                SPEND_CAP,
                f"${self.usd:.2f} of ${endpoint.usd_cap:.2f} are spent; raise usd_cap to go on",
            )
        self._pace.wait()
        try:
            reply = self._request(body)
        except (self._errors.OpenAIError, json.JSONDecodeError) as error:
            return self._failure(error)
        with self._lock:
            self.usd += self._price(reply)
        return reply

    def _failure(self, error: Exception) -> CallFailure:
        """Raises EndpointError where the next call would fail like this one."""
        endpoint, errors = self.endpoint, self._errors
        if isinstance(error, (errors.AuthenticationError, errors.PermissionDeniedError)):
            raise EndpointError(
                f"{endpoint.base_url} refuses the key in ${endpoint.api_key_env} "
                f"(status {error.status_code})"
            ) from None
        if isinstance(error, errors.NotFoundError):
            raise EndpointError(
                f"{endpoint.base_url} knows no model {endpoint.model!r} ({_short(error)})"
            ) from None
        if isinstance(error, errors.APITimeoutError):
            message = f"no reply in {endpoint.timeout_s:g} s, {endpoint.max_retries + 1} times"
            return CallFailure("timeout", message, paid=True)
        kinds = (
            (errors.APIConnectionError, "connection"),
            (errors.RateLimitError, "rate limit"),
            (errors.InternalServerError, "server error"),
            (errors.APIStatusError, "bad request"),
        )
        for kind, name in kinds:
            if isinstance(error, kind):
                return CallFailure(name, _short(error.__cause__ or error))
        # What remains is a reply that is no chat completion, or only the beginning of one.
        return CallFailure("broken reply", _short(error), paid=True)

    def chat_many(
        self, bodies: Iterable[Mapping[str, Any]]
    ) -> Iterator[tuple[int, Reply | CallFailure]]:
        """(index, result) of every body, as they come in; at most `concurrency` are under way.

        A body is taken when its turn comes: all wavs of a bench at once may not fit in memory.

        Raises:
            EndpointError: no call could succeed; what came in before has been given out.
        """
        failures = 0
        pool = concurrent.futures.ThreadPoolExecutor(self.endpoint.concurrency)
        try:
            waiting: dict[concurrent.futures.Future, int] = {}
            todo = iter(enumerate(bodies))
            while True:
                for index, body in todo:
                    waiting[pool.submit(self.chat, body)] = index
                    if len(waiting) >= self.endpoint.concurrency:
                        break
                if not waiting:
                    return
                done, _ = concurrent.futures.wait(
                    waiting, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    index, result = waiting.pop(future), future.result()
                    gone = isinstance(result, CallFailure) and result.kind in (
                        "connection",
                        "timeout",
                        "server error",
                    )
                    failures = failures + 1 if gone else 0
                    yield index, result
                    if failures >= GIVE_UP_AFTER:
                        raise EndpointError(
                            f"{self.endpoint.base_url} has failed {failures} times in a row "
                            f"({result.kind}: {result.message}); when it is back, run the same "
                            "command again"
                        )
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def close(self) -> None:
        self.api.close()

    def _request(self, body: Mapping[str, Any]) -> Reply:
        # The client itself retries what a status says; a body cut off on its way it does not.
        retrying = Retrying(
            retry=retry_if_exception_type(
                (json.JSONDecodeError, self._errors.APIResponseValidationError)
            ),
            stop=stop_after_attempt(1 + self.endpoint.max_retries),
            wait=wait_exponential_jitter(initial=0.5, max=8.0),
            reraise=True,
        )
        for attempt in retrying:
            with attempt:
                with self._lock:
                    self.calls += 1
                completion = self.api.chat.completions.create(model=self.endpoint.model, **body)
                return reply_of(completion.to_dict(mode="json"))
        raise AssertionError("tenacity raises the last error itself")

    def _price(self, reply: Reply) -> float:
        endpoint = self.endpoint
        return 1e-6 * (
            reply.tokens_in * endpoint.usd_per_million_in
            + reply.tokens_out * endpoint.usd_per_million_out
        )


def audio_part(wave: np.ndarray) -> dict[str, Any]:
    """A wave as part of a message's content. wave: float32[L] at 16 kHz."""
    out = io.BytesIO()
    soundfile.write(out, wave, wave_lib.RATE_HZ, format="WAV", subtype="PCM_16")
    data = base64.b64encode(out.getvalue()).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def reply_of(raw: dict[str, Any]) -> Reply:
    """A chat completion as JSON -> Reply. Raises json.JSONDecodeError where it is none."""
    try:
        choice = raw["choices"][0]
        message = choice["message"]
        audio = message.get("audio") or {}
        data = base64.b64decode(audio["data"], validate=True) if audio.get("data") else None
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise json.JSONDecodeError(
            f"not a chat completion ({error!r})", str(raw)[:200], 0
        ) from None
    if data is not None:
        message["audio"] = {**audio, "data": f"<{len(data)} bytes>"}
    usage = raw.get("usage") or {}
    return Reply(
        text=message.get("content") or audio.get("transcript") or "",
        raw=raw,
        refusal=message.get("refusal"),
        audio=data,
        finish_reason=choice.get("finish_reason"),
        tokens_in=usage.get("prompt_tokens") or 0,
        tokens_out=usage.get("completion_tokens") or 0,
    )


def _short(error: BaseException | None) -> str:
    """The first line of an error, cut."""
    lines = str(error).strip().splitlines() or [repr(error)]
    return lines[0][:200]
