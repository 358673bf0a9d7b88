"""Slots in shared memory: a writer claims and commits, readers lease and consume. Sees opaque bytes only."""

from dray.buffer.lease import Lease, SlotWriter
from dray.buffer.policy import OnFull, Retain
from dray.buffer.ring import SharedRingBuffer
from dray.buffer.segment import Segment
from dray.buffer.slot_state import SlotEvent, SlotState
from dray.buffer.statistics import ReadySlot, RingStatistics

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
