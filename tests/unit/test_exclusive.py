"""`Exclusive`: a lock that its own thread does not wait for, and that signal handlers cannot break."""

import itertools
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from dray.errors import StreamError
from dray.exclusive import Exclusive

INTERRUPTS = 300


class Alarm(Exception):
    """What the signal handler raises."""


@pytest.fixture(name="interrupted")
def _interrupted() -> Iterator[Callable[[Callable[[], object], float], None]]:
    """Repeats a call until a signal handler raises in it, so many seconds after its begin."""

    def handler(*_: object) -> None:
        raise Alarm

    def interrupted(call: Callable[[], object], seconds: float) -> None:
        def repeat() -> None:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            for _ in itertools.count():
                call()

        with pytest.raises(Alarm):
            repeat()

    before = signal.signal(signal.SIGALRM, handler)
    yield interrupted
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def taken_elsewhere(lock: Exclusive) -> bool:
    """Another thread gets it without a wait."""
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(lock.try_call(lambda: True, False)))
    thread.start()
    thread.join()
    return found[0]


def test_another_thread_gets_it_when_it_is_free() -> None:
    lock = Exclusive()
    assert taken_elsewhere(lock)
    with lock.call():
        assert not taken_elsewhere(lock)
    assert taken_elsewhere(lock)
    assert lock.try_call(lambda: taken_elsewhere(lock), True) is False
    assert taken_elsewhere(lock)


def test_its_own_thread_is_refused() -> None:
    lock = Exclusive()
    with lock.call():
        assert lock.try_call(lambda: "called", "refused") == "refused"
        with pytest.raises(StreamError, match="in progress in this thread"):
            lock.call()
    assert not lock.entered


def test_an_exception_of_a_signal_handler_does_not_leave_it_acquired(
    interrupted: Callable[[Callable[[], object], float], None],
) -> None:
    lock = Exclusive()

    def call() -> None:
        with lock.call():
            pass

    for number in range(INTERRUPTS):
        for each in (call, lambda: lock.try_call(int, 0)):
            interrupted(each, 50e-6 + number * 1e-6)
            assert not lock.entered
    assert taken_elsewhere(lock)
