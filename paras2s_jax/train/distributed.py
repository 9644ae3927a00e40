"""Several processes as one program: how they start, wait for each other by name, and end together.

One process needs none of it: every function here then does its work at once and waits for nobody.
"""

import collections
import contextlib
import dataclasses
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

# For how long process 0 may work while the others wait; its death ends them long before.
ALONE_S = 24 * 3600
_KEY = "paras2s"
_FAILED = f"{_KEY}/failed"
_POLL_S = 1.0
# What JAX says where it knows neither addresses nor a cluster.
_NO_CLUSTER = "should be defined"


class DistributedError(RuntimeError):
    """Processes cannot find or no longer reach each other; the message names the missing ones."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the processes of a run find each other, and how long they wait.

    mode: "auto" starts what the three addresses below or the machine say (Cloud TPU VMs, GKE,
        Slurm, Open MPI), and nothing where nothing is said; "on" insists; "off" runs alone.
    coordinator: host:port of process 0. num_processes, process_id: all three, or none.
    start_s: for all processes to appear. heartbeat_s: silence after which a process counts as
        dead, which ends the others. barrier_s: how far processes may lag behind each other.
    """

    mode: str = "auto"
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    start_s: int = 300
    heartbeat_s: int = 60
    barrier_s: int = 600

    @property
    def is_explicit(self) -> bool:
        """Whether the addresses are given.

        Raises:
            DistributedError: some are, others are not.
        """
        given = (self.coordinator, self.num_processes, self.process_id)
        if any(value is None for value in given) and any(value is not None for value in given):
            raise DistributedError(
                "give all of --coordinator, --num_processes and --process_id, or none of them."
            )
        return self.coordinator is not None


@dataclasses.dataclass
class _Run:
    """What this process knows of its run.

    turns: how often each name of `on_main` was used. is_alone: the other processes wait in
    `on_main`. watch: the thread that looks whether another process has failed, until is_over.
    """

    settings: Settings = Settings()
    turns: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    is_alone: bool = False
    is_over: threading.Event = dataclasses.field(default_factory=threading.Event)
    watch: threading.Thread | None = None


_run = _Run()


def start(settings: Settings, environ: Mapping[str, str] = os.environ) -> None:
    """Joins the processes of this run; call it before anything that asks JAX for devices.

    Raises:
        DistributedError: the addresses are incomplete, or some process did not appear in time.
    """
    _run.settings = settings
    if _is_joined(settings, environ):
        _client().key_value_set(f"{_KEY}/host/{jax.process_index()}", socket.gethostname())
        _run.watch = threading.Thread(target=_watch_for_failure, daemon=True)
        _run.watch.start()


@contextlib.contextmanager
def joined(
    settings: Settings, describe: Callable[[BaseException], tuple[str, int]] | None = None
) -> Iterator[None]:
    """The part of a program that runs in step with the other processes: start to finish.

    describe: what an error is for people, and the status with which all processes end; by default
        its traceback, and 1. A lone process just raises it.
    """
    start(settings)
    try:
        _connect()
        yield
    except BaseException as error:
        if jax.distributed.is_initialized():
            fail(*(describe(error) if describe else (traceback.format_exc(), 1)))
        raise
    finish()


def _connect() -> None:
    """Has the devices meet while all processes are here.

    Those of CPUs look for each other at the first collective and give up after 30 s, by which one
    process may well be behind another later on.
    """
    if count() > 1:
        barrier("devices meet")
        multihost_utils.sync_global_devices(f"{_KEY}/devices meet")


def _is_joined(settings: Settings, environ: Mapping[str, str]) -> bool:
    explicit = settings.is_explicit
    # JAX would keep a lone task of Slurm to the first of its GPUs.
    lone = environ.get("SLURM_NTASKS") == "1" and not explicit
    if settings.mode == "off" or (settings.mode == "auto" and lone):
        return False
    # It would take SIGTERM, which is train/preemption.py's.
    jax.config.update("jax_enable_preemption_service", False)
    # Past its own limit JAX aborts the program with a page of C++.
    late = threading.Timer(settings.start_s, _end_late, [settings])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            settings.coordinator,
            settings.num_processes,
            settings.process_id,
            cluster_detection_method="deactivate" if explicit else None,
            initialization_timeout=settings.start_s + 60,
            heartbeat_timeout_seconds=settings.heartbeat_s,
            shutdown_timeout_seconds=settings.barrier_s,
        )
    except (ValueError, RuntimeError) as error:
        if settings.mode == "auto" and not explicit and _is_reason_to_be_alone(error):
            return False
        if _NO_CLUSTER in str(error):
            raise DistributedError(
                "--distributed=on, but JAX finds no cluster here: give --coordinator, "
                "--num_processes and --process_id."
            ) from error
        raise DistributedError(f"the processes cannot start: {_first_line(error)}") from error
    finally:
        late.cancel()
    return True


def _is_reason_to_be_alone(error: Exception) -> bool:
    """No cluster is around, or somebody in this program has used JAX before (a notebook)."""
    return _NO_CLUSTER in str(error) or "must be called before" in str(error)


def _end_late(settings: Settings) -> None:
    """Ends a start that waits in vain; runs in a thread of its own."""
    where = f" at {settings.coordinator}" if settings.coordinator else ""
    print(
        f"paras2s: not all processes appeared{where} within {settings.start_s} s; look whether "
        "every one was started and reaches that address, or raise --start_timeout.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def count() -> int:
    """How many processes take part in what runs now: 1 inside `on_main`."""
    return 1 if _run.is_alone or not jax.distributed.is_initialized() else jax.process_count()


def is_main() -> bool:
    """Whether this is process 0, which writes what is written once."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def barrier(name: str, timeout_s: float | None = None) -> None:
    """Waits until every process is here.

    timeout_s: by default the `barrier_s` of the settings.

    Raises:
        DistributedError: some did not come; names the barrier and, where known, which.
    """
    if count() == 1:
        return
    timeout_s = _run.settings.barrier_s if timeout_s is None else timeout_s
    try:
        _client().wait_at_barrier(f"{_KEY}/{name}", int(1000 * timeout_s))
    except jax.errors.JaxRuntimeError as error:
        raise DistributedError(
            f"barrier {name!r}: {_missing(str(error))} within {timeout_s:g} s; look at that "
            "process's log, or raise --barrier_timeout if it is only slow."
        ) from error


def on_main(name: str, function: Callable[[], Any]) -> Any:
    """Process 0 calls the function, the others wait at barrier `name`; all get the result.

    Inside, process 0 is as if there were no others. Its errors end them too. The result is JSON
    data.

    Raises:
        DistributedError: process 0 neither finished nor failed within a day.
    """
    if count() == 1:
        return function()
    key = f"{_KEY}/main/{name}/{_run.turns[name]}"
    _run.turns[name] += 1
    if jax.process_index() == 0:
        _run.is_alone = True
        try:
            result = function()
        finally:
            _run.is_alone = False
        _client().key_value_set(key, json.dumps(result))
        return result
    until = time.monotonic() + ALONE_S
    while time.monotonic() < until:
        with contextlib.suppress(TimeoutError):
            return json.loads(_value(key, 5 * _POLL_S))
    raise DistributedError(f"barrier {name!r}: process 0 did not come within {ALONE_S} s.")


def gather(tree: Any) -> Any:
    """Arrays of all devices as numpy arrays, whole on every process."""

    def whole(x):
        spread = isinstance(x, jax.Array) and not x.is_fully_addressable
        return multihost_utils.process_allgather(x, tiled=True) if spread else jax.device_get(x)

    return jax.tree.map(whole, tree)


def own_blocks(array: jax.Array) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """The blocks of an array that this process is to write: (where they lie, their values).

    Over all processes every element comes exactly once.
    """
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            yield shard.index, np.asarray(shard.data)


def fail(message: str, status: int = 1) -> NoReturn:
    """Ends this process, and with it the others, which print the message too.

    Without this, the others would wait for this one's heartbeats to time out.
    """
    print(message, file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        notice = {"process": jax.process_index(), "message": message, "status": status}
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            # Refused where another process has failed before.
            _client().key_value_set(_FAILED, json.dumps(notice))
        # Process 0 carries the messages: it stays until the others have looked.
        time.sleep(3 * _POLL_S if is_main() else 0)
    sys.stdout.flush()
    # Leaving as usual would wait for the others at JAX's shutdown.
    os._exit(status)


def finish() -> None:
    """Leaves the run: waits for the others, then lets go of them."""
    if jax.distributed.is_initialized():
        _run.is_over.set()
        if _run.watch:
            _run.watch.join(60 * _POLL_S)
        jax.distributed.shutdown()


def _client():
    """JAX's coordination client: barriers and small shared values have no public interface."""
    from jax._src import distributed

    return distributed.global_state.client


def _value(key: str, timeout_s: float) -> str:
    """The value of a key once some process has set it; TimeoutError after timeout_s."""
    try:
        return _client().blocking_key_value_get(key, int(1000 * timeout_s))
    except jax.errors.JaxRuntimeError as error:
        if str(error).startswith("DEADLINE_EXCEEDED"):
            raise TimeoutError(key) from error
        raise


def _named(process: int) -> str:
    """A process as people look for it: by number and host."""
    with contextlib.suppress(TimeoutError, jax.errors.JaxRuntimeError):
        return f"process {process} of {jax.process_count()} ({_value(f'{_KEY}/host/{process}', 1)})"
    return f"process {process} of {jax.process_count()}"


def _missing(error: str) -> str:
    """Who did not reach a barrier, from the service's message: ids in lines of their own."""
    _, _, listed = error.partition("timed out task names:")
    found = re.match(r"\s*((?:\d+\s+)*\d+)", listed)
    if not found:
        return f"not reached ({_first_line(error)})"
    return " and ".join(_named(int(number)) for number in found.group(1).split()) + " did not come"


def _first_line(error: object) -> str:
    return str(error).strip().split("\n", 1)[0]


def _watch_for_failure() -> None:
    """Ends this process when another one says that it failed; runs in a thread of its own."""
    while not _run.is_over.wait(_POLL_S):
        try:
            notice = json.loads(_client().key_value_try_get(_FAILED))
        except jax.errors.JaxRuntimeError:
            # Nobody has failed; or process 0 is gone, upon which JAX itself ends this process.
            continue
        if notice["process"] == jax.process_index():
            return
        how = "failed" if notice["status"] else "was stopped"
        print(
            f"{_named(notice['process'])} {how}, so this one ends: {notice['message']}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(notice["status"])
