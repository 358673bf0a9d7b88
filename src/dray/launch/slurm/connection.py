"""TCP connections between nodes: made within a bound, and ended when the other machine is silent."""

from __future__ import annotations

import math
import socket
from contextlib import ExitStack

from dray.admission import BACKLOG
from dray.clock import Deadline
from dray.errors import ConfigError, DrayError, TransportError, TransportTimeout, Unreachable
from dray.launch.slurm.greeting import NONCE, PROOF, Guest, Purpose

_PROBES = 3


def listen(host: str) -> socket.socket:
    """A listening socket at `host`, on any free port; it does not block.

    Raises:
        ConfigError: this machine has no such address.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.bind((host, 0))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError("slurm.interface", host, f"an address of this machine ({error.strerror})") from error
    return listener


def end_when_silent(connected: socket.socket, seconds: float) -> None:
    """Let the connection fail when the other machine has not answered for `seconds`, whether or not anything is
    sent. Small messages are sent at once."""
    interval = max(1, math.floor(seconds / (_PROBES + 1)))
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, interval)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(seconds * 1000))


def connect(
    address: tuple[str, int], secret: bytes, purpose: Purpose, deadline: Deadline, silence: float
) -> socket.socket:
    """A connection to the head that has shown that it knows the secret; it does not block.

    Args:
        silence: seconds, as for `end_when_silent`.

    Raises:
        TransportError: nobody answers there in time.
        AuthenticationError: somebody else does.
    """
    guest, endpoint = Guest(secret, purpose), f"tcp:{address[0]}:{address[1]}"
    with ExitStack() as opened:
        connected = opened.enter_context(_connect(address, deadline, endpoint))
        end_when_silent(connected, silence)
        try:
            nonce = _receive(connected, NONCE, deadline, endpoint)
            connected.settimeout(max(0.001, deadline.remaining))
            connected.sendall(guest.answer(nonce), socket.MSG_NOSIGNAL)
            guest.check(_receive(connected, PROOF, deadline, endpoint))
            connected.setblocking(False)
        except DrayError:
            raise
        except TimeoutError as error:
            raise TransportTimeout(
                "the head does not answer", endpoint=endpoint, elapsed=deadline.elapsed
            ) from error
        except OSError as error:
            raise TransportError(f"the head is gone: {error.strerror}", endpoint=endpoint) from error
        opened.pop_all()
        return connected


def _connect(address: tuple[str, int], deadline: Deadline, endpoint: str) -> socket.socket:
    try:
        return socket.create_connection(address, timeout=max(0.001, deadline.remaining))
    except OSError as error:
        message = f"the head cannot be reached: {error}"
        raise Unreachable(message, endpoint=endpoint, elapsed=deadline.elapsed) from error


def _receive(connected: socket.socket, count: int, deadline: Deadline, endpoint: str) -> bytes:
    received = b""
    while len(received) < count:
        connected.settimeout(max(0.001, deadline.remaining))
        chunk = connected.recv(count - len(received))
        if not chunk:
            raise TransportError("the head does not want this connection", endpoint=endpoint)
        received += chunk
    return received
