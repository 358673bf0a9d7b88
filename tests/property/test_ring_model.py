"""The ring against a small model of it, over random histories of every policy."""

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dray.buffer import Lease, SharedRingBuffer, SlotState, SlotWriter
from dray.buffer.layout import SLOT_HEADER
from dray.errors import BufferFullError, SlotError, StaleSlotError

SLOT_BYTES = 16
COUNTERS = (
    "claimed",
    "committed",
    "aborted",
    "leased",
    "consumed",
    "dropped_unread",
    "dropped_delivered",
    "retired",
    "stale_reads",
    "stale_consumes",
    "late_finalises",
    "full_errors",
)


@dataclass
class Payload:
    slot: int
    content: bytes
    committed: bool = False
    over: bool = False
    delivered: bool = False
    leases: int = 0
    consumed_by: set[int] = field(default_factory=set)

    @property
    def state(self) -> SlotState:
        if not self.committed:
            return SlotState.WRITING
        return SlotState.READING if self.leases else SlotState.READY


class RingMachine(RuleBasedStateMachine):
    ring: SharedRingBuffer

    @initialize(
        slots=st.integers(1, 3),
        readers=st.sampled_from([1, 1, 2, 3]),
        policy=st.sampled_from(
            [(o, "unread") for o in ("overwrite", "overwrite", "block", "error")]
            + [(o, "newest") for o in ("block", "error")]
        ),
    )
    def create(self, slots: int, readers: int, policy: tuple[str, str]) -> None:
        on_full, self.retain = policy
        slots = max(slots, 2) if self.retain == "newest" else slots
        self.ring = SharedRingBuffer(slots, SLOT_BYTES, on_full=on_full, readers=readers, retain=self.retain)
        self.free = list(range(slots))
        self.live: dict[int, Payload] = {}  # by sequence, oldest first
        self.given: list[tuple[int, int]] = []
        self.writers: list[SlotWriter] = []
        self.finished_writers: list[SlotWriter] = []
        self.leases: list[Lease] = []
        self.ended_leases: list[Lease] = []
        self.newest: int | None = None
        self.count = dict.fromkeys(COUNTERS, 0)

    def teardown(self) -> None:
        if hasattr(self, "ring"):
            self.ring.close()

    # --- the model ----------------------------------------------------------------------------------------------

    def release_if_over(self, sequence: int) -> None:
        payload = self.live[sequence]
        if payload.over and not payload.leases:
            del self.live[sequence]
            self.free.append(payload.slot)

    def model_consume(self, sequence: int, reader: int) -> None:
        payload = self.live[sequence]
        if self.retain == "newest" or payload.over:
            return
        payload.consumed_by.add(reader)
        if len(payload.consumed_by) == self.ring.readers:
            payload.over = True
            self.count["consumed"] += 1

    def is_readable(self, slot: int, sequence: int, reader: int) -> bool:
        payload = self.live.get(sequence)
        return bool(
            payload
            and payload.slot == slot
            and payload.committed
            and not payload.over
            and reader not in payload.consumed_by
        )

    def any_reference(self, data: st.DataObject) -> tuple[int, int]:
        slots = st.integers(0, self.ring.slots - 1)
        invented = st.tuples(slots, st.integers(0, self.count["claimed"] + 1))
        live = [(payload.slot, sequence) for sequence, payload in self.live.items() if payload.committed]
        kinds = [st.sampled_from(live)] * 4 if live else []
        kinds += [st.sampled_from(self.given)] if self.given else []
        return data.draw(st.one_of(*kinds, invented))

    # --- what may happen ----------------------------------------------------------------------------------------

    @rule(content=st.binary(max_size=SLOT_BYTES))
    def put(self, content: bytes) -> None:
        before = len(self.writers)
        self.claim(content, 0)
        if len(self.writers) > before:
            self.commit_and_check(self.writers.pop())

    @rule(content=st.binary(max_size=SLOT_BYTES), extra=st.integers(0, 3))
    def claim(self, content: bytes, extra: int) -> None:
        nbytes = min(len(content) + extra, SLOT_BYTES)
        if not self.free and self.ring.on_full == "overwrite":
            oldest = next((s for s, p in self.live.items() if p.state is SlotState.READY), None)
            if oldest is not None:
                dropped = self.live[oldest]
                dropped.over = True
                self.count["dropped_delivered" if dropped.delivered else "dropped_unread"] += 1
                self.release_if_over(oldest)
        if not self.free:
            with pytest.raises(BufferFullError):
                self.ring.claim(nbytes, timeout=0)
            self.count["full_errors"] += 1
            return
        writer = self.ring.claim(nbytes, timeout=0)
        assert (writer.slot, writer.sequence) == (self.free.pop(0), self.count["claimed"])
        assert len(writer.buffer) == nbytes
        writer.buffer[: len(content)] = content
        self.count["claimed"] += 1
        self.given.append((writer.slot, writer.sequence))
        self.live[writer.sequence] = Payload(writer.slot, content)
        self.writers.append(writer)

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        self.commit_and_check(self.writers.pop(data.draw(st.integers(0, len(self.writers) - 1))))

    def commit_and_check(self, writer: SlotWriter) -> None:
        payload = self.live[writer.sequence]
        writer.commit(len(payload.content))
        self.finished_writers.append(writer)
        payload.committed = True
        self.count["committed"] += 1
        if self.retain == "newest":
            if self.newest is not None:
                self.live[self.newest].over = True
                self.count["retired"] += 1
                self.release_if_over(self.newest)
            self.newest = writer.sequence

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        writer = self.writers.pop(data.draw(st.integers(0, len(self.writers) - 1)))
        writer.abort()
        self.finished_writers.append(writer)
        self.live[writer.sequence].over = True
        self.release_if_over(writer.sequence)
        self.count["aborted"] += 1

    @precondition(lambda self: self.finished_writers)
    @rule(data=st.data())
    def finish_a_writer_again(self, data: st.DataObject) -> None:
        writer = data.draw(st.sampled_from(self.finished_writers))
        with pytest.raises(SlotError):
            writer.commit()
        writer.abort()
        self.count["late_finalises"] += 1

    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        (slot, sequence), reader = self.any_reference(data), data.draw(st.integers(0, self.ring.readers - 1))
        if not self.is_readable(slot, sequence, reader):
            with pytest.raises(StaleSlotError):
                self.ring.read_raw(slot, sequence, reader)
            self.count["stale_reads"] += 1
            return
        lease = self.ring.read_raw(slot, sequence, reader)
        assert lease.buffer == self.live[sequence].content
        self.leases.append(lease)
        self.live[sequence].leases += 1
        self.live[sequence].delivered = True
        self.count["leased"] += 1

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), consumed=st.booleans())
    def end_a_lease(self, data: st.DataObject, consumed: bool) -> None:
        lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        assert (self.ring.mark_consumed if consumed else self.ring.release_reading)(lease)
        self.ended_leases.append(lease)
        self.live[lease.sequence].leases -= 1
        if consumed:
            self.model_consume(lease.sequence, lease.reader)
        self.release_if_over(lease.sequence)

    @precondition(lambda self: self.ended_leases)
    @rule(data=st.data(), consumed=st.booleans())
    def end_a_lease_again(self, data: st.DataObject, consumed: bool) -> None:
        lease = data.draw(st.sampled_from(self.ended_leases))
        assert not (self.ring.mark_consumed if consumed else self.ring.release_reading)(lease)
        self.count["late_finalises"] += 1

    @rule(data=st.data())
    def consume(self, data: st.DataObject) -> None:
        (slot, sequence), reader = self.any_reference(data), data.draw(st.integers(0, self.ring.readers - 1))
        expected = self.is_readable(slot, sequence, reader)
        assert self.ring.consume(slot, sequence, reader) is expected
        if expected:
            self.model_consume(sequence, reader)
            self.release_if_over(sequence)
        else:
            self.count["stale_consumes"] += 1

    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        slot, sequence = self.any_reference(data)
        payload = self.live.get(sequence)
        stands = payload is not None and payload.slot == slot
        assert self.ring.is_live(slot, sequence) is stands
        if stands and payload.committed:
            assert self.ring.checksum(slot, sequence, lambda view: sum(view)) == sum(payload.content)
        else:
            with pytest.raises(StaleSlotError):
                self.ring.checksum(slot, sequence, lambda view: sum(view))
        if (slot, sequence) in self.given:
            assert self.ring.wait_consumed(slot, sequence, timeout=0) is (not stands or payload.over)

    # --- what must hold ------------------------------------------------------------------------------------------

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "ring"):
            return
        statistics = self.ring.statistics()
        states = [payload.state for payload in self.live.values()]
        assert statistics.free == len(self.free)
        assert statistics.writing == states.count(SlotState.WRITING)
        assert statistics.ready == states.count(SlotState.READY) == self.ring.get_ready_count()
        assert statistics.reading == states.count(SlotState.READING)
        assert statistics.leases == len(self.leases)
        assert {name: getattr(statistics, name) for name in self.count} == self.count

    @invariant()
    def leased_bytes_stand(self) -> None:
        if hasattr(self, "ring"):
            for lease in self.leases:
                assert lease.buffer == self.live[lease.sequence].content

    @invariant()
    def lists_agree(self) -> None:
        if hasattr(self, "ring"):
            for leased in (False, True):
                states = {SlotState.READY} | ({SlotState.READING} if leased else set())
                assert [(r.slot, r.sequence, r.nbytes) for r in self.ring.ready(leased=leased)] == [
                    (p.slot, s, len(p.content)) for s, p in self.live.items() if p.state in states and not p.over
                ]

    @invariant()
    def headers_agree(self) -> None:
        if not hasattr(self, "ring"):
            return
        segment = self.ring.segment
        headers = [
            SLOT_HEADER.unpack_from(segment.view, segment.layout.header_offset(i)) for i in range(self.ring.slots)
        ]
        for slot in self.free:
            assert headers[slot][0] == SlotState.FREE
        for sequence, payload in self.live.items():
            state, _, in_header, nbytes, _, _, consumed_by = headers[payload.slot]
            assert (state, in_header) == (payload.state, sequence)
            if payload.committed:
                assert nbytes == len(payload.content)
                if not payload.over:
                    assert consumed_by == sum(1 << reader for reader in payload.consumed_by)


RingMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
test_ring_behaves_like_its_model = RingMachine.TestCase
