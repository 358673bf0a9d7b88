"""The owner's side: a ring is registered with the agent of its host before its first reference leaves."""

from __future__ import annotations

import array
import contextlib
import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dray.agent.messages import MAX_MESSAGE, WITHDRAWN, Answer, Request
from dray.clock import Deadline
from dray.errors import ConfigError, DrayError, ProtocolError, TransportTimeout, Unreachable
from dray.forking import here, not_inherited
from dray.resources import Closing
from dray.ring import SharedRingBuffer
from dray.text import text_of
from dray.transport.lanes.socket import NO_SIGNAL, from_os_error

AGENT_VARIABLE: Final = "DRAY_AGENT"
"""Environment variable with the path of the socket at which the agent of this host takes registrations."""

ANSWER_SECONDS: Final = 1.0
"""How long the owner of a ring waits for the agent's answer."""

_LOG = logging.getLogger("dray.agent")


class Registration(Closing):
    """A ring whose payloads an agent serves once this process is dead.

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
        endpoints: the addresses of the heir, for `PayloadServer`.

    Raises:
        Unreachable: no agent listens there.
        TransportTimeout: it has not answered in time.
        ConfigError: the ring cannot be inherited, or the agent does not take it.
        ProtocolError: the answer is not one.
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
        request = Request(name, ring.readers, max_leases, tuple(lanes), host, secret)
        descriptors = ring.for_heir()
        self._mark = here[0]
        self._socket = not_inherited(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        try:
            self.endpoints = self._exchange(agent, request, descriptors, Deadline.after(timeout))
        except BaseException:
            self._socket.close()
            raise

    def _exchange(
        self, agent: Path, request: Request, descriptors: Sequence[int], deadline: Deadline
    ) -> tuple[str, ...]:
        where = text_of(agent)
        try:
            self._socket.settimeout(deadline.timeout)
            self._socket.connect(os.fsencode(agent))
            rights = array.array("i", descriptors)
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
            self._socket.sendmsg([request.encode()], ancillary, NO_SIGNAL)
            self._socket.settimeout(max(deadline.remaining, 0.001))
            message = self._socket.recv(MAX_MESSAGE)
        except TimeoutError as error:
            why = "the agent has not answered"
            raise TransportTimeout(why, endpoint=where, elapsed=deadline.elapsed) from error
        except OSError as error:
            raise from_os_error(error, where) from error
        if not message:
            raise Unreachable("the agent has closed the connection", endpoint=where)
        answer = Answer.decode(message)
        if answer.refused:
            raise ConfigError("heir", where, "an agent that takes the ring", f"refuses it: {answer.refused}")
        return answer.endpoints

    def close(self) -> None:
        """Withdraw the ring: its payloads end with it. Twice is fine; in a forked child nothing happens.

        To be called before the server is closed: consumers that do not reach it then know that the payloads end.
        """
        if here[0] == self._mark and self._socket.fileno() >= 0:
            self._socket.setblocking(False)
            with contextlib.suppress(OSError):  # the agent has ended, or does not read: it finds the ring closed
                self._socket.send(WITHDRAWN, NO_SIGNAL)
            self._socket.close()

    def __repr__(self) -> str:
        return f"<Registration {', '.join(self.endpoints)}>"


def register(
    ring: SharedRingBuffer,
    *,
    name: str,
    lanes: Sequence[str] = ("shm",),
    host: str = "127.0.0.1",
    secret: bytes | None = None,
    max_leases: int = 8,
) -> Registration | None:
    """Register a ring with the agent that ``$DRAY_AGENT`` names; None without one, and where it does not answer.

    That is no error: the payloads of this process then end with it, as one line of the log says.

    Args:
        ring: this and what follows as for `Registration`.
        name: what the agent calls this process.
        lanes: those of the ring's server.
        host: its address.
        secret: its secret.
        max_leases: payloads that a connection may hold.
    """
    agent = os.environ.get(AGENT_VARIABLE)
    if not agent:
        return None
    try:
        return Registration(
            ring, Path(agent), name=name, lanes=lanes, host=host, secret=secret, max_leases=max_leases
        )
    except (DrayError, ProtocolError) as error:
        _LOG.warning("no heir: %s; if this process is killed, its payloads are lost", error)
        return None
