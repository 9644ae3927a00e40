import multiprocessing
import os
import signal
import sqlite3

import pytest

from paras2s_jax.judge import ledger as ledger_lib


def _write_many(path, offset):
    with ledger_lib.Ledger(path) as ledger:
        for i in range(offset, offset + 60):
            ledger.put_many("shared", {f"key{i}": {"writer": offset, "i": i}})


def _die_inside_transaction(path):
    ledger = ledger_lib.Ledger(path)
    ledger.put_many("before", {"kept": {"x": 1}})
    ledger._db.execute("BEGIN IMMEDIATE")
    ledger._db.execute("INSERT INTO outputs VALUES ('half', 'torn', '{}', 0)")
    os.kill(os.getpid(), signal.SIGKILL)


def test_round_trip_and_reopen(tmp_path):
    path = tmp_path / "deep" / "ledger.sqlite"
    with ledger_lib.Ledger(path) as ledger:
        ledger.put_many("score", {"a": {"score": 3.5, "text": "naïve"}, "b": [1, None]})
        assert ledger.get("missing") is None
    with ledger_lib.Ledger(path) as ledger:
        assert ledger.get_many(["a", "b", "c"]) == {
            "a": {"score": 3.5, "text": "naïve"},
            "b": [1, None],
        }
        assert ledger.counts() == {"score": 2}


def test_more_keys_than_one_query_holds(tmp_path):
    with ledger_lib.Ledger(tmp_path / "l.sqlite") as ledger:
        outputs = {f"k{i}": i for i in range(1203)}
        ledger.put_many("s", outputs)
        assert ledger.get_many(outputs) == outputs


def test_first_output_stays(tmp_path):
    with ledger_lib.Ledger(tmp_path / "l.sqlite") as ledger:
        ledger.put_many("s", {"k": "first"})
        ledger.put_many("s", {"k": "second"})
        assert ledger.get("k") == "first"


def test_key_changes_with_every_part():
    base = ("transcribe", "wavhash", "asr:1", {"min_logp": -1.0, "beam": 1})
    key = ledger_lib.ledger_key(*base)
    # Equal settings in another order are the same settings.
    assert key == ledger_lib.ledger_key(*base[:3], {"beam": 1, "min_logp": -1.0})
    others = [
        ("tone", *base[1:]),
        (base[0], "other", *base[2:]),
        (*base[:2], "asr:2", base[3]),
        (*base[:3], {"min_logp": -2.0, "beam": 1}),
    ]
    assert len({key, *(ledger_lib.ledger_key(*parts) for parts in others)}) == 5


def test_nan_is_refused_and_leaves_nothing(tmp_path):
    with ledger_lib.Ledger(tmp_path / "l.sqlite") as ledger:
        with pytest.raises(ValueError):
            ledger.put_many("s", {"good": 1.0, "bad": float("nan")})
        assert ledger.counts() == {}
        ledger.put_many("s", {"good": 1.0})  # No transaction is left open.


def test_two_processes_share_it(tmp_path):
    path = tmp_path / "l.sqlite"
    spawn = multiprocessing.get_context("spawn")
    # Ranges 0..59 and 30..89 overlap by half: 90 distinct keys.
    workers = [spawn.Process(target=_write_many, args=(path, offset)) for offset in (0, 30)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    with ledger_lib.Ledger(path) as ledger:
        assert ledger.counts() == {"shared": 90}


def test_killed_writer_leaves_whole_rows_only(tmp_path):
    path = tmp_path / "l.sqlite"
    worker = multiprocessing.get_context("spawn").Process(
        target=_die_inside_transaction, args=(path,)
    )
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    with ledger_lib.Ledger(path) as ledger:
        assert ledger.get_many(["kept", "half"]) == {"kept": {"x": 1}}
        ledger.put_many("after", {"more": 1})
        assert ledger.counts() == {"before": 1, "after": 1}


def test_foreign_file_is_one_clear_error(tmp_path):
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"these are notes, not a database " * 40)
    with pytest.raises(ledger_lib.LedgerError, match=r"ledger\.sqlite"):
        ledger_lib.Ledger(path)


def test_torn_output_names_the_file(tmp_path):
    path = tmp_path / "l.sqlite"
    with ledger_lib.Ledger(path) as ledger:
        with sqlite3.connect(path) as db:
            db.execute("INSERT INTO outputs VALUES ('k', 's', '{torn', 0)")
        db.close()
        with pytest.raises(ledger_lib.LedgerError, match=r"l\.sqlite"):
            ledger.get("k")
