"""Waiting for one stream."""

import contextlib
import socket

import pytest

from dray.clock import Deadline
from dray.errors import TransportTimeout
from dray.transport.lanes import SHM
from dray.transport.lanes.socket import UnixStream
from dray.transport.polling import PollWaiter


def test_unread_input_does_not_end_a_wait_for_room() -> None:
    left, right = socket.socketpair()
    stream = UnixStream(left, SHM)
    with right, contextlib.closing(stream):
        right.send(b"an answer to something else")
        while stream.send([bytes(65536)]):
            pass
        assert stream.wants_write
        with pytest.raises(TransportTimeout):
            PollWaiter(None).wait(stream, Deadline.after(0.05), "room", "unix:here")
