"""A small model of `SharedRingBuffer`. Each operation runs on a ring and on the model, then the two are compared.

Each operation of `RingAndModel` takes a `pick`, which returns an integer from a range: drawn by hypothesis in
`test_ring_model.py`, by a seeded generator in `walk`.
"""

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from dray.errors import (
    BufferClosedError,
    BufferFullError,
    ConfigError,
    LeaseInUseError,
    PayloadTooLargeError,
    SlotError,
    StaleSlotError,
)
from dray.payload.codec import pack
from dray.protocol.client_session import Request
from dray.protocol.frames import Kind
from dray.ring import Lease, Segment, SharedRingBuffer, SlotState, SlotWriter
from dray.ring.layout import HAS_CHECKSUM, SLOT_HEADER
from dray.transport.connection import ReceivedPayload
from dray.transport.lease_reaper import LeaseReaper
from dray.transport.leases import KeptInPlaceLease, LeasedArrays
from dray.transport.receive_buffers import ReceiveBuffers

Pick = Callable[[int, int], int]

SLOT_BYTES = 128
JOIN_SECONDS = 20.0
PATIENCE_SECONDS = 1000.0  # how long a waiting claim waits, on the clock of the model
POLICIES = [
    ("overwrite", "unread"),
    ("block", "unread"),
    ("error", "unread"),
    ("block", "newest"),
    ("error", "newest"),
]
READERS = [1, 2, 3, 5]
OPERATIONS = {  # how often each is chosen by `walk`
    "put": 9,
    "claim": 2,
    "commit": 3,
    "abort": 1,
    "finish_a_writer_again": 1,
    "read": 8,
    "copy": 5,
    "consume_many": 2,
    "end_a_lease": 8,
    "end_a_lease_again": 1,
    "consume": 3,
    "use_up": 8,
    "poll_consumed": 2,
    "compute_a_checksum": 2,
    "ask_for_what_is_not_there": 1,
    "work_in_place": 3,
    "leave_the_block": 3,
    "drop_the_arrays": 2,
    "wait_for_a_slot": 3,
    "wait_for_the_end": 1,
    "let_time_pass": 2,
    "close_and_restart": 1,
}
LAPPING = OPERATIONS | {"put": 60, "use_up": 60, "close_and_restart": 0}  # one ring, and many laps of it


class ManualClock:
    """A clock that stands still. It sets `read_twice` when a watched thread, about to wait, has read it twice."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.read_twice = threading.Event()
        self._watched: int | None = None
        self._reads = 0

    def watch_this_thread(self) -> None:
        self._watched, self._reads = threading.get_ident(), 0

    def now(self) -> float:
        if threading.get_ident() == self._watched:
            self._reads += 1
            if self._reads == 2:
                self.read_twice.set()
        return self.time


class Waiting:
    """A call in a thread of its own that holds the ring's lock, or waits, when the constructor returns."""

    def __init__(self, clock: ManualClock, call: Callable[[], Any]) -> None:
        self.since = clock.time
        self.result: Any = None
        self._clock = clock
        self._call = call
        clock.read_twice.clear()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert clock.read_twice.wait(JOIN_SECONDS), "the call neither waits nor ends"

    def _run(self) -> None:
        self._clock.watch_this_thread()
        try:
            self.result = self._call()
        except (BufferClosedError, BufferFullError) as error:
            self.result = error

    def join(self) -> Any:
        self._thread.join(JOIN_SECONDS)
        assert not self._thread.is_alive(), "a waiting call is not woken"
        return self.result


@dataclass
class Payload:
    slot: int
    content: bytes
    packed: bool
    nbytes: int
    committed: bool = False
    retired: bool = False
    delivered: bool = False
    leases: int = 0
    consumed_by: set[int] = field(default_factory=set)
    checksum: int | None = None
    committed_at: float = 0.0
    leased_at: float = 0.0

    @property
    def state(self) -> SlotState:
        if not self.committed:
            return SlotState.WRITING
        return SlotState.READING if self.leases else SlotState.READY


class KeptInRing:
    """Gives `KeptInPlaceLease` a lease of the ring."""

    def __init__(self, ring: SharedRingBuffer, lease: Lease, request: Request, ended: threading.Event) -> None:
        self.request = request
        self.inside = threading.Lock()
        self._ring = ring
        self._lease = lease
        self._ended = ended

    def hand_out(self) -> None:
        pass

    def end(self, consumed: bool) -> None:
        (self._lease.acknowledge if consumed else self._lease.release)()
        self._ended.set()

    def drop(self) -> None:
        self.end(consumed=False)


@dataclass
class InPlace:
    """A reader that works on a slot in place: its lease, and the array that it took out of the block."""

    lease: Lease
    block: KeptInPlaceLease[Any]
    arrays: dict[str, np.ndarray[Any, Any]] | None
    values: bytes
    ended: threading.Event
    kept: np.ndarray[Any, Any] | None = None
    consumed: bool = False


@lru_cache(maxsize=4096)
def image(values: bytes) -> bytes:
    """A payload with the one array `x`."""
    return bytes(pack({"x": np.frombuffer(values, np.uint8)}))


def checksum_of(content: bytes | memoryview) -> int:
    return sum(content) * 65_537 + len(content)


class RingAndModel:
    """A ring and its model.

    `free`, `live` and `count` are the model; `writers`, `leases`, … are what the program holds.
    """

    def __init__(self, slots: int, readers: int, on_full: str, retain: str) -> None:
        self.retain = retain
        self.on_full = on_full
        self.readers = readers
        self.slots = max(slots, 2) if retain == "newest" else slots
        self.laps = 0
        self.clock = ManualClock()
        self.reaper = LeaseReaper()
        self._start()

    def _start(self) -> None:
        self.ring = SharedRingBuffer(
            self.slots,
            SLOT_BYTES,
            on_full=self.on_full,
            readers=self.readers,
            retain=self.retain,
            clock=self.clock,
        )
        self.attached = Segment.attach(self.ring.segment.fileno())
        self.free = list(range(self.slots))
        self.live: dict[int, Payload] = {}  # by sequence, oldest first
        self.given: list[tuple[int, int]] = []
        self.writers: list[SlotWriter] = []
        self.finished_writers: list[SlotWriter] = []
        self.leases: list[Lease] = []
        self.ended_leases: list[Lease] = []
        self.in_blocks: list[InPlace] = []
        self.outliving: list[InPlace] = []
        self.waiting_claim: tuple[Waiting, bytes, bool] | None = None
        self.waiting_end: tuple[Waiting, int] | None = None
        self.newest: int | None = None
        self.claim_wait_seconds = 0.0
        self.count = dict.fromkeys(
            (
                "claimed", "committed", "committed_bytes", "aborted", "leased", "copied", "consumed",
                "dropped_unread", "dropped_delivered", "retired", "stale_reads", "stale_consumes",
                "double_releases", "claim_waits", "full_errors",
            ),
            0,
        )  # fmt: skip

    # --- the model ----------------------------------------------------------------------------------------------

    def _free_if_retired(self, sequence: int) -> None:
        payload = self.live[sequence]
        if payload.retired and not payload.leases:
            del self.live[sequence]
            self.free.append(payload.slot)

    def _consume(self, sequence: int, reader: int) -> None:
        payload = self.live[sequence]
        if self.retain == "newest" or payload.retired:
            return
        payload.consumed_by.add(reader)
        if len(payload.consumed_by) == self.readers:
            payload.retired = True
            self.count["consumed"] += 1

    def _is_readable(self, slot: int, sequence: int, reader: int) -> bool:
        payload = self.live.get(sequence)
        return bool(
            payload
            and payload.slot == slot
            and payload.committed
            and not payload.retired
            and reader not in payload.consumed_by
        )

    def _oldest_ready(self) -> int | None:
        return next((s for s, p in self.live.items() if p.state is SlotState.READY), None)

    def _make_room(self) -> bool:
        """Whether a claim gets a slot now; with ``on_full="overwrite"``, drops a payload for it."""
        if not self.free and self.on_full == "overwrite" and (oldest := self._oldest_ready()) is not None:
            dropped = self.live[oldest]
            dropped.retired = True
            self.count["dropped_delivered" if dropped.delivered else "dropped_unread"] += 1
            self._free_if_retired(oldest)
        return bool(self.free)

    def _claimed(self, writer: SlotWriter, content: bytes, packed: bool) -> None:
        expected = min(self.free) if self.retain == "newest" else self.free[0]
        self.free.remove(expected)
        assert (writer.slot, writer.sequence) == (expected, self.count["claimed"])
        assert len(writer.buffer) == writer.nbytes
        writer.buffer[: len(content)] = content
        self.count["claimed"] += 1
        self.laps += writer.slot == 0
        self.given = [*self.given[-200:], (writer.slot, writer.sequence)]
        self.live[writer.sequence] = Payload(writer.slot, content, packed, writer.nbytes)
        self.writers.append(writer)

    def _leased(self, lease: Lease) -> None:
        payload = self.live[lease.sequence]
        assert (lease.nbytes, lease.buffer) == (len(payload.content), payload.content)
        if not payload.leases:
            payload.leased_at = self.clock.time
        payload.leases += 1
        payload.delivered = True
        self.count["leased"] += 1

    def _ended(self, lease: Lease, consumed: bool) -> None:
        self.live[lease.sequence].leases -= 1
        if consumed:
            self._consume(lease.sequence, lease.reader)
        self._free_if_retired(lease.sequence)
        self.ended_leases = [*self.ended_leases[-50:], lease]

    # --- choices ------------------------------------------------------------------------------------------------

    def _content(self, pick: Pick) -> tuple[bytes, bool]:
        """Bytes that no other recent payload has, and whether they are a payload with an array."""
        values = bytes((self.count["claimed"] * 7 + i) % 251 for i in range(pick(0, 12)))
        packed = pick(0, 2) > 0
        return (image(values) if packed else values), packed

    def _reference(self, pick: Pick) -> tuple[int, int]:
        kind = pick(0, 6)
        live = [(payload.slot, sequence) for sequence, payload in self.live.items() if payload.committed]
        if kind < 5 and live:
            return live[pick(0, len(live) - 1)]
        if kind == 5 and self.given:
            return self.given[pick(0, len(self.given) - 1)]
        return pick(0, self.slots - 1), pick(0, self.count["claimed"] + 1)

    def can(self, operation: str) -> bool:
        """Whether the operation is possible now."""
        needs: dict[str, Any] = {
            "commit": self.writers,
            "abort": self.writers,
            "finish_a_writer_again": self.finished_writers,
            "end_a_lease": self.leases,
            "end_a_lease_again": self.ended_leases,
            "use_up": any(p.committed and not p.retired for p in self.live.values()),
            "leave_the_block": self.in_blocks,
            "drop_the_arrays": self.outliving,
            "wait_for_a_slot": not self.waiting_claim and not self.free and self.on_full != "error",
            "wait_for_the_end": not self.waiting_end and any(not p.retired for p in self.live.values()),
        }
        return bool(needs.get(operation, True))

    def do(self, operation: str, pick: Pick) -> None:
        """Run one operation on ring and model, then check everything."""
        getattr(self, operation)(pick)
        self._join_calls()
        self.check()

    # --- operations ---------------------------------------------------------------------------------------------

    def put(self, pick: Pick) -> None:
        before = len(self.writers)
        self.claim(pick)
        if len(self.writers) > before:
            self._commit(self.writers.pop())

    def claim(self, pick: Pick) -> None:
        content, packed = self._content(pick)
        nbytes = min(len(content) + pick(0, 3), SLOT_BYTES)
        if not self._make_room():
            with pytest.raises(BufferFullError):
                self.ring.claim(nbytes, timeout=0)
            self.count["full_errors"] += 1
            return
        self._claimed(self.ring.claim(nbytes, timeout=0), content, packed)

    def commit(self, pick: Pick) -> None:
        self._commit(self.writers.pop(pick(0, len(self.writers) - 1)))

    def _commit(self, writer: SlotWriter) -> None:
        payload = self.live[writer.sequence]
        with pytest.raises(PayloadTooLargeError):
            writer.commit(writer.nbytes + 1)
        writer.commit(len(payload.content))
        self.finished_writers = [*self.finished_writers[-50:], writer]
        payload.committed = True
        payload.committed_at = self.clock.time
        payload.nbytes = len(payload.content)
        self.count["committed"] += 1
        self.count["committed_bytes"] += payload.nbytes
        if self.retain == "newest":
            if self.newest is not None:
                self.live[self.newest].retired = True
                self.count["retired"] += 1
                self._free_if_retired(self.newest)
            self.newest = writer.sequence

    def abort(self, pick: Pick) -> None:
        writer = self.writers.pop(pick(0, len(self.writers) - 1))
        writer.abort()
        self.finished_writers.append(writer)
        self.live[writer.sequence].retired = True
        self._free_if_retired(writer.sequence)
        self.count["aborted"] += 1

    def finish_a_writer_again(self, pick: Pick) -> None:
        writer = self.finished_writers[pick(0, len(self.finished_writers) - 1)]
        with pytest.raises(SlotError):
            writer.commit()
        with pytest.raises(SlotError):
            _ = writer.buffer
        writer.abort()
        self.count["double_releases"] += 1

    def read(self, pick: Pick) -> None:
        (slot, sequence), reader = self._reference(pick), pick(0, self.readers - 1)
        if not self._is_readable(slot, sequence, reader):
            with pytest.raises(StaleSlotError):
                self.ring.read_raw(slot, sequence, reader)
            self.count["stale_reads"] += 1
            return
        lease = self.ring.read_raw(slot, sequence, reader)
        self._leased(lease)
        self.leases.append(lease)

    def copy(self, pick: Pick) -> None:
        """Copy several payloads; some are gone, never existed, or are too large."""
        wanted = [(*self._reference(pick), pick(0, self.readers)) for _ in range(pick(1, 3))]
        most = pick(0, 1) * SLOT_BYTES
        for (slot, sequence, reader), found in zip(wanted, self.ring.copy_many(wanted, most), strict=True):
            if reader == self.readers:
                assert type(found) is SlotError
            elif not self._is_readable(slot, sequence, reader):
                assert isinstance(found, StaleSlotError)
                self.count["stale_reads"] += 1
            elif len(self.live[sequence].content) > most:
                assert isinstance(found, PayloadTooLargeError)
            else:
                payload = self.live[sequence]
                assert found == (payload.content, payload.checksum)
                payload.delivered = True
                self.count["copied"] += 1

    def consume_many(self, pick: Pick) -> None:
        wanted = [(*self._reference(pick), pick(0, self.readers - 1)) for _ in range(pick(1, 3))]
        expected = 0
        for slot, sequence, reader in wanted:
            if self._is_readable(slot, sequence, reader):
                expected += 1
                self._consume(sequence, reader)
                self._free_if_retired(sequence)
            else:
                self.count["stale_consumes"] += 1
        assert self.ring.consume_many(wanted) == expected

    def end_a_lease(self, pick: Pick) -> None:
        lease = self.leases.pop(pick(0, len(self.leases) - 1))
        consumed = bool(pick(0, 1))
        assert (lease.acknowledge if consumed else lease.release)()
        self._ended(lease, consumed)

    def end_a_lease_again(self, pick: Pick) -> None:
        lease = self.ended_leases[pick(0, len(self.ended_leases) - 1)]
        assert not (lease.acknowledge if pick(0, 1) else lease.release)()
        with pytest.raises(StaleSlotError):
            _ = lease.buffer
        self.count["double_releases"] += 1

    def consume(self, pick: Pick) -> None:
        (slot, sequence), reader = self._reference(pick), pick(0, self.readers - 1)
        expected = self._is_readable(slot, sequence, reader)
        assert self.ring.consume(slot, sequence, reader) is expected
        if expected:
            self._consume(sequence, reader)
            self._free_if_retired(sequence)
        else:
            self.count["stale_consumes"] += 1

    def use_up(self, pick: Pick) -> None:
        """Each reader that has not consumed the oldest payload reads and consumes it."""
        sequence, payload = next((s, p) for s, p in self.live.items() if p.committed and not p.retired)
        for reader in sorted(set(range(self.readers)) - payload.consumed_by):
            with self.ring.read_raw(payload.slot, sequence, reader) as lease:
                self._leased(lease)
            assert not lease.live
            self._ended(lease, True)

    def poll_consumed(self, pick: Pick) -> None:
        slot, sequence = self._reference(pick)
        payload = self.live.get(sequence)
        if (slot, sequence) in self.given:
            assert self.ring.wait_consumed(slot, sequence, timeout=0) is (payload is None or payload.retired)

    def compute_a_checksum(self, pick: Pick) -> None:
        slot, sequence = self._reference(pick)
        payload = self.live.get(sequence)
        calls: list[bytes] = []

        def compute(view: memoryview) -> int:
            assert view.readonly
            calls.append(bytes(view))
            return checksum_of(view)

        if payload is None or payload.slot != slot or not payload.committed:
            with pytest.raises(StaleSlotError):
                self.ring.checksum(slot, sequence, compute)
            assert not calls
            return
        assert self.ring.checksum(slot, sequence, compute) == checksum_of(payload.content)
        assert calls == ([payload.content] if payload.checksum is None else [])
        payload.checksum = checksum_of(payload.content)

    def ask_for_what_is_not_there(self, pick: Pick) -> None:
        """Slots, readers and sizes out of range are refused and change nothing."""
        slot = (-1, self.slots)[pick(0, 1)]
        reader = (-1, self.readers)[pick(0, 1)]
        for call in (self.ring.read_raw, self.ring.consume):
            with pytest.raises(SlotError) as caught:
                call(slot, 0)
            assert not isinstance(caught.value, StaleSlotError)
            with pytest.raises(SlotError) as caught:
                call(0, 0, reader)
            assert not isinstance(caught.value, StaleSlotError)
        with pytest.raises(PayloadTooLargeError):
            self.ring.claim(SLOT_BYTES + 1, timeout=0)
        with pytest.raises(ConfigError):
            self.ring.claim(-1, timeout=0)

    def work_in_place(self, pick: Pick) -> None:
        """Like a client on the shm lane: the lease ends when the last array is deleted."""
        (slot, sequence), reader = self._reference(pick), pick(0, self.readers - 1)
        if not self._is_readable(slot, sequence, reader) or not self.live[sequence].packed:
            return
        lease = self.ring.read_raw(slot, sequence, reader)
        self._leased(lease)
        ended = threading.Event()
        root = np.frombuffer(self.attached.view[lease.offset : lease.offset + lease.nbytes], np.uint8)
        request = Request(Kind.READ, 0, slot, sequence, reader)
        kept = KeptInRing(self.ring, lease, request, ended)
        received = ReceivedPayload(request, root, True, ReceiveBuffers())
        block = KeptInPlaceLease(received, kept, self.reaper, lambda root, _: LeasedArrays(root))
        del root
        arrays = block.__enter__()
        self.in_blocks.append(InPlace(lease, block, arrays, arrays["x"].tobytes(), ended))

    def leave_the_block(self, pick: Pick) -> None:
        """With or without an exception, and with or without an array that outlives the block."""
        held = self.in_blocks.pop(pick(0, len(self.in_blocks) - 1))
        assert held.arrays is not None
        held.kept = held.arrays["x"][:] if pick(0, 1) else None
        held.arrays = None
        held.consumed = not pick(0, 3)
        error = None if held.consumed else ValueError()
        if held.kept is None or error is not None:
            held.block.__exit__(error and type(error), error, None)
        else:
            with pytest.raises(LeaseInUseError):
                held.block.__exit__(None, None, None)
        if held.kept is not None:
            self.outliving.append(held)
            return
        assert held.ended.is_set()
        self._ended(held.lease, held.consumed)

    def drop_the_arrays(self, pick: Pick) -> None:
        held = self.outliving.pop(pick(0, len(self.outliving) - 1))
        held.kept = None
        assert held.ended.wait(JOIN_SECONDS), "the lease does not end with its last array"
        self._ended(held.lease, held.consumed)

    def wait_for_a_slot(self, pick: Pick) -> None:
        """A claim in another thread, which `_join_calls` joins as soon as there is a slot for it."""
        content, packed = self._content(pick)
        if self._make_room():
            self._claimed(self.ring.claim(len(content), timeout=None), content, packed)
            return
        call = Waiting(self.clock, lambda: self.ring.claim(len(content), timeout=PATIENCE_SECONDS))
        self.waiting_claim = call, content, packed

    def wait_for_the_end(self, pick: Pick) -> None:
        """A `wait_consumed` in another thread, which `_join_calls` joins when that payload retires."""
        standing = [sequence for sequence, payload in self.live.items() if not payload.retired]
        sequence = standing[pick(0, len(standing) - 1)]
        slot = self.live[sequence].slot
        call = Waiting(self.clock, lambda: self.ring.wait_consumed(slot, sequence, timeout=None))
        self.waiting_end = call, sequence

    def let_time_pass(self, pick: Pick) -> None:
        self.clock.time += (0.001, 1.0, PATIENCE_SECONDS / 3)[pick(0, 2)]
        if self.waiting_claim is None:
            return
        waiting, _, _ = self.waiting_claim
        if self.clock.time - waiting.since < PATIENCE_SECONDS:
            return
        # Its deadline has passed, but its thread still waits: a claim that fails wakes it.
        with pytest.raises(BufferFullError):
            self.ring.claim(0, timeout=0)
        assert isinstance(waiting.join(), BufferFullError)
        self.waiting_claim = None
        self.count["full_errors"] += 2
        self.count["claim_waits"] += 1
        self.claim_wait_seconds += self.clock.time - waiting.since

    def close_and_restart(self, pick: Pick) -> None:
        if pick(0, 9):  # seldom, so that a ring sees many operations
            return
        self.finish()
        self._start()

    def _join_calls(self) -> None:
        """Join the calls that can end now."""
        if self.waiting_claim is not None and self._make_room():
            waiting, content, packed = self.waiting_claim
            self.waiting_claim = None
            self.count["claim_waits"] += 1
            self.claim_wait_seconds += self.clock.time - waiting.since
            writer = waiting.join()
            assert isinstance(writer, SlotWriter)
            self._claimed(writer, content, packed)
        if self.waiting_end is not None:
            waiting, sequence = self.waiting_end
            if sequence not in self.live or self.live[sequence].retired:
                assert waiting.join() is True
                self.waiting_end = None

    def finish(self) -> None:
        """Close the ring. Views stay valid, late ends change nothing, and all other calls raise."""
        self.ring.close()
        self.ring.close()
        for waiting in (self.waiting_claim, self.waiting_end):
            assert waiting is None or isinstance(waiting[0].join(), BufferClosedError)
        self.waiting_claim = self.waiting_end = None
        assert self.ring.closed
        self._check_arrays()
        for refused in (
            lambda: self.ring.claim(0, timeout=0),
            lambda: self.ring.read_raw(0, 0),
            lambda: self.ring.consume(0, 0),
            self.ring.inspect,
            lambda: self.ring.wait_consumed(0, 0, 0),
            lambda: self.ring.checksum(0, 0, checksum_of),
            self.ring.get_ready_count,
            self.ring.ready,
            self.ring.statistics,
            *(writer.commit for writer in self.writers),
        ):
            with pytest.raises(BufferClosedError):
                refused()
        for writer in self.writers:
            writer.abort()
        for lease in self.leases:
            with pytest.raises(BufferClosedError):
                _ = lease.buffer
            assert not lease.acknowledge()
        for held in self.in_blocks:
            held.arrays = None
            held.block.__exit__(None, None, None)
        for held in self.outliving:
            held.kept = None
            assert held.ended.wait(JOIN_SECONDS)
        self.in_blocks, self.outliving = [], []
        self.attached.close()

    def end(self) -> None:
        """Close everything, with checks."""
        self.finish()
        self.reaper.close()

    # --- invariants ----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Compare all that the ring reports with the model."""
        self._check_statistics()
        self._check_lists()
        self._check_slots()
        self._check_bytes()
        self._check_headers()
        self._check_arrays()

    def _check_statistics(self) -> None:
        statistics = self.ring.statistics()
        payloads = list(self.live.values())
        states = [payload.state for payload in payloads]
        assert statistics.free == len(self.free)
        assert statistics.writing == states.count(SlotState.WRITING) == len(self.writers)
        assert statistics.ready == states.count(SlotState.READY) == self.ring.get_ready_count()
        assert statistics.reading == states.count(SlotState.READING)
        assert statistics.free + statistics.writing + statistics.ready + statistics.reading == self.slots
        assert statistics.leases == len(self.leases) + len(self.in_blocks) + len(self.outliving)
        assert {name: getattr(statistics, name) for name in self.count} == self.count
        assert statistics.claim_wait_seconds == pytest.approx(self.claim_wait_seconds)
        gone = ("consumed", "aborted", "dropped_unread", "dropped_delivered", "retired")
        leased = sum(payload.retired for payload in payloads)
        assert self.count["claimed"] == sum(self.count[name] for name in gone) + len(payloads) - leased
        now = self.clock.time
        ready = [now - p.committed_at for p in payloads if p.state is SlotState.READY]
        reading = [now - p.leased_at for p in payloads if p.state is SlotState.READING]
        assert statistics.oldest_ready_age == (ready[0] if ready else None)
        assert statistics.oldest_lease_age == max(reading, default=None)

    def _check_lists(self) -> None:
        for leased in (False, True):
            states = {SlotState.READY} | ({SlotState.READING} if leased else set())
            assert [(r.slot, r.sequence, r.nbytes) for r in self.ring.ready(leased=leased)] == [
                (p.slot, s, len(p.content)) for s, p in self.live.items() if p.state in states and not p.retired
            ]

    def _check_slots(self) -> None:
        infos = self.ring.inspect()
        assert [info.slot for info in infos] == list(range(self.slots))
        for slot in self.free:
            assert (infos[slot].state, infos[slot].leases, infos[slot].retired) == (SlotState.FREE, 0, True)
        for sequence, payload in self.live.items():
            info = infos[payload.slot]
            assert (info.state, info.sequence, info.nbytes) == (payload.state, sequence, payload.nbytes)
            assert (info.leases, info.retired) == (payload.leases, payload.retired)
            assert info.consumed_by == sum(1 << reader for reader in payload.consumed_by)
            if payload.committed:
                assert info.committed_at == payload.committed_at

    def _check_bytes(self) -> None:
        """Bytes do not change from commit to the last lease, in the writer's memory and in a reader's mapping."""
        for lease in self.leases:
            assert lease.buffer == self.live[lease.sequence].content
        for payload in self.live.values():
            if payload.committed:
                start = self.attached.slot_offset(payload.slot)
                assert self.attached.view[start : start + len(payload.content)] == payload.content

    def _check_headers(self) -> None:
        segment = self.ring.segment
        places = [segment.layout.header_offset(slot) for slot in range(self.slots)]
        headers = [SLOT_HEADER.unpack_from(segment.view, place) for place in places]
        for slot in self.free:
            assert headers[slot][0] == SlotState.FREE
        for sequence, payload in self.live.items():
            state, flags, in_header, nbytes, checksum, committed_at, consumed_by = headers[payload.slot]
            assert (state, in_header, nbytes) == (payload.state, sequence, payload.nbytes)
            assert flags == (0 if payload.checksum is None else HAS_CHECKSUM)
            assert checksum == (payload.checksum or 0)
            assert committed_at == payload.committed_at
            if not payload.retired:
                assert consumed_by == sum(1 << reader for reader in payload.consumed_by)

    def _check_arrays(self) -> None:
        """Arrays in slots do not change, inside their blocks and after them, and after the ring is closed."""
        for held in self.in_blocks:
            assert held.arrays is not None
            assert held.arrays["x"].tobytes() == held.values
        for held in self.outliving:
            assert held.kept is not None
            assert held.kept.tobytes() == held.values


def walk(seed: int, steps: int, weights: dict[str, int] = OPERATIONS) -> RingAndModel:
    """A random history, the same for the same seed.

    Raises:
        AssertionError: ring and model differ.
    """
    chance = random.Random(seed)
    on_full, retain = POLICIES[chance.randrange(len(POLICIES))]
    pair = RingAndModel(chance.randint(1, 4), READERS[chance.randrange(len(READERS))], on_full, retain)
    for operation in chance.choices(list(weights), list(weights.values()), k=steps):
        if pair.can(operation):
            pair.do(operation, chance.randint)
    pair.end()
    return pair
