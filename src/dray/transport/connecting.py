"""How a client's connection begins: the handshake, and what the server shares on the shm lane."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dray.clock import Deadline
from dray.errors import ProtocolError
from dray.protocol.handshake import (
    ANY_PRODUCER,
    WELCOME,
    ClientHandshake,
    ServerIdentity,
    WelcomeFlag,
)
from dray.resources import Descriptors
from dray.ring import Segment
from dray.ring.attachment import Attachment
from dray.ring.layout import SegmentLayout
from dray.transport.attempts import OtherProducerError
from dray.transport.lanes.base import Network, Stream, Waiter


@dataclass(slots=True)
class Shared:
    """What the handshake has brought.

    Attributes:
        identity: the ring behind the server.
        segment: its memory on the shm lane, else None.
        attachment: the means for direct leases, if they were wanted and granted.
        bodies: READs may have a body.
    """

    identity: ServerIdentity
    segment: Segment | None = None
    attachment: Attachment | None = None
    bodies: bool = False


def shake_hands(
    stream: Stream,
    waiter: Waiter,
    deadline: Deadline,
    *,
    network: Network,
    endpoint: str,
    producer: bytes,
    secret: bytes | None,
    version: int,
    attach_as: int | None = None,
) -> Shared:
    """The client's side of the handshake; `attach_as` is the reader id for direct leases, if they are wanted.

    Raises:
        As `Connection.open`.
    """
    wanted = None if attach_as is None or stream.lane.in_band else network.attach_request(attach_as)
    descriptors = Descriptors()
    try:
        handshake = ClientHandshake(
            stream.lane, producer, secret, version, attach=None if wanted is None else wanted.request
        )
        stream.send([handshake.hello()])
        answer: bytes | None = b""
        while answer is not None:
            message: bytes | memoryview | None = None
            while not stream.flush():
                waiter.wait(stream, deadline, "HELLO to be sent", endpoint)
            if handshake.server is not None and not stream.lane.in_band:
                while (message := stream.receive_with_descriptors(WELCOME.size, descriptors)) is None:
                    waiter.wait(stream, deadline, "WELCOME", endpoint)
            while message is None:
                message = stream.receive(handshake.expects)
                if message is None:
                    waiter.wait(stream, deadline, "the handshake", endpoint)
            answer = handshake.receive(message)
            if answer:
                attaching = wanted is not None and handshake.attaching
                stream.send([answer], [wanted.process.fileno()] if wanted is not None and attaching else ())
        identity = handshake.server
        assert identity is not None
        if producer not in (ANY_PRODUCER, identity.producer):
            raise OtherProducerError(
                f"producer {identity.producer.hex()} listens there, not {producer.hex()}", endpoint=endpoint
            )
        if stream.lane.in_band:
            return Shared(identity, bodies=handshake.bodies)
        attached = handshake.welcome & WelcomeFlag.ATTACHED and attach_as is not None
        if not attached:
            segment = Segment.attach(_only(descriptors))
            _check_segment(segment, identity, endpoint)
            return Shared(identity, segment)
        assert attach_as is not None
        attachment = network.open_attachment(
            descriptors, identity, attach_as, newest=bool(handshake.welcome & WelcomeFlag.NEWEST)
        )
        try:
            _check_segment(attachment.segment, identity, endpoint)
        except BaseException:
            attachment.close()
            raise
        return Shared(identity, attachment.segment, attachment)
    finally:
        descriptors.close()


def _only(descriptors: Sequence[int]) -> int:
    if len(descriptors) != 1:
        raise ProtocolError(f"{len(descriptors)} descriptors came with WELCOME instead of the segment's")
    return descriptors[0]


def _check_segment(segment: Segment, identity: ServerIdentity, endpoint: str) -> None:
    if segment.producer_id != identity.producer:
        raise ProtocolError("the segment is another producer's", endpoint=endpoint)
    if segment.layout != SegmentLayout(identity.slots, identity.slot_bytes):
        raise ProtocolError("the segment's slots are not those of the handshake", endpoint=endpoint)
