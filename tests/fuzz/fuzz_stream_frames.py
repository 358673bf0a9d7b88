"""The frames of a stream, of both sides: events whose frames are the same bytes, or a `ProtocolError`.

Input: the bytes of whole frames, and of what is left over.
"""

from dray.errors import ProtocolError
from dray.protocol.frames import FRAME_BYTES, Flag, Frame, Kind, parse
from dray.protocol.streams import (
    Begun,
    Credit,
    Ended,
    Given,
    Returned,
    begin,
    consumer_events,
    credit,
    end,
    give,
    give_back,
    producer_events,
)

_GIVEN = Given(3, 7, 100, 2, 1)
SEEDS = [
    give(_GIVEN, 1) + end(3),
    give(Given(2**32 - 1, 2**64 - 1, 2**64 - 1, 2**64 - 1, 2**64 - 1), 255),
    credit(5) + begin(_GIVEN) + give_back(_GIVEN, begun=True) + give_back(_GIVEN, begun=False),
    credit(2**64 - 1),
    Frame(Kind.GIVE).pack(),
    Frame(Kind.RETURN, flags=Flag.BEGUN | Flag.WORDS).pack(),
    Frame(Kind.READ).pack() + bytes(FRAME_BYTES - 1),
    b"",
]


def run(data: bytes) -> None:
    for parse_events in (producer_events, consumer_events):
        arrived: list[object] = []
        try:
            for event in parse_events(data):
                arrived.append(event)
        except ProtocolError:
            pass
        else:
            assert len(arrived) * FRAME_BYTES == len(data)
        for index, event in enumerate(arrived):
            _check(event, parse(data[index * FRAME_BYTES : (index + 1) * FRAME_BYTES]))


def _check(event: object, sent: Frame) -> None:
    """The frame of an event means the same as the frame that was sent."""
    match event:
        case Given():
            again = parse(give(event, sent.reader))
            assert list(producer_events(again.pack())) == [event]
            assert (again.slot, again.sequence, again.nbytes) == (sent.slot, sent.sequence, sent.nbytes)
            assert again.acked == sent.acked
        case Ended():
            again = parse(end(event.lost))
            assert again.nbytes == sent.nbytes
        case Credit():
            again = parse(credit(event.total))
        case Begun():
            again = parse(begin(Given(event.slot, event.sequence, 0, event.number, 1)))
        case Returned():
            again = parse(give_back(Given(event.slot, event.sequence, 0, event.number, 1), event.begun))
            assert again.flags == sent.flags
        case _:
            raise AssertionError(event)
    assert (again.kind, again.request) == (sent.kind, sent.request if not isinstance(event, Ended) else 0)
