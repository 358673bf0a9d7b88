"""Streams without sockets, for tests of the server's connections."""

from collections.abc import Sequence
from typing import Any

from dray.errors import ConnectionClosed
from dray.protocol.frames import FRAME_BYTES, Frame, Outgoing, parse
from dray.protocol.handshake import ClientHandshake
from dray.transport.lanes import UCX
from dray.transport.lanes.base import Lane


class SilentStream:
    """A stream whose peer sends nothing."""

    worker: Any = "any"
    peer_pid = None
    wants_write = False

    def __init__(self, lane: Lane = UCX) -> None:
        self.lane = lane
        self.drained = True
        self.worker = "any" if lane.tagged else None

    def fileno(self) -> int:
        return 0

    def idle(self) -> bool:
        return True

    def receive(self, size: int, most: int = 1) -> memoryview | None:
        return None

    def receive_descriptor(self, size: int) -> tuple[bytes, int] | None:
        raise AssertionError

    def send(self, items: Sequence[Outgoing], descriptor: int | None = None) -> bool:
        return True

    def flush(self) -> bool:
        return True

    def expect(self, target: memoryview) -> int:
        raise AssertionError

    def payload_arrived(self, nbytes: int) -> bool:
        raise AssertionError

    def progress(self) -> object:
        return None

    def close(self) -> None:
        pass


class ScriptedStream(SilentStream):
    """A stream whose peer completes the handshake and then sends the requests of a test.

    Attributes:
        sent: what has left.
        full: there is no room for what is sent.
        travelled: how far the bytes have come.
    """

    def __init__(self, lane: Lane) -> None:
        super().__init__(lane)
        self.sent: list[Outgoing] = []
        self.full = False
        self.travelled = 0
        self._handshake = ClientHandshake(lane)
        self._inbox = self._handshake.hello()
        self._ended = False

    def request(self, *frames: Frame) -> None:
        """Let the peer send frames."""
        self._inbox += b"".join(frame.pack() for frame in frames)

    def end(self) -> None:
        """Let the peer close the connection."""
        self._ended = True

    def statuses(self) -> list[Frame]:
        """The STATUS frames among what was sent."""
        frames = [item for item in self.sent if isinstance(item, bytes) and len(item) == FRAME_BYTES]
        return [parse(frame) for frame in frames]

    def receive(self, size: int, most: int = 1) -> memoryview | None:
        if self._ended:
            raise ConnectionClosed("the peer closed the connection")
        size *= max(1, min(most, len(self._inbox) // size))
        if len(self._inbox) < size:
            return None
        message, self._inbox = self._inbox[:size], self._inbox[size:]
        return memoryview(message)

    def send(self, items: Sequence[Outgoing], descriptor: int | None = None) -> bool:
        if not self._handshake.done:
            (message,) = items
            assert isinstance(message, bytes)
            self._inbox += self._handshake.receive(message) or b""
            return True
        self.sent += items
        return not self.full

    def flush(self) -> bool:
        return not self.full

    def progress(self) -> object:
        return self.travelled


class KeepingStream(SilentStream):
    """A stream that keeps the frames that are sent.

    Attributes:
        sent: those that have left.
        left: those for which there was no room.
        room: it takes everything at once.
        fails: raised by the next `send`.
        aborted: it was aborted.
    """

    def __init__(self, lane: Lane) -> None:
        super().__init__(lane)
        self.sent: list[Frame] = []
        self.left: list[bytes] = []
        self.room = True
        self.fails: BaseException | None = None
        self.aborted = False

    def send(self, items: Sequence[Outgoing], descriptors: Any = ()) -> bool:
        if self.fails is not None:
            raise self.fails
        self.left += [each for each in items if isinstance(each, bytes)]
        return self.flush()

    def flush(self) -> bool:
        if not self.room:
            return False
        self.sent += [parse(each) for each in self.left if len(each) == FRAME_BYTES]
        self.left = []
        return True

    def abort(self) -> None:
        self.aborted = True
