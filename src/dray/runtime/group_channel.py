"""Messages between the ranks of a policy group, over a connection that the launcher has made for each rank.

On one machine that is a socket pair: each end notices at once when the other is gone, however that came about, as
the kernel closes the sockets of a process that has ended. Between machines it is a TCP connection, which also ends
when the other machine is silent.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from types import TracebackType
from typing import Annotated, Literal, Self, TypeVar

from pydantic import Field, ValidationError

from dray.clock import Deadline
from dray.errors import ControlPlaneError
from dray.forking import not_inherited
from dray.runtime.framing import Frames, FramingError, framed
from dray.runtime.messages import Message
from dray.runtime.process import StopFlag

_LARGEST = 256 << 20
_CHUNK = 1 << 16
_M = TypeVar("_M", bound=Message)


class GroupLostError(ControlPlaneError):
    """Another rank of the policy group is gone: the step is void, and this replica must end."""


class Order(Message):
    """What the first rank tells the others, in this order:

    | what | |
    |---|---|
    | share | while the trainers are set up: `text` is what the first rank's gave to `PolicyGroup.share` |
    | begin | load from the folder `text`, which is this rank's; nothing if it is empty |
    | read | read the payloads of `references`; answered with those that failed |
    | train | train on the payloads `identities`, in this order; answered when done |
    | weights | join in `PolicyTrainer.weights` |
    | save | save into the folder `text`, which is this rank's; answered when done |
    | end | the job is over |
    """

    what: Literal["share", "begin", "read", "train", "weights", "save", "end"]
    text: str = ""
    references: list[str] = []
    versions: list[Annotated[int, Field(ge=0)]] = []
    identities: list[str] = []


class Answer(Message):
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
        self._frames = Frames(_LARGEST)
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
