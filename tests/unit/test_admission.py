"""What bounds connections that have not proven the secret, without connections."""

import errno
import logging
import math
import resource
import socket

import pytest
from forked_child import run_in_child
from simulation import ManualClock

from dray.admission import (
    ACCEPT_PAUSE_SECONDS,
    MAX_ACCEPTED,
    MAX_UNPROVEN,
    AcceptPause,
    LineLimit,
    Unproven,
    accept,
)
from dray.resources import raise_descriptor_limit

LOGGER = logging.getLogger("dray.test")


def test_one_more_than_the_limit_displaces_the_oldest() -> None:
    unproven: Unproven[str] = Unproven(ManualClock(), limit=2)
    assert [unproven.add(name) for name in "abcd"] == [None, None, "a", "b"]
    assert list(unproven) == ["c", "d"]


def test_silent_connections_are_displaced_before_those_in_the_handshake() -> None:
    unproven: Unproven[str] = Unproven(ManualClock(), limit=2)
    unproven.add("started")
    unproven.received("started")
    assert [unproven.add(name) for name in "abc"] == [None, "a", "b"]
    unproven.received("c")
    assert unproven.add("d") == "started"
    assert list(unproven) == ["d", "c"]


def test_a_connection_that_has_proven_the_secret_is_displaced_by_none() -> None:
    unproven: Unproven[str] = Unproven(ManualClock(), limit=1)
    unproven.add("proven")
    unproven.discard("proven")
    unproven.discard("proven")
    assert [unproven.add("a"), unproven.add("b")] == [None, "a"]


def test_a_proof_is_late_by_the_time_since_acceptance_whatever_was_sent() -> None:
    clock = ManualClock()
    unproven: Unproven[str] = Unproven(clock, seconds=10.0)
    assert unproven.remaining == math.inf
    unproven.add("started")
    clock.advance(4.0)
    unproven.add("silent")
    unproven.received("started")
    assert unproven.remaining == 6.0
    clock.advance(6.0)
    assert unproven.overdue() == ["started"]
    assert "started" not in unproven
    assert unproven.remaining == 4.0
    clock.advance(5.0)
    assert unproven.remaining == 0.0
    assert (unproven.overdue(), len(unproven)) == (["silent"], 0)


def test_several_batches_are_accepted_before_one_of_the_first_is_displaced() -> None:
    assert MAX_UNPROVEN >= 8 * MAX_ACCEPTED


def test_one_line_passes_in_a_period_and_the_next_has_the_number_left_out() -> None:
    clock = ManualClock()
    lines = LineLimit(10.0, clock)
    assert [lines.passes() for _ in range(4)] == ["", None, None, None]
    clock.advance(10.0)
    assert [lines.passes(), lines.passes()] == [" (similar lines left out: 3)", None]
    clock.advance(25.0)
    assert lines.passes() == " (similar lines left out: 1)"


def test_failing_accepts_are_one_line_a_second(caplog: pytest.LogCaptureFixture) -> None:
    clock = ManualClock()
    pause = AcceptPause(LOGGER, clock)
    assert pause.remaining == 0.0
    for _ in range(50):
        pause.begin(OSError(errno.EMFILE, "Too many open files"))
        assert pause.remaining == ACCEPT_PAUSE_SECONDS
        clock.advance(0.1)
    assert len(caplog.records) == 5
    assert "Too many open files; the next attempt follows in 1 s" in caplog.messages[0]
    assert caplog.messages[1].endswith("(similar lines left out: 9)")
    clock.advance(1.0)
    assert pause.remaining == 0.0


def test_a_connection_that_has_failed_before_it_was_accepted_is_none() -> None:
    class Listening(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            raise OSError(errno.EPROTO, "Protocol error")

    with Listening() as listening:
        assert accept(listening) is None


def test_a_process_without_descriptors_cannot_accept() -> None:
    def check() -> None:
        with (
            socket.create_server(("127.0.0.1", 0)) as listening,
            socket.create_connection(listening.getsockname()),
        ):
            listening.setblocking(False)
            resource.setrlimit(resource.RLIMIT_NOFILE, (listening.fileno(), listening.fileno()))
            with pytest.raises(OSError, match="Too many open files") as raised:
                accept(listening)
            assert raised.value.errno == errno.EMFILE

    assert run_in_child(check) == ""


def test_the_limit_of_descriptors_is_raised_to_the_hard_one() -> None:
    def check() -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
        assert raise_descriptor_limit() == hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
        assert raise_descriptor_limit() == hard

    assert run_in_child(check) == ""
