"""Messages on a byte stream: JSON with its length, 4 bytes in network order, before it. No I/O."""

from __future__ import annotations

import struct

from dray.errors import ControlPlaneError
from dray.runtime.messages import Message

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
