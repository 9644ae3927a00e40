"""A bench on a server that fails in every way, in a program that is killed: is anything lost?

What listens here is fixed arithmetic on constant waves: only what is paid for matters.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import rich.console
import soundfile

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.bench import run as bench_run
from paras2s_jax.bench import tables
from paras2s_jax.bench.remote import ChatSystem
from paras2s_jax.data.endpoint import ChatClient, Endpoint
from paras2s_jax.data.records import Query, Response, read_jsonl, write_jsonl
from paras2s_jax.judge.chain import Judge
from paras2s_jax.judge.endpoint_score import EndpointScorer
from paras2s_jax.judge.interfaces import Transcript
from paras2s_jax.judge.ledger import Ledger
from paras2s_jax.judge.score_prompt import ScorePrompt
from paras2s_jax.perf.chat_server import ChatServer, Fault, audio_message
from paras2s_jax.stages.registry import Figures

# A reply that comes after the time-out is asked for again: a loaded machine must not be too slow.
CONCURRENCY, TIMEOUT_S = 4, 3.0
REPLY_S = 0.05  # How long a good reply takes.
STYLES = ("sad", "surprised")
# Each question meets one of these first, then a good reply. The first five are retried on the spot,
# the others fail until the program runs again.
FAULTS = (
    Fault("hang", 4.0),
    Fault("status", 429, {"retry-after-ms": "20"}),
    Fault("status", 500),
    Fault("truncated"),
    Fault("close"),
    "prose instead of what was asked for",
    {"refusal": "I would rather not."},
    audio_message(b"", ""),
    None,
)


class FlakyServer:
    """Answers audio with audio and everything else with a score, after a fault per question.

    good: how often each question got its good reply.
    """

    def __init__(self, faults: bool):
        self._faults, self._lock = faults, threading.Lock()
        self._asked: Counter[str] = Counter()
        self.good: Counter[str] = Counter()

    def __call__(self, body: Mapping) -> object:
        key = hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest()
        with self._lock:
            self._asked[key] += 1
            first = self._asked[key] == 1
        fault = FAULTS[int(key[:8], 16) % len(FAULTS)] if self._faults and first else None
        if fault is not None:
            return fault
        time.sleep(REPLY_S)
        with self._lock:
            self.good[key] += 1
        number = int(key[8:16], 16)
        if "modalities" in body:
            return audio_message(_constant((10 + number % 80) / 100), "well")
        return json.dumps({"reason": "by its hash", "score": 1 + number % 5})


def run(queries: int, kills: int, seed: int) -> Figures:
    """Benches `queries` queries on a flaky server, killing the program `kills` times.

    Returns: faults/lost: verdicts that a clean run has and this one has not; faults/paid_twice:
    good replies asked for again although an earlier one had been stored; faults/in_flight: good
    replies that a kill met before they were stored; faults/calls; faults/seen_failures: answers and
    verdicts that were noted as failed on the way; faults/mean_difference: to the clean run's mean.
    """
    with tempfile.TemporaryDirectory(prefix="paras2s-faults-") as scratch:
        folder = Path(scratch)
        write_queries(folder, queries)
        with ChatServer(FlakyServer(faults=False)) as server:
            clean = _bench_in_process(folder, folder / "clean", server.url)
        flaky = FlakyServer(faults=True)
        rng = random.Random(seed)
        with ChatServer(flaky) as server:
            in_flight, seen = 0, 0
            for _ in range(kills):
                before, stored = sum(flaky.good.values()), _num_stored(folder / "flaky")
                _killed_after(rng.uniform(0.5, 3.0), folder, server.url)
                server.settle()
                served = sum(flaky.good.values()) - before
                in_flight += served - (_num_stored(folder / "flaky") - stored)
                seen += _num_failed(folder / "flaky")
            # A fault may come back to a question once per run: to the answer, then to its scores.
            for _ in range(4):
                final = _bench_in_process(folder, folder / "flaky", server.url)
                seen += _num_failed(folder / "flaky")
            calls = len(server.requests)
        repeated = sum(flaky.good.values()) - len(flaky.good)
    figures = {
        "faults/lost": final["bench/model/failed"] - clean["bench/model/failed"],
        "faults/paid_twice": float(repeated - in_flight),
        "faults/in_flight": float(in_flight),
        "faults/calls": float(calls),
        "faults/seen_failures": float(seen),
        "faults/mean_difference": abs(final["bench/model/mean"] - clean["bench/model/mean"]),
    }
    print(
        f"{calls} calls for {len(flaky.good)} questions; {in_flight} replies were under way when "
        f"the program was killed",
        flush=True,
    )
    return figures


def write_queries(folder: Path, count: int) -> None:
    """Constant waves, each of another level, as queries in two styles a sentence."""
    rows = []
    for index in range(count - count % 2):
        style, contrast = STYLES[:: 1 if index % 2 else -1]
        wav = f"queries/{index}.wav"
        level = np.full(800, (index + 1) / (2 * count + 2), np.float32)
        wave_lib.save(folder / wav, level, wave_lib.RATE_HZ)
        rows.append(
            Query(
                f"q{index}", f"s{index // 2}", "emotion", "words", style, contrast, "topic", "test",
                "voice", wav, 0.05,
            )
        )  # fmt: skip
    write_jsonl(folder / "queries.jsonl", rows)


def bench_folder(folder: Path, out: Path, url: str) -> Figures:
    """One run of the bench, as a user would start it."""
    endpoint = Endpoint(url, "model", concurrency=CONCURRENCY, timeout_s=TIMEOUT_S, max_retries=3)
    client = ChatClient(endpoint)
    judge = Judge(
        _Levels(), {"emotion": _Levels()}, _Levels(),
        EndpointScorer(client, ScorePrompt.load()), Ledger(out / "ledger.sqlite"), progress=False,
    )  # fmt: skip
    results = bench_run.bench(
        [ChatSystem("model", client)],
        read_jsonl(folder / "queries.jsonl", Query),
        folder,
        out,
        judge=judge,
        answers=(),
        num_resamples=10,
        console=rich.console.Console(file=io.StringIO()),
    )
    return tables.figures(results)


class _Levels:
    """Words and names that stand for a wave's level."""

    model_id, settings, max_dur_s, labels = "levels", {}, 10.0, STYLES

    def transcribe(self, waves: Sequence[np.ndarray]) -> list[Transcript]:
        return [Transcript(f"level {round(1e4 * float(w.max()))}", 0.0) for w in waves]

    def name(self, waves: Sequence[np.ndarray]) -> tuple[list[str], np.ndarray]:
        odd = [round(1e4 * float(wave.max())) % 2 for wave in waves]
        return [STYLES[i] for i in odd], np.eye(2, dtype=np.float32)[odd]


def _bench_in_process(folder: Path, out: Path, url: str) -> Figures:
    done = subprocess.run(_command(folder, out, url), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the bench ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _killed_after(seconds: float, folder: Path, url: str) -> None:
    """Starts the bench and kills it so long after it has begun to ask."""
    process = subprocess.Popen(
        _command(folder, folder / "flaky", url),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    process.stdout.readline()  # "ready": the imports are done.
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()


def _command(folder: Path, out: Path, url: str) -> list[str]:
    return [sys.executable, "-m", "paras2s_jax.perf.faults", str(folder), str(out), url]


def _num_stored(out: Path) -> int:
    """Answers and scores that survived."""
    rows = out / "model" / "responses.jsonl"
    answers = read_jsonl(rows, Response, partial_tail=True) if rows.is_file() else []
    scores = 0
    if (out / "ledger.sqlite").is_file():
        with Ledger(out / "ledger.sqlite") as ledger:
            scores = ledger.counts().get("score", 0)
    return sum(not row.error for row in answers) + scores


def _num_failed(out: Path) -> int:
    """Answers and scores that are noted as failed."""
    rows = out / "model" / "responses.jsonl"
    answers = read_jsonl(rows, Response, partial_tail=True) if rows.is_file() else []
    failed = sum(bool(row.error) for row in answers)
    if (out / "ledger.sqlite").is_file():
        with Ledger(out / "ledger.sqlite") as ledger:
            failed += ledger.num_failures()
    return failed


def _constant(level: float) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.full(1600, level), wave_lib.RATE_HZ, format="WAV", subtype="PCM_16")
    return out.getvalue()


if __name__ == "__main__":
    print("ready", flush=True)
    made = bench_folder(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    print(json.dumps({name: None if np.isnan(v) else v for name, v in made.items()}))
