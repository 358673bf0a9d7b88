"""The contract that every lane's connections keep, and the addresses they are found under.

A `Stream` has two channels: *messages* (handshake and frames, of sizes both ends know) and *payloads*. Its methods
never wait. Whoever drives it waits on `fileno()` when `idle()` allows, for as long as a deadline lets it: the
server's thread for all its streams at once, a client for the one it uses.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401  (now: without a descriptor `encode` could not load it)
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dray.errors import ConfigError
from dray.path_text import bytes_of
from dray.private_directory import MAX_SOCKET_PATH
from dray.protocol.contract import Outgoing
from dray.protocol.handshake import Lane
from dray.protocol.ref import has_control


class Stream(Protocol):
    """One connection.

    Every method raises a `TransportError` when the connection has failed: `ConnectionClosed` when the peer
    closed it between messages, `MessageTruncated` within one, `ConnectionReset` for anything less orderly.
    """

    lane: Lane

    def fileno(self) -> int:
        """The descriptor that becomes readable when there is something to do."""
        ...

    def idle(self) -> bool:
        """Get ready to wait on `fileno`; False if there is already something to do."""
        ...

    @property
    def wants_write(self) -> bool:
        """`flush` waits for room: wait for writability."""
        ...

    def receive(self, size: int, most: int = 1) -> memoryview | None:
        """The next message of exactly `size` bytes, valid until the next call; None if it is not all here yet.

        Of messages that are all of that size, up to `most` come together if they are here, one behind the other.
        After None, call `idle` and wait before looking again.
        """
        ...

    def send(self, items: Sequence[Outgoing], descriptor: int | None = None) -> bool:
        """Send messages and payloads, in order; True when all has left, as `flush` would say.

        Otherwise their memory belongs to the stream until `flush` says so.
        """
        ...

    def flush(self) -> bool:
        """Push on with sending; True when all that was queued has left and its memory is free again."""
        ...

    def expect(self, target: memoryview, tag: int) -> None:
        """Name the memory for the payload that answers the request about to be sent with `tag`."""
        ...

    def payload_arrived(self, nbytes: int) -> bool:
        """True when the oldest expected payload is complete; `nbytes` is what STATUS said, 0 if there is none."""
        ...

    def progress(self) -> object:
        """A value that changes while bytes travel in either direction, as far as this end can see that."""
        ...

    def close(self) -> None:
        """End the connection at once; what was not flushed is lost. Twice is fine."""
        ...

    @property
    def drained(self) -> bool:
        """After `close`: nothing reads or writes memory that was given to this stream any more."""
        ...


class Listener(Protocol):
    """Where connections come in."""

    endpoint: str

    def accept(self) -> Stream | None:
        """The next connection, or None when there is none."""
        ...

    def close(self) -> None:
        """Stop listening. Twice is fine."""
        ...


SCHEMES = {"unix": Lane.SHM, "tcp": Lane.TCP, "ucx": Lane.UCX}
LANE_NAMES = tuple(lane.label for lane in Lane)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address, taken apart.

    Attributes:
        lane: the lane that serves it.
        host: host name or numeric address; on the Unix lane the socket's path, as `dray.path_text` has it.
        port: port number; 0 on the Unix lane.
    """

    lane: Lane
    host: str
    port: int = 0

    @classmethod
    def parse(cls, address: str) -> Endpoint:
        """``"unix:PATH"``, ``"tcp:HOST:PORT"`` or ``"ucx:HOST:PORT"``; an IPv6 host stands in brackets.

        Raises:
            ConfigError: it is none of these.
        """
        return _parse(address)

    def __str__(self) -> str:
        if self.lane is Lane.SHM:
            return f"unix:{self.host}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.lane.label}:{host}:{self.port}"


@functools.lru_cache(maxsize=4096)
def _parse(address: str) -> Endpoint:
    if has_control(address):
        raise ConfigError("endpoint", address, "an address without control characters")
    scheme, _, rest = address.partition(":")
    lane = SCHEMES.get(scheme)
    if lane is Lane.SHM and _is_path(rest):
        return Endpoint(lane, rest)
    host, _, digits = rest.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    port = int(digits) if digits.isascii() and digits.isdecimal() and len(digits) < 6 else 0
    if lane is None or lane is Lane.SHM or not _is_host(host) or not 0 < port < 65536:
        raise ConfigError("endpoint", address, "unix:PATH, tcp:HOST:PORT or ucx:HOST:PORT")
    return Endpoint(lane, host, port)


def _is_path(text: str) -> bool:
    """A Unix socket can have this path: an address comes from elsewhere."""
    try:
        encoded = bytes_of(text)
    except UnicodeEncodeError:
        return False
    return 0 < len(encoded) <= MAX_SOCKET_PATH and b"\0" not in encoded


def _is_host(text: str) -> bool:
    """The system can be asked for this host."""
    try:
        return bool(text.encode("idna")) and "\0" not in text
    except UnicodeError:
        return False
