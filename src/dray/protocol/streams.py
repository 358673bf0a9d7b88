"""Streams: the frames of a connection after SUBSCRIBE, for both sides. Bytes in, events out; no I/O.

| frame | from | fields | meaning |
|---|---|---|---|
| GIVE | producer | slot, sequence, nbytes, request, acked, offset | hand-out `request`, the payload's `acked`-th |
| END | producer | nbytes | the producer has closed; `nbytes` payloads of this group were lost |
| END with DRAINING | producer | | it puts no more payloads, and closes when all are consumed |
| CREDIT | consumer | request | how many payloads it may have been given so far, in total |
| BEGIN | consumer | slot, sequence, request | its program is about to get the payload of that hand-out |
| RETURN | consumer | slot, sequence, request, BEGUN | it gives the payload of that hand-out back |
| RETURN | producer | slot, sequence, request | it has taken the payload of that hand-out back |

A producer gives a payload while fewer were given than the credit allows. Credit may fall: what was given already
stays given. A RETURN without BEGUN takes its hand-out off that number. What the producer gave before it knew of
such a RETURN of an earlier payload comes back as well, as that one comes first: `offset` counts those that it knew
of. Hand-outs are numbered from 1 for each producer, and each GIVE has a number of its own. Where the answer to
SUBSCRIBE came with a descriptor, CREDIT and BEGIN are words in shared memory (`dray.ring.stream_words`) instead of
frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

from dray.errors import ProtocolError
from dray.protocol.frames import FRAME, FRAME_BYTES, VALID_HEADS, Flag, Kind, check

_GIVE, _END, _CREDIT, _BEGIN, _RETURN = map(int, (Kind.GIVE, Kind.END, Kind.CREDIT, Kind.BEGIN, Kind.RETURN))


class Given(NamedTuple):
    """A consumer has been given a payload.

    Attributes:
        slot, sequence, nbytes: the payload.
        number: the hand-out.
        deliveries: how often the payload has been given to a consumer of the group, this time included.
        returns: so many RETURNs of payloads that were not begun had come from the consumer before.
    """

    slot: int
    sequence: int
    nbytes: int
    number: int
    deliveries: int
    returns: int = 0


class Ended(NamedTuple):
    """The producer has closed its stream.

    Attributes:
        lost: payloads that no consumer of the group has consumed.
    """

    lost: int


class TakenBack(NamedTuple):
    """The payload of hand-out `number` was not begun in time: another consumer gets it."""

    number: int


class Draining(NamedTuple):
    """The producer puts nothing more, and has given all that waited; returned ones may still come."""


class Credit(NamedTuple):
    """A consumer may have been given `total` payloads."""

    total: int


class Begun(NamedTuple):
    """A consumer hands a payload to its program."""

    slot: int
    sequence: int
    number: int


class Returned(NamedTuple):
    """A consumer gives a payload back; `begun`: its program had it."""

    slot: int
    sequence: int
    number: int
    begun: bool


ProducerEvent: TypeAlias = Given | TakenBack | Draining | Ended
ConsumerEvent: TypeAlias = Credit | Begun | Returned


def give(given: Given, reader: int) -> bytes:
    """The frame for a payload that is given to a consumer of the group with that reader id."""
    slot, sequence, nbytes, number, deliveries, returns = given
    return FRAME.pack(_GIVE, 0, reader, 0, slot, number, sequence, nbytes, 0, deliveries, 0, returns)


def take_back(slot: int, sequence: int, number: int) -> bytes:
    """The frame for a payload that a producer takes back from a consumer that has not begun it."""
    return FRAME.pack(_RETURN, 0, 0, 0, slot, number, sequence, 0, 0, 0, 0, 0)


def end(lost: int) -> bytes:
    """The frame for the end of a producer."""
    return FRAME.pack(_END, 0, 0, 0, 0, 0, 0, lost, 0, 0, 0, 0)


def draining() -> bytes:
    """The frame for a producer that puts nothing more."""
    return FRAME.pack(_END, 0, 0, Flag.DRAINING, 0, 0, 0, 0, 0, 0, 0, 0)


def credit(total: int) -> bytes:
    """The frame for a consumer's credit."""
    return FRAME.pack(_CREDIT, 0, 0, 0, 0, total, 0, 0, 0, 0, 0, 0)


def begin(given: Given) -> bytes:
    """The frame for a payload that the program is about to get."""
    return FRAME.pack(_BEGIN, 0, 0, 0, given.slot, given.number, given.sequence, 0, 0, 0, 0, 0)


def give_back(given: Given, begun: bool) -> bytes:
    """The frame for a payload that a consumer gives back."""
    flags = Flag.BEGUN if begun else Flag.NONE
    return FRAME.pack(_RETURN, 0, 0, flags, given.slot, given.number, given.sequence, 0, 0, 0, 0, 0)


def producer_events(messages: bytes | bytearray | memoryview) -> Iterator[ProducerEvent]:
    """What whole frames of a producer mean.

    Raises:
        ProtocolError: a producer may not send this.
    """
    for fields in _frames(messages):
        kind, _, _, flags, slot, number, sequence, nbytes, _, deliveries, _, returns = fields
        if kind == _GIVE:
            if not number or not deliveries:
                raise ProtocolError("GIVE names hand-out 0, or delivery 0")
            yield Given(slot, sequence, nbytes, number, deliveries, returns)
        elif kind == _END:
            yield Draining() if flags else Ended(nbytes)
        elif kind == _RETURN and not flags:
            yield TakenBack(number)
        else:
            raise ProtocolError(f"a producer sent {Kind(kind).name} to a consumer that has subscribed")


def consumer_events(messages: bytes | bytearray | memoryview) -> Iterator[ConsumerEvent]:
    """What whole frames of a consumer mean.

    Raises:
        ProtocolError: a consumer may not send this.
    """
    for fields in _frames(messages):
        kind, _, _, flags, slot, number, sequence, _, _, _, _, _ = fields
        if kind == _CREDIT:
            yield Credit(number)
        elif kind == _BEGIN:
            yield Begun(slot, sequence, number)
        elif kind == _RETURN:
            yield Returned(slot, sequence, number, flags != 0)
        else:
            raise ProtocolError(f"a consumer that has subscribed sent {Kind(kind).name}")


def _frames(messages: bytes | bytearray | memoryview) -> Iterator[tuple[int, ...]]:
    if len(messages) % FRAME_BYTES:
        raise ProtocolError(f"a frame has {FRAME_BYTES} bytes, got {len(messages)}")
    for fields in FRAME.iter_unpack(messages):
        kind, status, _, flags, _, _, _, nbytes, _, _, _, _ = fields
        if (kind, status, flags) not in VALID_HEADS:
            check(kind, status, flags, nbytes)
        yield fields
