"""UCX workers and listeners: how they end."""

import contextlib
import functools
import select

import pytest
from transport_fixtures import wait_until

from dray.errors import TransportError
from dray.transport import ucx
from dray.transport.ucx import UcxListener
from dray.transport.ucx_worker import UcxWorker


def test_w9_a_connection_that_comes_while_a_worker_is_busy_until_its_end_is_refused() -> None:
    """Nobody has looked at it when its listener is closed, nor until its worker is: the client hears of it."""
    with contextlib.closing(UcxWorker(True)) as mine:
        theirs = UcxWorker(True)
        listener = UcxListener(theirs, "127.0.0.1")
        stream = ucx.connect(mine, "127.0.0.1", int(listener.endpoint.rpartition(":")[2]))
        with contextlib.closing(stream):
            assert theirs.arm()
            waiting = functools.partial(select.select, [theirs.fileno()], [], [], 0)
            wait_until(lambda: mine.progress() or waiting()[0], "the connection to come")
            listener.close()
            wait_until(lambda: theirs._settled.expired, "the moment given to connections to pass")
            theirs.close()
            with pytest.raises(TransportError):
                wait_until(lambda: mine.progress() or stream.receive(64), "the client to hear of it", 2)
