"""The owner's side: a ring is registered with the agent of its host before its first reference leaves."""

from __future__ import annotations

import array
import contextlib
import logging
import os
import select
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dray.agent.messages import MAX_MESSAGE, WITHDRAWN, Answer, Request
from dray.clock import Deadline, retry_pauses
from dray.errors import BufferClosedError, ConfigError, DrayError, TransportTimeout, Unreachable
from dray.forking import here, not_inherited
from dray.resources import Closing, needing
from dray.ring import SharedRingBuffer
from dray.ring.consumer_events import Bell
from dray.text import text_of
from dray.transport.lanes.socket import NO_SIGNAL, from_os_error

ANSWER_SECONDS: Final = 1.0
"""How long the owner of a ring waits for the agent's answer."""

_LOG = logging.getLogger("dray.agent")


class Registration(Closing):
    """A ring whose payloads an agent serves once this process is dead.

    A thread notices the end of the agent, and registers the ring again once there is another one at that path.

    Args:
        ring: as it is, without a reference that has left.
        agent: the socket of the agent.
        name: what the agent calls this process, in its log.
        lanes: those that the ring's server serves; the agent serves ``shm``, and ``tcp`` with a secret.
        host: where the server listens on other lanes than ``shm``.
        secret: that of the server.
        max_leases: that of the server.
        timeout: seconds to wait for the agent.

    Attributes:
        endpoints: the addresses of the heir, for `PayloadServer`. An agent that was restarted has that of the
            ``shm`` lane, if its folder is the same, and another one on the ``tcp`` lane.

    Raises:
        Unreachable: no agent listens there.
        TransportTimeout: it has not answered in time.
        ConfigError: the ring cannot be inherited, or the agent does not take it.
        ProtocolError: the answer is not one.
        OutOfResources: no descriptor is left.
    """

    def __init__(
        self,
        ring: SharedRingBuffer,
        agent: Path,
        *,
        name: str,
        lanes: Sequence[str] = ("shm",),
        host: str = "127.0.0.1",
        secret: bytes | None = None,
        max_leases: int = 8,
        timeout: float = ANSWER_SECONDS,
    ) -> None:
        self._ring, self._agent, self._timeout = ring, agent, timeout
        self._request = Request(name, ring.readers, max_leases, tuple(lanes), host, secret)
        self._mark = here[0]
        self._closed = False
        with contextlib.ExitStack() as made:
            with needing("the registration of a ring"):
                self._closing = made.enter_context(Bell(os.eventfd, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            self._socket, self.endpoints = self._register()
            made.pop_all()
        self._thread = threading.Thread(target=self._watch, name="dray-registration", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Withdraw the ring: its payloads end with it. Twice is fine; in a forked child nothing happens.

        To be called before the server is closed: consumers that do not reach it then know that the payloads end.
        """
        if here[0] != self._mark or self._closed:
            return
        self._closed = True
        self._closing.ring()
        self._thread.join()
        self._socket.setblocking(False)
        with contextlib.suppress(OSError):  # the agent has ended, or does not read: it finds the ring closed
            self._socket.send(WITHDRAWN, NO_SIGNAL)
        self._socket.close()
        self._closing.close()

    def __repr__(self) -> str:
        return f"<Registration {', '.join(self.endpoints)}>"

    # --- inside -----------------------------------------------------------------------------------------------

    def _register(self) -> tuple[socket.socket, tuple[str, ...]]:
        """A connection to the agent, and the addresses that it has answered. Raises as the class."""
        descriptors, deadline, where = self._ring.for_heir(), Deadline.after(self._timeout), text_of(self._agent)
        with needing("the registration of a ring"):
            connection = not_inherited(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        try:
            message = self._exchange(connection, descriptors, deadline)
            if not message:
                raise Unreachable("the agent has closed the connection", endpoint=where)
            answer = Answer.decode(message)
            if answer.refused:
                problem = f"{where} does not take the ring ({answer.refused})"
                raise ConfigError("heir", where, "must be an agent that takes it", problem)
        except TimeoutError as error:
            connection.close()
            raise TransportTimeout("no answer of the agent", endpoint=where, elapsed=deadline.elapsed) from error
        except BaseException as error:
            connection.close()
            if isinstance(error, OSError) and not isinstance(error, DrayError):
                raise from_os_error(error, where) from error
            raise
        return connection, answer.endpoints

    def _exchange(self, connection: socket.socket, descriptors: Sequence[int], deadline: Deadline) -> bytes:
        connection.settimeout(deadline.timeout)
        connection.connect(os.fsencode(self._agent))
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        connection.sendmsg([self._request.encode()], ancillary, NO_SIGNAL)
        connection.settimeout(max(deadline.remaining, 0.001))
        return connection.recv(MAX_MESSAGE)

    def _watch(self) -> None:
        """Register again whenever the agent has ended."""
        while self._wait(self._socket, None):
            name, why = self._request.name, "the agent has ended"
            _LOG.warning("no heir for %s until there is an agent again: %s", name, why)
            for pause in retry_pauses():
                if not self._wait(None, pause):
                    return
                try:
                    connection, endpoints = self._register()
                except BufferClosedError:
                    return
                except DrayError:
                    continue
                self._socket.close()
                self._socket = connection
                lost = set(self.endpoints) - set(endpoints)
                more = f"; it does not have the addresses {', '.join(sorted(lost))}" if lost else ""
                _LOG.warning("%s has an heir again%s", name, more)
                break

    def _wait(self, connection: socket.socket | None, seconds: float | None) -> bool:
        """Wait until the connection has ended, or for so long; False once this object is closed."""
        poll = select.poll()
        poll.register(self._closing.fileno(), select.POLLIN)
        if connection is not None:
            poll.register(connection.fileno(), select.POLLIN)  # the agent sends nothing more: it is the end
        poll.poll(None if seconds is None else seconds * 1000)
        return not self._closed


def register(
    ring: SharedRingBuffer,
    agent: Path | None,
    *,
    name: str,
    lanes: Sequence[str] = ("shm",),
    host: str = "127.0.0.1",
    secret: bytes | None = None,
    max_leases: int = 8,
) -> Registration | None:
    """Register a ring with an agent; None without one, and where it does not answer, or does not take it.

    That is no error: the payloads of this process then end with it, as one line of the log states.

    Args:
        ring: this and what follows as for `Registration`.
        agent: its socket, such as that of `find_agent`.
        name: what the agent calls this process.
        lanes: those of the ring's server.
        host: its address.
        secret: its secret.
        max_leases: payloads that a connection may hold.
    """
    if agent is None:
        return None
    try:
        return Registration(ring, agent, name=name, lanes=lanes, host=host, secret=secret, max_leases=max_leases)
    except DrayError as error:
        _LOG.warning("no heir: %s; if this process is killed, its payloads are lost", error)
        return None
