"""The connection between the head and the process on another node, and what is said over it.

| from | | |
|---|---|---|
| node | `started` | its replicas have been started, with these numbers |
| node | `alive` | these replicas run, and are not stopped |
| node | `ended` | a replica has ended, with this exit code |
| head | `signal` | send a replica this signal |
| head | `kill` | kill a replica and its group |
| head | `goodbye` | the job is over: end what is left |

When the connection ends otherwise, the other end is gone.
"""

from __future__ import annotations

import socket
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from dray.runtime.framing import Frames, FramingError, framed
from dray.runtime.messages import MAX_MEMBERS, Message, Name

_LARGEST = 1 << 20
_CHUNK = 1 << 16


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
        self._frames = Frames(_LARGEST)
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
            while chunk := self._socket.recv(_CHUNK):
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
