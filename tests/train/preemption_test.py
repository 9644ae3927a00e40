import os
import signal
import threading

import pytest

from paras2s_jax.train import preemption


@pytest.fixture(autouse=True)
def handlers():
    """Puts the process's handlers back."""
    before = {number: signal.getsignal(number) for number in preemption.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


def test_a_watched_program_is_preempted_where_it_stands():
    reached = []
    with pytest.raises(preemption.Preempted), preemption.watch():
        reached.append("before")
        send(signal.SIGTERM)
        reached.append("after")
    assert reached == ["before"]
    # The end of the program is not disturbed by a scheduler that repeats itself.
    send(signal.SIGTERM)


def test_nothing_that_handles_errors_stops_it():
    with pytest.raises(preemption.Preempted), preemption.watch():
        try:
            send(signal.SIGTERM)
        except Exception:
            pytest.fail("an error handler took the preemption for an error")


def test_a_program_that_is_not_preempted_gets_its_handler_back():
    with preemption.watch():
        pass
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_deferred_signals_wait_to_be_asked_for():
    with preemption.watch(), preemption.Deferred() as signals:
        assert not signals.asked()
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert signals.asked() and signals.asked(last=True)
        with pytest.raises(preemption.Preempted):
            signals.stop()


def test_a_second_interrupt_stops_at_once(capfd):
    with preemption.Deferred() as signals:
        send(signal.SIGINT)
        assert "Ctrl-C again" in capfd.readouterr().err
        assert signals.asked()
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signals.stop()


def test_an_interrupt_is_not_forgotten_over_a_preemption():
    for order in (preemption.SIGNALS, preemption.SIGNALS[::-1]):
        with preemption.Deferred() as signals:
            for number in order:
                send(number)
            with pytest.raises(KeyboardInterrupt):
                signals.stop()


def test_other_threads_change_nothing():
    found = []

    def work():
        with preemption.Deferred() as signals:
            found.append(signals.asked())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
