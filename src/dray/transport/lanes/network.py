"""How a client reaches servers and waits for them: the one contract between its decisions and the machine."""

from __future__ import annotations

import socket
from collections.abc import Callable, Hashable
from typing import Protocol

from dray.clock import Deadline
from dray.errors import Unreachable
from dray.protocol.handshake import Lane
from dray.transport.lanes import tcp, ucx, unix
from dray.transport.lanes.base import Endpoint, Stream
from dray.transport.lanes.ucx_sockets import is_loopback
from dray.transport.lanes.ucx_worker import UcxWorker
from dray.transport.polling import PollWaiter, Wake, addresses_of


class Group(Hashable, Protocol):
    """What connections share that only one thread can use at a time: a UCX worker."""

    def close(self) -> None:
        """Its connections are closed. Twice is fine."""
        ...


class Waiter(Protocol):
    """Waits for one stream, for the thread that uses it."""

    def wait(self, stream: Stream, deadline: Deadline, awaited: str, endpoint: str) -> None:
        """Wait until there is something to do for a stream that is `idle`.

        Raises:
            TransportTimeout: the deadline came first; the message says what was awaited.
            BufferClosedError: the network is closed.
        """
        ...


class Network(Protocol):
    """Where connections come from, and what ends all their waits."""

    def fits(self, address: Endpoint) -> Callable[[Group], bool] | None:
        """Which groups can have a connection to the address; None where it needs none."""
        ...

    def make_group(self, address: Endpoint) -> Group | None:
        """A new group for connections to the address, or None where it needs none."""
        ...

    def connect(self, address: Endpoint, deadline: Deadline, group: Group | None) -> Stream:
        """A stream to the address; on the ucx lane its first exchange shows whether it stands.

        Raises:
            TransportError: it cannot be reached in time.
            BufferClosedError: the network is closed.
        """
        ...

    def waiter(self, lasting: bool = False) -> Waiter:
        """For one connection; one that is `lasting` waits although the network is closed."""
        ...

    def close(self) -> None:
        """End all waits with `BufferClosedError`. Twice is fine."""
        ...


class KernelNetwork:
    """The machine's own network.

    Args:
        wake: ends waits in other threads; without it, waits end by their deadlines.
    """

    def __init__(self, wake: Wake | None = None) -> None:
        self._wake = wake

    def fits(self, address: Endpoint) -> Callable[[Group], bool] | None:
        if address.lane is not Lane.UCX:
            return None
        loopback = is_loopback(address.host)
        return lambda group: isinstance(group, UcxWorker) and group.loopback is loopback

    def make_group(self, address: Endpoint) -> Group | None:
        return UcxWorker(is_loopback(address.host)) if address.lane is Lane.UCX else None

    def connect(self, address: Endpoint, deadline: Deadline, group: Group | None) -> Stream:
        if address.lane is Lane.SHM:
            return unix.connect(address.host, deadline)
        if address.lane is Lane.TCP:
            return tcp.connect(address.host, address.port, deadline, self._wake)
        assert isinstance(group, UcxWorker)
        # UCX asks the system's resolver itself, without a bound: it gets numeric addresses only.
        found = addresses_of(address.host, address.port, deadline, str(address), self._wake)
        for family, place in found:
            if family is socket.AF_INET:
                return ucx.connect(group, place[0], address.port)
        raise Unreachable("the host has no IPv4 address, which UCX needs", endpoint=str(address))

    def waiter(self, lasting: bool = False) -> Waiter:
        return PollWaiter(None if lasting else self._wake)

    def close(self) -> None:
        if self._wake is not None:
            self._wake.close()
