"""Slots in shared memory: a writer claims and commits, readers lease and consume. Sees opaque bytes only."""

from dray.ring.lease import Lease, SlotWriter
from dray.ring.policy import OnFull, Retain
from dray.ring.ring import SharedRingBuffer
from dray.ring.segment import Segment
from dray.ring.slot_state import SlotEvent, SlotState
from dray.ring.statistics import ReadySlot, RingStatistics

__all__ = [
    "Lease",
    "OnFull",
    "ReadySlot",
    "Retain",
    "RingStatistics",
    "Segment",
    "SharedRingBuffer",
    "SlotEvent",
    "SlotState",
    "SlotWriter",
]
