"""Scores by OpenAI-style batch files: half the price, within a day.

Three steps, each safe to repeat: `write` puts what the ledger lacks into request files, `submit`
hands each to the server once, `collect` puts what has been answered into the ledger.
"""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paras2s_jax.data.endpoint import ChatClient, EndpointError, reply_of
from paras2s_jax.data.records import write_text
from paras2s_jax.judge.endpoint_score import EndpointScorer, score_of
from paras2s_jax.judge.interfaces import Failure, Score
from paras2s_jax.judge.ledger import Ledger
from paras2s_jax.judge.stored_scores import Pending, store

URL = "/v1/chat/completions"
# What a file may hold (platform.openai.com/docs/guides/batch: 50 000 requests, 200 MB), less some.
MAX_REQUESTS, MAX_BYTES = 40_000, 150_000_000
REQUESTS, RECEIPT = "requests-{:03d}.jsonl", ".batch.json"
# States in which a batch will not change any more.
FINAL = ("completed", "failed", "expired", "cancelled")


@dataclasses.dataclass(frozen=True)
class Collected:
    """What came back: scores stored, failures {ledger key: reason}, batches still at work."""

    num_scores: int
    failures: dict[str, str]
    waiting: tuple[str, ...]


def write(folder: Path, scorer: EndpointScorer, pending: Mapping[str, Pending]) -> list[Path]:
    """Writes request files for what is pending; each request is named by its ledger key.

    Raises:
        EndpointError: files of an earlier call are there; what they ask for would be paid twice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = sorted(folder.glob(REQUESTS.replace("{:03d}", "*")))
    if there:
        raise EndpointError(
            f"{there[0]} is there already: submit and collect it first, or delete it if it was "
            "never submitted"
        )
    files, lines, size = [], [], 0
    for key, (heard, repeat) in pending.items():
        body = {"model": scorer.name, **scorer.body(heard, repeat)}
        request = {"custom_id": key, "method": "POST", "url": URL, "body": body}
        line = json.dumps(request) + "\n"
        if lines and (len(lines) >= MAX_REQUESTS or size + len(line) > MAX_BYTES):
            files.append(write_text(folder / REQUESTS.format(len(files)), "".join(lines)))
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    if lines:
        files.append(write_text(folder / REQUESTS.format(len(files)), "".join(lines)))
    return files


def submit(folder: Path, client: ChatClient) -> list[str]:
    """Uploads every request file without a receipt. Returns: the ids of the new batches.

    The receipt beside a file is what keeps it from being submitted, and paid, twice: it is there
    before the server is asked to work.
    """
    started = []
    for path in sorted(folder.glob(REQUESTS.replace("{:03d}", "*"))):
        receipt = _receipt(path)
        known = json.loads(receipt.read_text()) if receipt.exists() else {}
        if known.get("batch"):
            continue
        if known:
            raise EndpointError(
                f"{path} may have been submitted when the program was stopped: look for a batch "
                f"with metadata name {path.name} at {client.endpoint.base_url}; put its id into "
                f'{receipt} as "batch", or delete that file if there is none'
            )
        with open(path, "rb") as file:
            uploaded = client.api.files.create(file=file, purpose="batch")
        record = {"base_url": client.endpoint.base_url, "file": uploaded.id, "time_s": time.time()}
        write_text(receipt, json.dumps(record, indent=1))
        batch = client.api.batches.create(
            input_file_id=uploaded.id,
            endpoint=URL,
            completion_window="24h",
            metadata={"name": path.name},
        )
        write_text(receipt, json.dumps(record | {"batch": batch.id}, indent=1))
        started.append(batch.id)
    return started


def collect(folder: Path, client: ChatClient, ledger: Ledger) -> Collected:
    """Stores the scores of finished batches and removes their request files.

    What failed is left to the next `write`: it is pending still.
    """
    num_scores, failures, waiting = 0, {}, []
    for path in sorted(folder.glob(REQUESTS.replace("{:03d}", "*"))):
        receipt = _receipt(path)
        record = json.loads(receipt.read_text()) if receipt.exists() else {}
        if not record.get("batch"):
            waiting.append(f"{path.name} (not submitted)")
            continue
        batch = client.api.batches.retrieve(record["batch"])
        if batch.status not in FINAL:
            waiting.append(f"{path.name} ({batch.status})")
            continue
        found = {}
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id:
                found |= _answers(client.api.files.content(file_id).text)
        scores = {key: answer for key, answer in found.items() if isinstance(answer, Score)}
        store(ledger, scores)
        num_scores += len(scores)
        asked = [json.loads(line)["custom_id"] for line in path.open()]
        for key in asked:
            if key not in scores:
                answer = found.get(key, Failure(f"not answered; the batch is {batch.status}"))
                failures[key] = answer.reason
        path.unlink()
        receipt.unlink()
    return Collected(num_scores, failures, tuple(waiting))


def _answers(text: str) -> dict[str, Score | Failure]:
    """Lines of an output or error file by their custom id."""
    answers = {}
    for line in text.splitlines():
        if line.strip():
            row = json.loads(line)
            answers[row["custom_id"]] = _answer(row)
    return answers


def _answer(row: Mapping[str, Any]) -> Score | Failure:
    response = row.get("response") or {}
    if row.get("error") or response.get("status_code") != 200:
        reason = row.get("error") or response.get("body") or response
        return Failure(f"bad request: {json.dumps(reason)[:200]}", raw=row)
    try:
        return score_of(reply_of(response["body"]))
    except (json.JSONDecodeError, KeyError) as error:
        return Failure(f"broken reply: {error}", raw=row)


def _receipt(path: Path) -> Path:
    return path.with_name(path.stem + RECEIPT)
