"""Rows of a manifest -> padded batches: deterministic, read by parts, resumable.

The order of an epoch is a plan computed from (seed, epoch) alone, so a position is two numbers and
restoring it costs nothing. tf.data only carries out the plan: it decodes, pads and prefetches.
"""

import atexit
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import types
import weakref
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

import numpy as np
import soundfile

from paras2s_jax.audio import wave
from paras2s_jax.data import plan

DECODE_CALLS = 4
MAX_LISTED = 20


class ManifestError(ValueError):
    """Rows or files that cannot be turned into batches; the message lists them."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A row that cannot be used. `row` is its index, `path` the file to look at."""

    row: int
    path: str
    reason: str

    def __str__(self) -> str:
        return self.reason if self.path in self.reason else f"{self.path}: {self.reason}"


def read_rows(path: str | os.PathLike) -> tuple[list[Any], list[Problem]]:
    """Reads a jsonl leniently: a line that is no JSON object becomes a problem, not an error."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise ManifestError(f"{path}: no such manifest; run the stage that writes it first")
    rows, problems = [], []
    for at, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines()):
        if not line.strip():
            continue
        place = f"{path}:{at + 1}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(Problem(at, place, f"not valid JSON ({error.msg})"))
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            problems.append(Problem(at, place, f"expected an object, got {type(row).__name__}"))
    return rows, problems


def validate(
    rows: Sequence[Any],
    root: str | os.PathLike,
    audio_keys: Sequence[str],
    *,
    max_bad_share: float = 0.01,
    problems: Sequence[Problem] = (),
) -> tuple[list[dict], list[Problem]]:
    """Decodes every file once and splits rows into usable and not.

    problems: found before, e.g. by `read_rows`; they count towards the share.
    Returns: (good rows in order, problems). ManifestError if too large a share is bad.
    """
    with futures.ThreadPoolExecutor(DECODE_CALLS) as pool:
        found = list(pool.map(lambda item: _problem(*item, root, audio_keys), enumerate(rows)))
    good = [row for row, problem in zip(rows, found, strict=True) if problem is None]
    bad = [*problems, *(problem for problem in found if problem is not None)]
    total = len(rows) + len(problems)
    if bad and len(bad) > max_bad_share * total:
        raise ManifestError(
            f"{len(bad)} of {total} rows under {root} are unusable "
            f"(at most {max_bad_share:.1%} is allowed):\n" + _listing(bad)
        )
    return good, bad


def _problem(at: int, row: Any, root: str | os.PathLike, keys: Sequence[str]) -> Problem | None:
    if not isinstance(row, dict):
        return Problem(at, str(root), f"row {at} is a {type(row).__name__}, not an object")
    for key in keys:
        relative = row.get(key)
        if not isinstance(relative, str) or not relative or "\0" in relative:
            return Problem(at, str(root), f"row {at} has no path under {key!r}")
        try:
            wave.load(wave.inside(root, relative))
        except (wave.AudioError, OSError) as error:
            return Problem(at, relative, str(error))
    return None


def _listing(items: Sequence[Any]) -> str:
    lines = [f"  {item}" for item in items[:MAX_LISTED]]
    if len(items) > MAX_LISTED:
        lines.append(f"  … and {len(items) - MAX_LISTED} more")
    return "\n".join(lines)


def len_samples(path: str | os.PathLike) -> int:
    """Length at 16 kHz, at most one sample too long, from the header where that is reliable."""
    try:
        info = soundfile.info(os.fspath(path))
    except (OSError, soundfile.LibsndfileError) as error:
        raise wave.AudioError(f"{path}: not readable as audio") from error
    if info.format == "MP3":
        return len(wave.load(path))
    if info.samplerate == wave.RATE_HZ:
        return info.frames
    return math.ceil(info.frames * wave.RATE_HZ / info.samplerate) + 1


@functools.cache
def _tensorflow() -> types.ModuleType:
    """Imports TensorFlow on first use (it takes seconds), quietly, for the CPU alone."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Only kernels of models would use it, and announcing it takes four lines of log.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow

    # The accelerator belongs to JAX.
    tensorflow.config.set_visible_devices([], "GPU")
    # A pipeline that still reads ahead when Python shuts down waits for Python: for minutes, or
    # for ever. Registered after TensorFlow's own handlers, so that it runs before them.
    atexit.register(_close_all)
    return tensorflow


_open: "weakref.WeakSet[Batches]" = weakref.WeakSet()


def _close_all() -> None:
    for batches in list(_open):
        batches.close()


class Batches:
    """Iterator of batches (dicts of numpy arrays) over rows.

    For each audio key k: `k` float32[B, L], `k_len` int32[B]; for each token key t: `t`
    int32[B, T], `t_len` int32[B]; scalar keys as arrays [B]; `row` int32[B], `valid` bool[B].
    L and T are the smallest buckets that hold the longest row of the batch, over all processes.

    `batch_size` counts rows over all processes. Each reads and yields only `local_rows` of every
    batch (positions in it, such as `train.sharding.local_rows` gives; None: all), and all yield
    equally many batches; the position that `state` tells is the same for all. Rows that only
    complete a batch repeat a real row, so that they are numerically harmless, with `valid` False
    and `row` -1.
    """

    def __init__(
        self,
        rows: Sequence[dict],
        *,
        root: str | os.PathLike,
        audio_keys: Sequence[str] = (),
        token_keys: Sequence[str] = (),
        scalar_keys: Sequence[str] = (),
        batch_size: int,
        len_buckets_s: Sequence[float] = (),
        token_buckets: Sequence[int] = (),
        seed: int = 0,
        shuffle: bool = False,
        repeat: bool = False,
        group_key: str | None = None,
        local_rows: Sequence[int] | None = None,
        prefetch: int = 2,
    ):
        if not rows:
            raise ManifestError(f"no rows to batch under {root}; is the manifest empty?")
        local = np.arange(batch_size) if local_rows is None else np.asarray(local_rows, int)
        if not len(local) or local.min() < 0 or local.max() >= batch_size:
            raise ValueError(f"local_rows {local_rows} are no rows of a batch of {batch_size}")
        self._rows = list(rows)
        self._root = pathlib.Path(root)
        self._audio_keys, self._token_keys = tuple(audio_keys), tuple(token_keys)
        self._batch_size, self._seed = batch_size, seed
        self._shuffle, self._repeat, self._prefetch = shuffle, repeat, prefetch
        self._local = local
        self._scalars = {key: np.asarray(self._column(key)) for key in scalar_keys}
        len_buckets = [math.ceil(dur_s * wave.RATE_HZ) for dur_s in len_buckets_s]
        self._buckets = [np.sort(len_buckets).astype(int) for _ in self._audio_keys]
        self._buckets += [np.sort(token_buckets).astype(int) for _ in self._token_keys]
        self._bucket_of = self._choose_buckets()  # int[N, keys]
        self._groups = self._group_rows(group_key)
        self._digest = self._fingerprint()
        self._num_batches = len(self._plan(0))
        self._epoch, self._batch, self._ended = 0, 0, False
        self._source: Iterator | None = None
        self._failure: Exception | None = None

    def state(self) -> dict:
        """The position after the last batch given out; plain JSON."""
        return {"epoch": self._epoch, "batch": self._batch, "plan": self._digest}

    def restore(self, state: dict) -> None:
        """Continues exactly behind the batch after which `state` was taken."""
        if state.get("plan", self._digest) != self._digest:
            raise ManifestError(
                f"the rows under {self._root}, the batch size, buckets or seed changed since the "
                "checkpoint was written; use a new workdir, or put them back"
            )
        self._epoch, self._batch = int(state["epoch"]), int(state["batch"])
        self._ended = False
        self.close()

    def close(self) -> None:
        """Stops reading ahead; the next batch starts the reading again."""
        self._source = None

    def __len__(self) -> int:
        """Batches per epoch."""
        return self._num_batches

    def __iter__(self) -> "Batches":
        if self._ended:
            self._epoch, self._batch, self._ended = self._epoch + 1, 0, False
            self.close()
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        tf = _tensorflow()
        if self._source is None:
            _open.add(self)
            self._source = self._dataset(self._epoch, self._batch).as_numpy_iterator()
        try:
            row, *columns = next(self._source)
        except StopIteration:
            self._ended = True
            raise
        except tf.errors.OpError:
            if self._failure is None:
                raise
            raise self._failure from None
        self._batch += 1
        if self._repeat and self._batch == self._num_batches:
            self._epoch, self._batch = self._epoch + 1, 0
        batch = {}
        for at, key in enumerate((*self._audio_keys, *self._token_keys)):
            batch[key], batch[f"{key}_len"] = columns[2 * at], columns[2 * at + 1]
        content = columns[-1]
        batch.update({key: values[content] for key, values in self._scalars.items()})
        return batch | {"row": row, "valid": row >= 0}

    def _dataset(self, epoch: int, batch: int):
        """tf.data pipeline from a position on: plan -> decoded, padded rows -> batches."""
        tf = _tensorflow()
        kinds = [tf.float32, tf.int32] * len(self._audio_keys)
        kinds += [tf.int32, tf.int32] * len(self._token_keys)
        scalar, vector = tf.TensorShape([]), tf.TensorShape([None])

        def load(row, content, buckets):
            columns = tf.numpy_function(self._load, [content, buckets], kinds) if kinds else []
            for at, column in enumerate(columns):
                column.set_shape(scalar if at % 2 else vector)
            return (row, *columns, content)

        index = tf.TensorSpec([], tf.int32)
        signature = (index, index, tf.TensorSpec([len(self._buckets)], tf.int32))
        items = tf.data.Dataset.from_generator(
            lambda: self._items(epoch, batch), output_signature=signature
        )
        loaded = items.map(load, num_parallel_calls=DECODE_CALLS, deterministic=True)
        # Nothing is left to tune, and the tuner's thread sleeps for up to a minute: whoever drops
        # a pipeline would wait for it to wake.
        options = tf.data.Options()
        options.autotune.enabled = False
        batched = loaded.batch(len(self._local)).prefetch(self._prefetch)
        return batched.with_options(options)

    def _items(self, epoch: int, batch: int) -> Iterator[tuple]:
        """Yields (row or -1, row to read, bucket per key) in the order of the plan."""
        while True:
            for rows in self._plan(epoch)[batch:]:
                chosen = self._bucket_of[rows[rows >= 0]].max(axis=0)
                sizes = [b[i] for b, i in zip(self._buckets, chosen, strict=True)]
                sizes = np.asarray(sizes, np.int32)
                for row in rows[self._local]:
                    yield np.int32(row), np.int32(row if row >= 0 else rows[0]), sizes
            if not self._repeat:
                return
            epoch, batch = epoch + 1, 0

    def _plan(self, epoch: int) -> np.ndarray:
        """Row indices of every batch of an epoch. Returns: int[batches, batch_size]."""
        rng = np.random.default_rng([self._seed, epoch])
        ranks = np.zeros(len(self._rows), np.int64)
        for at, buckets in enumerate(self._buckets):
            ranks = ranks * len(buckets) + self._bucket_of[:, at]
        common = {"batch_size": self._batch_size, "shuffle": self._shuffle, "rng": rng}
        if self._groups is None:
            return plan.order_rows(ranks, repeat=self._repeat, **common)
        return plan.order_groups(ranks, self._groups, **common)

    def _load(self, row: np.ndarray, buckets: np.ndarray) -> list[np.ndarray]:
        """Reads and pads every column of one row; called from threads of tf.data."""
        try:
            columns = [self._read(int(row), key) for key in (*self._audio_keys, *self._token_keys)]
            padded: list[np.ndarray] = []
            for column, size in zip(columns, buckets, strict=True):
                if len(column) > size:
                    raise ManifestError(
                        f"row {row} under {self._root} has grown to {len(column)} values since "
                        f"its bucket of {size} was chosen; do not change files during a run"
                    )
                padded += [np.pad(column, (0, size - len(column))), np.int32(len(column))]
            return padded
        except (wave.AudioError, ManifestError) as error:
            # tf.data would wrap the error in a page of graph; `__next__` raises the original.
            self._failure = error
            raise

    def _read(self, row: int, key: str) -> np.ndarray:
        value = self._rows[row][key]
        if key in self._token_keys:
            return np.asarray(value, np.int32)
        return wave.load(wave.inside(self._root, value))

    def _column(self, key: str) -> list:
        missing = [at for at, row in enumerate(self._rows) if key not in row]
        if missing:
            raise ManifestError(
                f"key {key!r} is missing in {len(missing)} rows under {self._root}, "
                f"first in row {missing[0]}"
            )
        return [row[key] for row in self._rows]

    def _choose_buckets(self) -> np.ndarray:
        """Smallest bucket of every row and key. Returns: int[N, keys]."""
        lens = []
        for key in self._audio_keys:
            paths = [wave.inside(self._root, path) for path in self._column(key)]
            with futures.ThreadPoolExecutor(DECODE_CALLS) as pool:
                lens.append(list(pool.map(len_samples, paths)))
        lens += [[len(ids) for ids in self._column(key)] for key in self._token_keys]
        keys = (*self._audio_keys, *self._token_keys)
        too_long = []
        for key, buckets, key_lens in zip(keys, self._buckets, lens, strict=True):
            if not len(buckets):
                raise ValueError(f"no buckets given for key {key!r}")
            too_long += [
                f"row {at} ({key}={self._rows[at][key]!r:.80}): {n} > {buckets[-1]}"
                for at, n in enumerate(key_lens)
                if n > buckets[-1]
            ]
        if too_long:
            raise ManifestError(
                f"{len(too_long)} rows under {self._root} exceed the largest bucket (in samples or "
                f"tokens); raise it or leave the rows out:\n" + _listing(too_long)
            )
        chosen = [np.searchsorted(b, n) for b, n in zip(self._buckets, lens, strict=True)]
        return np.array(chosen, int).reshape(len(keys), len(self._rows)).T

    def _group_rows(self, group_key: str | None) -> list[np.ndarray] | None:
        if group_key is None:
            return None
        members: dict[Any, list[int]] = {}
        for at, value in enumerate(self._column(group_key)):
            members.setdefault(value, []).append(at)
        return [np.array(rows) for rows in members.values()]

    def _fingerprint(self) -> str:
        """Identifies everything that the order of rows depends on."""
        settings = [self._batch_size, self._seed, self._shuffle, self._repeat]
        settings += [buckets.tolist() for buckets in self._buckets]
        settings += [[group.tolist() for group in self._groups or []]]
        digest = hashlib.sha256(json.dumps(settings).encode())
        digest.update(self._bucket_of.astype("<i8").tobytes())
        return digest.hexdigest()[:16]
