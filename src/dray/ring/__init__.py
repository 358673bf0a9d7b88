"""A ring of slots in shared memory: a producer claims and commits, readers lease and acknowledge."""

from dray.ring.lease import Lease, SlotWriter
from dray.ring.records import OnFull, Retain, RingStatistics, SlotInfo
from dray.ring.ring import SharedRingBuffer
from dray.ring.segment import Segment
from dray.ring.slot_state import SlotEvent, SlotState

__all__ = [
    "Lease",
    "OnFull",
    "Retain",
    "RingStatistics",
    "Segment",
    "SharedRingBuffer",
    "SlotEvent",
    "SlotInfo",
    "SlotState",
    "SlotWriter",
]
