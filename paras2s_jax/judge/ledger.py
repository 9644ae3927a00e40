"""The judge's ledger: every stage output, stored once under the hash of what it depends on.

A run that is cut off continues where it stopped, a table can be made again without a model or an
API key, and no reply is paid for twice.
"""

import contextlib
import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

# Keys per SELECT: SQLite allows 999 bound variables in its oldest default build.
_KEYS_PER_QUERY = 500

# Failures are kept apart: a stage is asked again, but a table can be made again with them.
_TABLES = ("outputs", "failures")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS {table} (
  key TEXT PRIMARY KEY,
  stage TEXT NOT NULL,
  output TEXT NOT NULL,
  written_s REAL NOT NULL
) WITHOUT ROWID
"""


class LedgerError(ValueError):
    """The ledger file is not a ledger, or holds an output that cannot be read."""


def canonical_json(value: Any) -> str:
    """One text for equal values: keys sorted, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """sha256 (hex) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_digest(path: str | Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def params_digest(variables: Mapping[str, Any]) -> str:
    """sha256 (hex) of a tree of arrays: names, dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for path, leaf in sorted(
        (jax.tree_util.keystr(path), np.asarray(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
    ):
        total.update(f"{path} {leaf.dtype} {leaf.shape}".encode())
        total.update(np.ascontiguousarray(leaf).tobytes())
    return total.hexdigest()


def ledger_key(stage: str, inputs: Any, model_id: str, settings: Mapping[str, Any]) -> str:
    """Key of one stage output.

    Args:
      stage: name of the stage.
      inputs: JSON value that stands for what the stage reads (a wav's `file_digest`, or the text).
      model_id: name of the model, which changes whenever its weights do.
      settings: JSON values that change the output (thresholds, prompt version, temperature).
    """
    return digest([stage, inputs, model_id, dict(settings)])


class Ledger:
    """Key → JSON output in one SQLite file that several processes may share.

    The first output written under a key stays, so that two processes which raced to compute it
    read one answer from then on. Every `put_many` is one transaction: after a crash all of its
    rows are there, or none.
    """

    def __init__(self, path: str | Path, *, timeout_s: float = 60.0):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # isolation_level=None: transactions are opened and closed here, not implicitly by sqlite3.
        self._db = sqlite3.connect(
            self.path, timeout=timeout_s, isolation_level=None, check_same_thread=False
        )
        try:
            # Where the file system lacks shared memory, SQLite keeps its rollback journal, which is
            # as safe and only slower.
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            for table in _TABLES:
                self._db.execute(_SCHEMA.format(table=table))
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise LedgerError(
                f"{self.path} cannot be used as a judge ledger ({error}); "
                "move it away to start a new one."
            ) from error

    def get_many(self, keys: Iterable[str]) -> dict[str, Any]:
        """Returns the stored outputs of those `keys` that are present."""
        return self._get(keys, "outputs")

    def failures(self, keys: Iterable[str]) -> dict[str, Any]:
        """Returns, of those `keys` without an output, how they last failed, where that is known."""
        return self._get(keys, "failures")

    def _get(self, keys: Iterable[str], table: str) -> dict[str, Any]:
        keys = list(dict.fromkeys(keys))
        found = {}
        for start in range(0, len(keys), _KEYS_PER_QUERY):
            part = keys[start : start + _KEYS_PER_QUERY]
            marks = ",".join("?" * len(part))
            rows = self._db.execute(f"SELECT key, output FROM {table} WHERE key IN ({marks})", part)
            for key, text in rows:
                try:
                    found[key] = json.loads(text)
                except json.JSONDecodeError as error:
                    raise LedgerError(
                        f"{self.path}: the output under key {key} is not JSON."
                    ) from error
        return found

    def get(self, key: str) -> Any | None:
        """Returns the output under `key`, or None."""
        return self.get_many([key]).get(key)

    def put_many(self, stage: str, outputs: Mapping[str, Any]) -> None:
        """Stores key → output in one transaction; a key already present keeps its output."""
        now_s = time.time()
        rows = [(key, stage, canonical_json(value), now_s) for key, value in outputs.items()]
        self._db.execute("BEGIN IMMEDIATE")
        with self._db:
            self._db.executemany("INSERT OR IGNORE INTO outputs VALUES (?, ?, ?, ?)", rows)
            self._db.executemany("DELETE FROM failures WHERE key = ?", [(key,) for key in outputs])

    def put_failures(self, stage: str, failures: Mapping[str, Any]) -> None:
        """Notes how the stage last failed for keys; they count as missing all the same."""
        now_s = time.time()
        rows = [(key, stage, canonical_json(value), now_s) for key, value in failures.items()]
        self._db.execute("BEGIN IMMEDIATE")
        with self._db:
            self._db.executemany("INSERT OR REPLACE INTO failures VALUES (?, ?, ?, ?)", rows)

    def counts(self) -> dict[str, int]:
        """Number of stored outputs per stage."""
        return dict(self._db.execute("SELECT stage, COUNT(*) FROM outputs GROUP BY stage"))

    def num_failures(self) -> int:
        """Number of keys that are noted as failed."""
        return self._db.execute("SELECT COUNT(*) FROM failures").fetchone()[0]

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *exc_info: object) -> None:
        with contextlib.suppress(sqlite3.ProgrammingError):
            self.close()
