"""Systems under test: whatever turns spoken queries into spoken answers.

Each writes `responses.jsonl` and its wavs (PCM16) into its own folder, and continues there
after a stop: only what is missing is made again, with the same result as an unbroken run.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
from tqdm import tqdm

from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.bench.aggregate import BenchError
from paras2s_jax.data.answers import AnswerStore, save_answer, wav_name
from paras2s_jax.data.records import Query, Response, read_jsonl, write_jsonl

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")

RespondBatch = Callable[
    [np.ndarray, np.ndarray, jax.Array],
    tuple[np.ndarray, np.ndarray, Sequence[str], np.ndarray],
]


class System(Protocol):
    """Anything that answers spoken queries."""

    name: str

    def respond(self, queries: Sequence[Query], root: Path, out_dir: Path) -> list[Response]:
        """Answers every query.

        Args:
            queries: their wavs are relative to `root`.
            out_dir: gets responses.jsonl and the wavs that it names.

        Returns:
            responses in the order of the queries (and of their samples).
        """
        ...


@dataclasses.dataclass
class PolicySystem:
    """Samples answers from a policy in batches of one shape per length bucket.

    Attributes:
        respond_batch: (waves float32[B, L], lens int32[B], rng) -> (waves float32[B, L'],
            lens int32[B], B texts, finished bool[B]); rows must not depend on one another.
        version: names the policy's weights and settings; answers of another version are discarded.
        batch_size: B; the last batch is filled up with repeated rows.
        len_buckets_s: the lengths L that queries are padded to, ascending.
        num_samples: answers per query.
        rate_hz: of the waves that `respond_batch` returns, and of the files.
    """

    name: str
    respond_batch: RespondBatch
    version: str
    batch_size: int = 32
    len_buckets_s: tuple[float, ...] = (2.0, 3.0, 4.0)
    num_samples: int = 1
    seed: int = 0
    rate_hz: int = wave_lib.RATE_HZ

    def respond(self, queries: Sequence[Query], root: Path, out_dir: Path) -> list[Response]:
        store = AnswerStore(out_dir, self._identity(queries))
        key = jax.random.key(self.seed)
        plan = self._plan(queries)
        for index, (bucket_s, batch) in enumerate(tqdm(plan, desc=f"{self.name}: respond")):
            if all((query.id, sample) in store.done for query, sample in batch):
                continue
            rng = jax.random.fold_in(key, index)
            for response, wave in self._answer(batch, bucket_s, Path(root), rng):
                store.add(response, wave, self.rate_hz)
        return [
            store.answer(query.id, sample)
            for query in queries
            for sample in range(self.num_samples)
        ]

    def _identity(self, queries: Sequence[Query]) -> dict:
        """All that decides the answers.

        The list of queries matters because the random numbers of an answer follow from its place.
        """
        return {
            "system": self.name,
            "version": self.version,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "num_samples": self.num_samples,
            "len_buckets_s": list(self.len_buckets_s),
            "queries": [[query.id, query.wav, query.dur_s] for query in queries],
        }

    def _plan(self, queries: Sequence[Query]) -> list[tuple[float, list[tuple[Query, int]]]]:
        """Batches of (query, sample) of one length bucket; the same whatever is already done."""
        buckets = {length_s: [] for length_s in self.len_buckets_s}
        for query in queries:
            fitting = [length_s for length_s in self.len_buckets_s if query.dur_s <= length_s]
            if not fitting:
                raise BenchError(
                    f"query {query.id!r} lasts {query.dur_s:.2f} s, longer than the last bucket "
                    f"({self.len_buckets_s[-1]} s); add a longer one to len_buckets_s."
                )
            buckets[fitting[0]] += [(query, sample) for sample in range(self.num_samples)]
        return [
            (length_s, units[start : start + self.batch_size])
            for length_s, units in buckets.items()
            for start in range(0, len(units), self.batch_size)
        ]

    def _answer(
        self,
        batch: Sequence[tuple[Query, int]],
        bucket_s: float,
        root: Path,
        rng: jax.Array,
    ) -> list[tuple[Response, np.ndarray]]:
        waves = np.zeros((self.batch_size, round(bucket_s * wave_lib.RATE_HZ)), np.float32)
        lens = np.zeros(self.batch_size, np.int32)
        for row in range(self.batch_size):
            query, _ = batch[row % len(batch)]
            wave = wave_lib.load(wave_lib.inside(root, query.wav))[: waves.shape[1]]
            waves[row, : len(wave)], lens[row] = wave, len(wave)
        waves_out, lens_out, texts, finished = self.respond_batch(waves, lens, rng)
        waves_out, lens_out = np.asarray(waves_out), np.asarray(lens_out)
        return [
            (
                Response(query.id, self.name, sample, texts[row], "", finished=bool(finished[row])),
                waves_out[row, : lens_out[row]],
            )
            for row, (query, sample) in enumerate(batch)
        ]


@dataclasses.dataclass
class RecordedSystem:
    """Answers that a responses.jsonl lists: the topline, or another program's output."""

    name: str
    jsonl: Path

    def respond(self, queries: Sequence[Query], root: Path, out_dir: Path) -> list[Response]:
        jsonl = Path(self.jsonl)
        wanted = {query.id: [] for query in queries}
        for row in read_jsonl(jsonl, Response):
            if row.query_id in wanted:
                wanted[row.query_id].append(row)
        lacking = [query_id for query_id, rows in wanted.items() if not rows]
        if lacking:
            raise BenchError(
                f"{jsonl} has no answer for {len(lacking)} of {len(wanted)} queries, first "
                f"{lacking[0]!r}; add them or bench fewer queries."
            )
        rows = [row for found in wanted.values() for row in sorted(found, key=_sample_of)]
        sources = [wave_lib.inside(jsonl.parent, row.wav) for row in rows]
        return _import(self.name, rows, sources, out_dir)


@dataclasses.dataclass
class KeptSystem:
    """What a system answered in an earlier run, failures included, from its folder as it is."""

    name: str

    def respond(self, queries: Sequence[Query], root: Path, out_dir: Path) -> list[Response]:
        rows = read_jsonl(out_dir / "responses.jsonl", Response, partial_tail=True)
        # The last row of an answer counts: it may have failed first.
        last = {(row.query_id, row.sample): row for row in rows}
        by_query: dict[str, list[Response]] = {query.id: [] for query in queries}
        for row in sorted(last.values(), key=_sample_of):
            if row.query_id in by_query:
                by_query[row.query_id].append(row)
        found = list(by_query.values())
        lacking = [query.id for query, part in zip(queries, found) if not part]
        if lacking:
            raise BenchError(
                f"{out_dir} has no answer to {len(lacking)} of {len(queries)} queries, first "
                f"{lacking[0]!r}; give the queries of that run."
            )
        return [row for part in found for row in part]


@dataclasses.dataclass
class FolderSystem:
    """Answers in a folder, one audio file per query, named by the query's id."""

    name: str
    folder: Path

    def respond(self, queries: Sequence[Query], root: Path, out_dir: Path) -> list[Response]:
        sources = [self._source(query) for query in queries]
        lacking = [query.id for query, source in zip(queries, sources) if source is None]
        if lacking:
            raise BenchError(
                f"{self.folder} has no answer for {len(lacking)} of {len(sources)} queries, first "
                f"{lacking[0]!r}; name each file <query id>{AUDIO_SUFFIXES[0]}."
            )
        rows = [Response(query.id, self.name, 0, "", "") for query in queries]
        return _import(self.name, rows, sources, out_dir)

    def _source(self, query: Query) -> Path | None:
        for suffix in AUDIO_SUFFIXES:
            path = wave_lib.inside(self.folder, query.id + suffix)
            if path.is_file():
                return path
        return None


def _sample_of(row: Response) -> int:
    return row.sample


def _import(
    name: str, rows: Sequence[Response], sources: Sequence[Path], out_dir: Path
) -> list[Response]:
    """Copies answers into a system's folder as 16 kHz mono, which also proves them readable."""
    responses = [
        save_answer(
            dataclasses.replace(row, system=name, wav=wav_name(row.query_id, row.sample)),
            wave_lib.load(source),
            out_dir,
        )
        for row, source in zip(rows, tqdm(sources, desc=f"{name}: import"), strict=True)
    ]
    write_jsonl(out_dir / "responses.jsonl", responses)
    return responses
