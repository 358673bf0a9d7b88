"""A client's side of the handshake, and what it waits with: each wait under a deadline."""

from __future__ import annotations

import os

from dray.clock import Deadline
from dray.protocol.frames import VERSION
from dray.protocol.handshake import WELCOME, ClientHandshake, ServerIdentity
from dray.transport.attempts import OtherProducerError
from dray.transport.lanes.base import Stream, Waiter
from dray.transport.polling import timed_out


def shake_hands(
    stream: Stream,
    endpoint: str,
    producer: bytes,
    secret: bytes | None,
    deadline: Deadline,
    waiter: Waiter,
    version: int = VERSION,
) -> tuple[ServerIdentity, int]:
    """Both sides' handshake; who the server is, and the descriptor that came with WELCOME or -1.

    Raises:
        OtherProducerError: another producer listens there.
        VersionMismatch: the server does not speak the version that is offered.
        AuthenticationError: one side does not know the other's secret.
        TransportError, ProtocolError: it failed.
    """
    handshake = ClientHandshake(stream.lane, producer, secret, version)
    stream.send([handshake.hello()])
    descriptor = -1
    try:
        # Within the block: CPython 3.11 misses an exception of a signal handler that comes with the jump back to a
        # loop that is the first statement of a block.
        answer: bytes | None = b""
        while answer is not None:
            while not stream.flush():
                wait_for_stream(stream, waiter, deadline, "HELLO to be sent", endpoint)
            if handshake.server is not None and not stream.lane.in_band:
                message, descriptor = _welcome(stream, waiter, deadline, endpoint)
                answer = handshake.receive(message)
                continue
            due = wait_for_message(stream, waiter, handshake.expects, deadline, "the handshake", endpoint)
            answer = handshake.receive(due)
            if answer:
                stream.send([answer])
        found = handshake.server
        assert found is not None
        if found.producer != producer:
            raise OtherProducerError(
                f"producer {found.producer.hex()} listens there, not {producer.hex()}", endpoint=endpoint
            )
    except BaseException:
        if descriptor >= 0:
            os.close(descriptor)
        raise
    return found, descriptor


def _welcome(stream: Stream, waiter: Waiter, deadline: Deadline, endpoint: str) -> tuple[bytes, int]:
    while True:
        received = stream.receive_descriptor(WELCOME.size)
        if received is not None:
            return received
        wait_for_stream(stream, waiter, deadline, "WELCOME", endpoint)


def wait_for_message(
    stream: Stream, waiter: Waiter, size: int, deadline: Deadline, awaited: str, endpoint: str
) -> memoryview:
    """The stream's next message, `size` bytes; errors as `wait_for_stream` raises."""
    while (message := stream.receive(size)) is None:
        wait_for_stream(stream, waiter, deadline, awaited, endpoint)
    return message


def wait_for_stream(stream: Stream, waiter: Waiter, deadline: Deadline, awaited: str, endpoint: str) -> None:
    """Wait until there is something to do for the stream.

    Raises:
        TransportTimeout: the deadline is over.
        BufferClosedError: the client is closed.
    """
    if stream.idle():
        waiter.wait(stream, deadline, awaited, endpoint)
    elif deadline.expired:
        raise timed_out(deadline, awaited, endpoint)
