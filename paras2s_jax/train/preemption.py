"""SIGTERM and Ctrl-C: a run that is told to stop saves first, and can be started again."""

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paras2s_jax.train import distributed

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempted(BaseException):
    """The run was told to stop by SIGTERM and goes on when it is started again.

    No Exception, like KeyboardInterrupt: nothing that handles errors is to stop it.
    """


@contextlib.contextmanager
def watch() -> Iterator[None]:
    """While inside, SIGTERM raises Preempted wherever the main thread is.

    For a whole program: parts of the work that need an end of their own use `Deferred` inside.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Preempted

    before = signal.signal(signal.SIGTERM, stop)
    after = before
    try:
        yield
    except Preempted:
        # The program is about to end; schedulers repeat themselves.
        after = signal.SIG_IGN
        raise
    finally:
        signal.signal(signal.SIGTERM, after)


class Deferred:
    """While inside (`with`), SIGTERM and Ctrl-C only ask to stop, at the end of a step.

    A second Ctrl-C stops at once. Signals reach the main thread alone: in others nothing changes.
    """

    def __init__(self):
        self._received: int | None = None
        self._before: dict[int, object] = {}
        self._asked: jax.Array | None = None

    def __enter__(self) -> "Deferred":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            # None is a handler that Python did not install and cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGINT or self._received is None:
            self._received = number
        if number == signal.SIGINT:
            # Not print: the signal may have interrupted one.
            os.write(2, b"\nfinishing the step and saving; Ctrl-C again stops at once\n")

    def asked(self, *, last: bool = False) -> bool:
        """Whether to stop now: the same on every process, called by all of them once a step.

        Of several processes, any can ask; it takes one step more to hear of it, because nobody
        waits for the step under way. last: there are no more steps, so that waiting costs nothing.
        """
        mine = self._received is not None
        if distributed.count() == 1:
            return mine
        heard, self._asked = self._asked, _asked_anywhere(mine)
        heard = self._asked if last else heard
        return heard is not None and bool(heard)

    def stop(self) -> None:
        """Raises what the signal stands for."""
        if self._received == signal.SIGINT:
            raise KeyboardInterrupt
        raise Preempted


def _asked_anywhere(mine: bool) -> jax.Array:
    """bool[]: whether any process says so. Returns before it is known."""
    mesh = Mesh(np.array(jax.devices()), ("device",))
    spread = NamedSharding(mesh, PartitionSpec("device"))
    votes = np.full(jax.local_device_count(), mine)
    return _any(mesh)(jax.make_array_from_process_local_data(spread, votes))


@functools.cache
def _any(mesh: Mesh):
    return jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))
