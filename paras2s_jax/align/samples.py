"""Answers that the reward model learns from: N per query, and the judge's verdicts on them.

sample: -> wavs + responses.jsonl; judge_samples: -> verdicts.jsonl. Sampling continues where it
was stopped.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from paras2s_jax.align.pairs import query_rows
from paras2s_jax.align.phases import Responder
from paras2s_jax.align.policy import Frontend, SpeechPolicy, texts_of
from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.data.answers import save_answer, wav_name
from paras2s_jax.data.batches import Batches
from paras2s_jax.data.records import (
    Query,
    Response,
    Verdict,
    read_jsonl,
    write_jsonl,
    write_text,
)
from paras2s_jax.data.tokenizer import Tokenizer
from paras2s_jax.train import distributed
from paras2s_jax.train.sharding import ONE_DEVICE_LAYOUTS, Layouts

ROWS = "responses.jsonl"

Pair = tuple[Query, Path, Response, Path]
JudgeFn = Callable[[Sequence[Pair]], Sequence[Verdict]]


def sample(
    policy: SpeechPolicy,
    variables: Mapping[str, Any],
    frontend: Frontend,
    tokenizer: Tokenizer,
    queries: Sequence[Query],
    queries_dir: Path,
    out_dir: Path,
    *,
    num_samples: int,
    batch_size: int,
    len_buckets_s: Sequence[float],
    seed: int,
    version: str,
    system: str = "sft",
    layouts: Layouts = ONE_DEVICE_LAYOUTS,
    dtype: Any = None,
) -> list[Response]:
    """Samples answers; sampling at a higher temperature is a matter of `policy.text`, `.audio`.

    Args:
        queries: their wavs are relative to `queries_dir`.
        out_dir: gets wavs/, responses.jsonl and, meanwhile, parts/.
        num_samples: N answers per query.
        batch_size: queries per batch; the batch holds batch_size * N answers.
        version: names the policy's weights; answers of other weights are discarded.
        layouts, dtype: see phases.Responder.

    Returns:
        all responses.
    """
    folder = _Samples(
        out_dir,
        system,
        {
            "version": version,
            "system": system,
            "seed": seed,
            "num_samples": num_samples,
            "batch_size": batch_size,
            "len_buckets_s": list(len_buckets_s),
            "sampling": [repr(policy.text), repr(policy.audio), policy.max_steps],
            "queries": [[query.id, query.wav, query.dur_s] for query in queries],
        },
    )
    done = folder.open()
    if done is None:
        return folder.responses()
    batches = Batches(
        query_rows(queries),
        root=queries_dir,
        audio_keys=("query",),
        batch_size=batch_size,
        len_buckets_s=len_buckets_s,
        seed=seed,
        local_rows=layouts.train.local_rows(batch_size),
    )
    batches.restore({"epoch": 0, "batch": done})
    respond = Responder(policy, layouts, group_size=num_samples, dtype=dtype)
    variables = layouts.train.place(variables, policy.boxed())
    frontend = layouts.train.place(frontend, policy.boxed_frontend(frontend))
    for index in _progress(done, len(batches), system):
        batch = next(batches)
        rng = jax.random.fold_in(jax.random.key(seed), index)
        heard = {key: batch[key] for key in ("query", "query_len", "row")}
        heard = layouts.train.place_batch(heard, num_samples)
        row = heard.pop("row")
        rollout, answers = respond(variables, frontend, heard, rng)
        lens, rollout, row = distributed.gather((answers.lens, rollout, row))
        texts = texts_of(policy, rollout, tokenizer)
        made = {
            (at, g): Response(
                query_id=queries[row[at]].id,
                system=system,
                sample=g,
                text=texts[at][g],
                finished=bool(rollout.finished[at, g]),
                dur_s=int(lens[at, g]) / wave_lib.RATE_HZ,
                wav=wav_name(queries[row[at]].id, g),
            )
            for at in np.flatnonzero(row >= 0)
            for g in range(num_samples)
        }
        folder.add(index, made, answers.waves, lens)
    return folder.join()


def _progress(done: int, total: int, system: str) -> Iterator[int]:
    return tqdm(
        range(done, total),
        total=total,
        initial=done,
        desc=f"{system}: sample",
        unit="batch",
        disable=not distributed.is_main(),
    )


class _Samples:
    """A folder of answers that grows by parts, each written after its wavs and in order."""

    def __init__(self, folder: Path, system: str, identity: Mapping[str, Any]):
        self._folder, self._parts = folder, folder / "parts"
        self._system, self._identity = system, identity

    def open(self) -> int | None:
        """How many parts there are; None if all is done. What others left is removed."""
        return distributed.on_main(f"{self._system}: look at samples", self._find_done)

    def responses(self) -> list[Response]:
        return read_jsonl(self._folder / ROWS, Response)

    def add(
        self,
        part: int,
        responses: Mapping[tuple[int, int], Response],
        waves: jax.Array,
        lens: np.ndarray,
    ) -> None:
        """Each process writes the answers that lie on its devices.

        responses: by prompt and sample. waves: float32[P, G, L]. lens: int32[P, G].
        """
        prompts, samples = (np.arange(size) for size in waves.shape[:2])
        for (rows, columns, _), block in distributed.own_blocks(waves):
            for at, group in zip(prompts[rows], block, strict=True):
                for g, wave in zip(samples[columns], group, strict=True):
                    if (at, g) in responses:
                        save_answer(responses[at, g], wave[: lens[at, g]], self._folder)
        distributed.barrier(f"{self._system}: waves of part {part}")
        if distributed.is_main():
            write_jsonl(self._parts / f"{part:06d}.jsonl", responses.values())

    def join(self) -> list[Response]:
        """All parts as one file. Returns: its rows."""
        distributed.on_main(f"{self._system}: join samples", self._join)
        return self.responses()

    def _find_done(self) -> int | None:
        mark = self._folder / "identity.json"
        wanted = json.dumps(self._identity)
        if not mark.is_file() or mark.read_text(encoding="utf-8") != wanted:
            for name in ("parts", "wavs"):
                shutil.rmtree(self._folder / name, ignore_errors=True)
            (self._folder / ROWS).unlink(missing_ok=True)
            write_text(mark, wanted)
        if (self._folder / ROWS).is_file():
            return None
        return len(list(self._parts.glob("*.jsonl")))

    def _join(self) -> None:
        parts = sorted(self._parts.glob("*.jsonl"))
        write_jsonl(
            self._folder / ROWS, [row for part in parts for row in read_jsonl(part, Response)]
        )
        shutil.rmtree(self._parts)


def judge_samples(
    judge: JudgeFn,
    queries: Iterable[Query],
    queries_dir: Path,
    responses: Sequence[Response],
    responses_dir: Path,
) -> list[Verdict]:
    """Verdicts of all responses, also written to responses_dir/verdicts.jsonl.

    Nothing is kept back from an earlier run: the judge's ledger makes repeats cheap, and cannot
    confuse an answer with another one of the same name.
    """
    by_id = {query.id: query for query in queries}
    verdicts = list(
        judge(
            [
                (
                    by_id[response.query_id],
                    wave_lib.inside(queries_dir, by_id[response.query_id].wav),
                    response,
                    wave_lib.inside(responses_dir, response.wav),
                )
                for response in responses
            ]
        )
    )
    if len(verdicts) != len(responses):
        raise ValueError(f"the judge gave {len(verdicts)} verdicts for {len(responses)} answers.")
    write_jsonl(responses_dir / "verdicts.jsonl", verdicts)
    return verdicts
