"""A speech model behind a realtime websocket (OpenAI's protocol, which others speak too).

One short session per query: the query's audio in, the answer's audio out, as events of JSON.
"""

import base64
import concurrent.futures
import dataclasses
import json
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter
from tqdm import tqdm
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.sync.client import connect

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.bench.remote import ASSISTANT
from paras2s_jax.data.answers import AnswerStore
from paras2s_jax.data.endpoint import GIVE_UP_AFTER, Endpoint, EndpointError, Pace
from paras2s_jax.data.records import Query, Response

# Of pcm16 in both directions (platform.openai.com/docs/guides/realtime).
RATE_HZ = 24_000
# One event carries at most this much audio: some servers limit a frame to 1 MB of text.
CHUNK_BYTES = 240_000
# Names of the released interface, and of its first version, which other servers keep.
AUDIO_DELTAS = ("response.output_audio.delta", "response.audio.delta")
TEXT_DELTAS = ("response.output_audio_transcript.delta", "response.audio_transcript.delta")


class SessionError(RuntimeError):
    """A session ended without an answer."""


@dataclasses.dataclass
class RealtimeSystem:
    """Asks each query in a session of its own, `endpoint.concurrency` at a time.

    endpoint: base_url with http(s) or the same address with /v1; its key, time-outs, retries and
    requests_per_minute hold here too (prices do not: the protocol counts differently).
    voice: as the server knows it.
    """

    name: str
    endpoint: Endpoint
    instructions: str = ASSISTANT
    voice: str = "alloy"
    num_samples: int = 1

    def respond(self, queries: Sequence[Query], root: Path, out_dir: Path) -> list[Response]:
        """See `systems.System`. Raises EndpointError where the server will answer nothing."""
        store = AnswerStore(
            out_dir,
            {
                "system": self.name,
                "model": self.endpoint.model,
                "protocol": "realtime",
                "instructions": self.instructions,
                "voice": self.voice,
            },
        )
        units, todo = store.plan(queries, self.num_samples)
        failures = 0
        with tqdm(total=len(todo), desc=f"{self.name}: respond", unit="answer") as bar:
            for (query, sample), found in self._ask_all(todo, Path(root)):
                response = Response(query.id, self.name, sample, "", "")
                if isinstance(found, SessionError):
                    store.fail(dataclasses.replace(response, error=str(found)))
                    failures += 1
                else:
                    wave, text = found
                    store.add(dataclasses.replace(response, text=text), wave, RATE_HZ)
                    failures = 0
                bar.update()
                if failures >= GIVE_UP_AFTER:
                    raise EndpointError(
                        f"{self.endpoint.base_url} has failed {failures} times in a row ({found}); "
                        "when it is back, run the same command again"
                    )
        return [store.answer(query.id, sample) for query, sample in units]

    def _ask_all(self, todo: Sequence[tuple[Query, int]], root: Path) -> Iterator:
        """(unit, (wave, text) or SessionError) as sessions end."""
        pace = Pace(self.endpoint.requests_per_minute)
        pool = concurrent.futures.ThreadPoolExecutor(self.endpoint.concurrency)
        try:
            waiting = {pool.submit(self._ask, query, root, pace): (query, s) for query, s in todo}
            for future in concurrent.futures.as_completed(waiting):
                yield waiting[future], future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _ask(self, query: Query, root: Path, pace: Pace):
        """One query with retries. Returns: (float32[L] at RATE_HZ, text), or a SessionError."""
        wave = wave_lib.load(wave_lib.inside(root, query.wav), RATE_HZ)
        retrying = Retrying(
            retry=retry_if_exception_type((WebSocketException, OSError)),
            stop=stop_after_attempt(1 + self.endpoint.max_retries),
            wait=wait_exponential_jitter(initial=0.5, max=8.0),
            reraise=True,
        )
        try:
            for attempt in retrying:
                with attempt:
                    pace.wait()
                    return self._session(wave)
        except SessionError as error:
            return error
        except TimeoutError:
            return SessionError(f"timeout: no answer in {self.endpoint.timeout_s:g} s")
        except (WebSocketException, OSError) as error:
            return SessionError(f"connection: {str(error).splitlines()[0][:200]}")

    def _session(self, wave: np.ndarray) -> tuple[np.ndarray, str]:
        endpoint = self.endpoint
        headers = {"Authorization": f"Bearer {endpoint.api_key}"}
        try:
            socket = connect(
                _address(endpoint),
                additional_headers=headers,
                open_timeout=endpoint.timeout_s,
                max_size=2**24,
            )
        except InvalidStatus as error:
            status = error.response.status_code
            if status in (401, 403):
                raise EndpointError(
                    f"{endpoint.base_url} refuses the key in ${endpoint.api_key_env} "
                    f"(status {status})"
                ) from None
            raise
        with socket:
            for event in self._events(wave):
                socket.send(json.dumps(event))
            return _answer(socket, time.monotonic() + endpoint.timeout_s)

    def _events(self, wave: np.ndarray) -> Iterator[dict[str, Any]]:
        """What a session sends: settings, the query's audio, and the wish for an answer."""
        pcm = {"type": "audio/pcm", "rate": RATE_HZ}
        yield {
            "type": "session.update",
            "session": {
                "type": "realtime",
                "instructions": self.instructions,
                "output_modalities": ["audio"],
                "audio": {
                    # The whole query is there at once: nothing has to guess where it ends.
                    "input": {"format": pcm, "turn_detection": None},
                    "output": {"format": pcm, "voice": self.voice},
                },
            },
        }
        data = np.round(np.clip(wave, -1.0, 1.0) * 32_767).astype("<i2").tobytes()
        for start in range(0, len(data), CHUNK_BYTES):
            audio = base64.b64encode(data[start : start + CHUNK_BYTES]).decode()
            yield {"type": "input_audio_buffer.append", "audio": audio}
        yield {"type": "input_audio_buffer.commit"}
        yield {"type": "response.create"}


def _answer(socket, deadline: float) -> tuple[np.ndarray, str]:
    """Collects the answer's events until it is done."""
    audio, words = bytearray(), []
    while True:
        event = _next(socket, deadline)
        kind = event.get("type")
        if kind in AUDIO_DELTAS:
            audio += base64.b64decode(event["delta"])
        elif kind in TEXT_DELTAS:
            words.append(event["delta"])
        elif kind == "error":
            raise SessionError(f"server error: {json.dumps(event.get('error'))[:200]}")
        elif kind == "response.done":
            break
    status = event.get("response", {}).get("status", "completed")
    if status != "completed":
        details = event["response"].get("status_details")
        raise SessionError(f"the answer is {status}: {json.dumps(details)[:200]}")
    if not audio:
        raise SessionError(f"the answer has no audio, only the words {''.join(words)[:80]!r}")
    samples = np.frombuffer(bytes(audio[: len(audio) // 2 * 2]), "<i2")
    return samples.astype(np.float32) / 32_768, "".join(words)


def _next(socket, deadline: float) -> Mapping[str, Any]:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    try:
        event = json.loads(socket.recv(timeout=left))
    except json.JSONDecodeError as error:
        raise SessionError(f"broken event: {error}") from None
    except ConnectionClosed as error:
        raise ConnectionError(f"closed before the answer was done ({error})") from None
    if not isinstance(event, dict):
        raise SessionError("broken event: not an object")
    return event


def _address(endpoint: Endpoint) -> str:
    """wss://…/v1/realtime?model=… of https://…/v1."""
    parts = urllib.parse.urlsplit(endpoint.base_url)
    scheme = {"https": "wss", "http": "ws"}[parts.scheme]
    query = urllib.parse.urlencode({"model": endpoint.model})
    path = parts.path.rstrip("/") + "/realtime"
    return urllib.parse.urlunsplit((scheme, parts.netloc, path, query, ""))
