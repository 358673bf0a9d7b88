"""Messages between processes of a job on a byte stream: between the ranks of a policy group, and between nodes.

A message is JSON with its length, 4 bytes in network order, before it.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from types import TracebackType
from typing import Annotated, Literal, Self, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from dray.clock import Deadline
from dray.errors import ControlPlaneError
from dray.forking import not_inherited
from dray.jobs.messages.models import MAX_MEMBERS, Message, Name
from dray.jobs.process import StopFlag

# --- framing -----------------------------------------------------------------------------------------------------

_LENGTH = struct.Struct("!I")


class FramingError(ControlPlaneError):
    """What comes over a stream is no message."""


class Frames:
    """Takes a stream apart into the bodies of messages.

    Args:
        largest: bytes that a body may have.
    """

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._received = bytearray()

    def feed(self, chunk: bytes) -> None:
        """Add what was received."""
        self._received += chunk

    def take(self) -> bytes | None:
        """The body of the first message that was not taken, if it is there as a whole.

        Raises:
            FramingError: it is announced as larger than allowed.
        """
        if len(self._received) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._received)
        if length > self._largest:
            raise FramingError(f"a message of {length} bytes was announced")
        end = _LENGTH.size + length
        if len(self._received) < end:
            return None
        body = bytes(self._received[_LENGTH.size : end])
        del self._received[:end]
        return body


def framed(message: Message) -> bytes:
    """`message` as it goes over a stream."""
    body = message.model_dump_json().encode()
    return _LENGTH.pack(len(body)) + body


# --- group channel -----------------------------------------------------------------------------------------------

# Messages between the ranks of a policy group, over a connection that the launcher has made for each rank.
#
# On one machine that is a socket pair: each end notices at once when the other is gone, however that came about,
# as the kernel closes the sockets of a process that has ended. Between machines it is a TCP connection, which also
# ends when the other machine is silent.

_MAX_RANK_MESSAGE = 256 << 20
_CHUNK = 1 << 16
_M = TypeVar("_M", bound=Message)


class GroupLostError(ControlPlaneError):
    """Another rank of the policy group is gone: the step is void, and this replica must end."""


class RankCommand(Message):
    """What the first rank tells the others, in this order:

    | what | |
    |---|---|
    | share | while the trainers are set up: `text` is what the first rank's gave to `PolicyGroup.share` |
    | begin | load from the folder `text`, which is this rank's; nothing if it is empty |
    | read | read those of `references` that were not read ahead; answered with those that failed |
    | train | train on the payloads `identities`, and meanwhile read `references` ahead; answered when done |
    | weights | join in `PolicyTrainer.weights` |
    | save | save into the folder `text`, which is this rank's; answered when done |
    | end | the job is over |
    """

    what: Literal["share", "begin", "read", "train", "weights", "save", "end"]
    text: str = ""
    references: list[str] = []
    versions: list[Annotated[int, Field(ge=0)]] = []
    work_items: list[Annotated[int, Field(ge=0)]] = []
    metadata: list[str] = []
    identities: list[str] = []


class RankReply(Message):
    """What a rank answers; `failed` maps the identity of a payload to ``"stale"`` or ``"lost"``."""

    failed: dict[str, Literal["stale", "lost"]] = {}


class Channel:
    """One end of the connection of two ranks.

    Args:
        connected: a stream socket; closed with the channel.
        peer: the other rank's name, for messages.
        stop: once it is set, the peer has `grace` seconds for each message.
    """

    def __init__(self, connected: socket.socket, peer: str, stop: StopFlag, grace: float) -> None:
        self.peer = peer
        self._socket = not_inherited(connected)
        connected.setblocking(False)
        self._grace = grace
        self._frames = Frames(_MAX_RANK_MESSAGE)
        self._woken = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closed = False
        self._lock = threading.Lock()
        stop.on_set(self._wake)

    def send(self, message: Message) -> None:
        """Send `message`.

        Raises:
            GroupLostError: the peer is gone, or does not read.
        """
        try:
            self._socket.settimeout(self._grace)
            self._socket.sendall(framed(message), socket.MSG_NOSIGNAL)
            self._socket.setblocking(False)
        except OSError as error:
            raise GroupLostError(f"{self.peer} takes no messages any more: {error}") from error

    def receive(self, kind: type[_M]) -> _M:
        """The next message, as soon as it comes: the peer may train for as long as it takes.

        Raises:
            GroupLostError: the peer is gone, or its message is not a `kind`, or `stop` is set and none came in
                time.
        """
        poll, deadline = select.poll(), Deadline.after(None)
        poll.register(self._socket, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        while (body := self._taken()) is None:
            if deadline.expired:
                raise GroupLostError(f"{self.peer} did not answer before the end", elapsed=deadline.elapsed)
            timeout = deadline.timeout
            for descriptor, _ in poll.poll(None if timeout is None else timeout * 1000):
                if descriptor == self._woken:
                    poll.unregister(self._woken)
                    deadline = Deadline.after(self._grace)
                else:
                    self._receive_more()
        try:
            return kind.model_validate_json(body)
        except ValidationError as error:
            raise GroupLostError(f"{self.peer} sent something else than it must: {error}") from error

    @property
    def lost(self) -> bool:
        """Whether the peer is gone."""
        try:
            return self._socket.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Close the connection. Twice is fine."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._socket.close()
                os.close(self._woken)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wake(self) -> None:
        with self._lock:
            if not self._closed:
                os.eventfd_write(self._woken, 1)

    def _receive_more(self) -> None:
        try:
            chunk = self._socket.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            raise GroupLostError(f"{self.peer} is gone: {error}") from error
        if not chunk:
            raise GroupLostError(f"{self.peer} is gone")
        self._frames.feed(chunk)

    def _taken(self) -> bytes | None:
        """The body of the first message, if it is there as a whole."""
        try:
            return self._frames.take()
        except FramingError as error:
            raise GroupLostError(f"{self.peer} does not keep to the protocol: {error}") from error


# --- link --------------------------------------------------------------------------------------------------------

# The connection between the head and the process on another node, and what is said over it.
#
# | from | | |
# |---|---|---|
# | node | `started` | its replicas have been started, with these numbers |
# | node | `alive` | these replicas run, and are not stopped |
# | node | `ended` | a replica has ended, with this exit code |
# | head | `signal` | send a replica this signal |
# | head | `kill` | kill a replica and its group |
# | head | `goodbye` | the job is over: end what is left |
#
# When the connection ends otherwise, the other end is gone.

_MAX_NODE_MESSAGE = 1 << 20
_NODE_CHUNK = 1 << 16


class Started(Message):
    """From a node: the pids of its replicas, by name."""

    what: Literal["started"] = "started"
    pids: dict[Name, Annotated[int, Field(gt=0)]]


class Alive(Message):
    """From a node, in intervals: the replicas whose processes run."""

    what: Literal["alive"] = "alive"
    names: Annotated[list[Name], Field(max_length=MAX_MEMBERS)]


class Ended(Message):
    """From a node: how a replica ended, with the exit code as `subprocess` gives it.

    `asked` is the number of the signal with which the node itself has had it end, or 0.
    """

    what: Literal["ended"] = "ended"
    name: Name
    code: int
    asked: Annotated[int, Field(ge=0, le=64)] = 0


class SendSignal(Message):
    """From the head: send a replica a signal."""

    what: Literal["signal"] = "signal"
    name: Name
    number: Annotated[int, Field(ge=1, le=64)]


class Kill(Message):
    """From the head: kill a replica, and what is in its group."""

    what: Literal["kill"] = "kill"
    name: Name


class Goodbye(Message):
    """From the head: the job is over."""

    what: Literal["goodbye"] = "goodbye"


Said = Started | Alive | Ended | SendSignal | Kill | Goodbye
_SAID: TypeAdapter[Said] = TypeAdapter(Annotated[Said, Field(discriminator="what")])


class Link:
    """One end of the connection. Nothing here waits.

    Args:
        connected: a stream socket that does not block; closed with the link.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._frames = Frames(_MAX_NODE_MESSAGE)
        self.lost = False

    def fileno(self) -> int:
        """Readable when there is something to receive, or the other end is gone."""
        return self._socket.fileno()

    def send(self, message: Said) -> None:
        """Send `message`. An end that does not read the few that there are counts as gone."""
        try:
            data = framed(message)
            self.lost = self.lost or self._socket.send(data, socket.MSG_NOSIGNAL) < len(data)
        except OSError:
            self.lost = True

    def receive(self) -> list[Said]:
        """What has come and was not received before; afterwards `lost` says whether the other end is gone."""
        try:
            while chunk := self._socket.recv(_NODE_CHUNK):
                self._frames.feed(chunk)
            self.lost = True
        except BlockingIOError:
            pass
        except OSError:
            self.lost = True
        said = []
        try:
            while (body := self._frames.take()) is not None:
                said.append(_SAID.validate_json(body))
        except (FramingError, ValidationError):  # it knows the secret, but is of another version
            self.lost = True
        return said

    def finish_sending(self) -> None:
        """Say nothing more; the other end learns that when it has received everything."""
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            self.lost = True

    def close(self) -> None:
        """Close the connection. Twice is fine."""
        self.lost = True
        self._socket.close()
