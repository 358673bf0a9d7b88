"""`Exclusive`: a lock that its own thread does not wait for, and that signal handlers cannot break."""

import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from dray.errors import StreamError
from dray.exclusive import Exclusive

INTERRUPTS = 300
MAX_CALLS = 100_000


class Alarm(Exception):
    """What the signal handler raises."""


@pytest.fixture(name="interrupted")
def _interrupted() -> Iterator[Callable[[Callable[[], object], float], bool]]:
    """Repeats a call in which a signal handler raises, so many seconds after its begin.

    False if the exception was lost, as it is where the interpreter calls a function of its own in between.
    """

    def handler(*_: object) -> None:
        raise Alarm

    def interrupted(call: Callable[[], object], seconds: float) -> bool:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            for _ in range(MAX_CALLS):
                call()
        except Alarm:
            return True
        return False

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
    interrupted: Callable[[Callable[[], object], float], bool],
) -> None:
    lock = Exclusive()

    def call() -> None:
        with lock.call():
            pass

    raised = 0
    for number in range(INTERRUPTS):
        for each in (call, lambda: lock.try_call(int, 0)):
            raised += interrupted(each, 50e-6 + number * 1e-6)
            assert not lock.entered
    assert raised > INTERRUPTS
    assert taken_elsewhere(lock)
