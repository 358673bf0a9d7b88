"""``transfer = "reference"``: payloads stay in rings, references to them travel through Redis."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from dray.clock import MONOTONIC, Deadline
from dray.errors import (
    BufferClosedError,
    BufferFullError,
    DrayError,
    PayloadTooLargeError,
)
from dray.identifiers import PayloadId
from dray.jobs.process import StopFlag
from dray.jobs.queue import (
    Delivery,
    RolloutEntry,
    RolloutProducer,
    StreamLostError,
)
from dray.jobs.replica.heartbeat import Activity, AgeKind, Heartbeat
from dray.jobs.replica.stages import StageLog, handed_on
from dray.jobs.replica.user_code import RolloutPayload
from dray.payload import Arrays, plan, unpack
from dray.prefetch import BatchReader
from dray.protocol import PayloadRef
from dray.ring import SharedRingBuffer
from dray.transport import PayloadClient, PayloadServer, ReadResult
from dray.transport.lanes import LANES

_LOG = logging.getLogger("dray.jobs.replica.ring_transfer")
_SLICE = 0.5
_CHECK_INTERVAL = 2.0
_ORPHANED_AFTER = 6.0


class GroupSource:
    """Clients with different reader ids as one `dray.prefetch.Source`: the first reads, and all of them consume.

    Args:
        in_place: large payloads of this machine are read in their slots, which stay leased until the last array of
            each is gone.
        freed: called with payloads that all of the clients have consumed.
    """

    def __init__(
        self,
        clients: Sequence[PayloadClient],
        *,
        in_place: bool,
        freed: Callable[[Iterable[PayloadId]], None] = lambda ids: None,
    ) -> None:
        self._clients = clients
        self._in_place = in_place
        self._freed = freed
        self.read = clients[0].read

    def read_many(
        self, refs: Iterable[PayloadRef], *, timeout: float | None, consume: bool, return_errors: bool
    ) -> Iterator[ReadResult[Any]]:
        in_place = self._in_place and not consume
        return self._clients[0].read_many(
            refs, timeout=timeout, consume=consume, return_errors=return_errors, in_place=in_place
        )

    def consume(self, refs: Iterable[PayloadRef], *, timeout: float | None) -> int:
        deadline, wanted = Deadline.after(timeout), tuple(refs)
        consumed = sum(client.consume(wanted, timeout=deadline.timeout) for client in self._clients)
        self._freed(ref.id for ref in wanted)
        return consumed

    def close(self) -> None:
        for client in self._clients:
            client.close()


class OrphanWatch:
    """Sequence numbers that were found READY and not listed.

    Args:
        patience: seconds until such a payload counts as an orphan.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._since: dict[int, float] = {}

    def orphans(self, unlisted: Collection[int], now: float) -> list[int]:
        """Those of `unlisted`, all that there are now, which have been so for long enough."""
        self._since = {sequence: self._since.get(sequence, now) for sequence in unlisted}
        return [sequence for sequence, since in self._since.items() if now - since >= self._patience]

    def __len__(self) -> int:
        return len(self._since)


class RingPublisher:
    """The rollout replica's end of the way of trajectories. Every wait ends when the stop flag is set.

    It keeps the entries of payloads in the ring, to publish them again after a loss.

    Args:
        name: of the replica.
        stages: where the time that a payload takes is written.
        inline_bytes: payloads of up to this size are copied into their entries.
        serve: seconds for which payloads are served once it is known that the job ends.
        timeout: seconds that Redis may take to answer.
    """

    def __init__(
        self,
        ring: SharedRingBuffer,
        server: PayloadServer,
        queue: RolloutProducer,
        name: str,
        stop: StopFlag,
        activity: Activity,
        heartbeat: Heartbeat,
        stages: StageLog,
        *,
        inline_bytes: int,
        serve: float,
        timeout: float,
    ) -> None:
        self._ring = ring
        self._server = server
        self._queue = queue
        self._name = name
        self._stop = stop
        self._activity = activity
        self._heartbeat = heartbeat
        self._stages = stages
        self._inline_bytes = inline_bytes
        self._serve = serve
        self._timeout = timeout
        self._entries: dict[int, RolloutEntry] = {}
        self._orphans = OrphanWatch(_ORPHANED_AFTER)
        self._next_check = Deadline.after(_CHECK_INTERVAL)
        activity.show_ages(self._ages)
        activity.show_gauges(self._fill)

    def put(self, payload: RolloutPayload) -> bool:
        """Hand it on, waiting while there is no room; False if stopped before. One call at a time.

        Raises:
            PayloadError: its arrays cannot be carried; where there are too many bytes, the message names the key.
        """
        began = MONOTONIC.now()
        reference = self._claim(payload.arrays)
        if reference is None:
            return False
        packed = MONOTONIC.now()
        entry = payload.entry(
            self._name,
            reference.producer.hex(),
            reference.sequence,
            reference=reference.to_json(),
            image=self._small(reference),
        )
        self._entries[reference.sequence] = entry
        if len(self._entries) > 2 * self._ring.slots:
            self._entries = {each: self._entries[each] for each in self._waiting()}
        try:
            self._queue.publish(entry, timeout=self._timeout)
        except StreamLostError:
            self.refresh()
        self._stages.add(handed_on(self._stages, payload, entry.identity, began, packed))
        self._activity.counters.add_all({"payloads": 1, "bytes": reference.nbytes})
        self._reclaim()
        return True

    def _small(self, reference: PayloadRef) -> bytes | None:
        """A copy of a payload that is small enough to ride in its entry."""
        if reference.nbytes > self._inline_bytes:
            return None
        (copied,) = self._ring.copy_many([(reference.slot, reference.sequence, 0)], self._inline_bytes)
        return None if isinstance(copied, DrayError) else copied[0]

    def refresh(self) -> None:
        """Publish again what Redis has lost, if it was restarted empty."""
        self._queue.restore(self._again)
        self._reclaim()

    def drain(self, timeout: float) -> int:
        """Wait until everything handed on was consumed; returns how many payloads were not."""
        heartbeat, deadline = self._heartbeat, Deadline.after(timeout)
        for each in self._ring.ready(leased=True):
            while not heartbeat.unread.is_set() and not deadline.expired:
                if heartbeat.over_at is not None:
                    deadline = Deadline(min(deadline.at, heartbeat.over_at + self._serve))
                if self._ring.wait_consumed(each.slot, each.sequence, deadline.capped_at(_SLICE / 2).timeout):
                    break
        return self._ring.get_ready_count()

    def _ages(self) -> Mapping[AgeKind, float | None]:
        try:
            statistics = self._ring.statistics()
        except BufferClosedError:
            return {}
        return {"payload": statistics.oldest_ready_age, "lease": statistics.oldest_lease_age}

    def _fill(self) -> Mapping[str, float]:
        try:
            statistics = self._ring.statistics()
        except BufferClosedError:
            return {}
        return {"ring_slots": statistics.slots, "ring_used_slots": statistics.slots - statistics.free}

    def _reclaim(self) -> None:
        """Every few seconds: free payloads that no consumer will ask for, and publish again those whose entries
        another client has removed."""
        if not self._next_check.expired or self._stop.is_set:
            return
        self._next_check = Deadline.after(_CHECK_INTERVAL)
        ready = {each.sequence: each.slot for each in self._ring.ready() if each.sequence in self._entries}
        try:
            ended = self._queue.publish_trimmed([self._entries[sequence] for sequence in ready])
        except StreamLostError:
            return  # the next refresh publishes them again
        for sequence in self._orphans.orphans([entry.sequence for entry in ended], MONOTONIC.now()):
            consumed = [self._ring.consume(ready[sequence], sequence, each) for each in range(self._ring.readers)]
            if any(consumed):
                entry = self._entries[sequence]
                _LOG.warning(
                    "payload of work item %d is an orphan, which the stream does not list: freed", entry.work_item
                )
                self._activity.counters.add("reclaimed")
                self._heartbeat.finished_payloads([(entry.work_item, entry.part, entry.parts)])

    def _again(self) -> list[RolloutEntry]:
        waiting = [self._entries[sequence] for sequence in self._waiting()]
        _LOG.warning("Redis was restarted empty; %d payloads are published again", len(waiting))
        return waiting

    def _waiting(self) -> list[int]:
        """Sequence numbers of the payloads that a reader may still ask for: one may die, and another come."""
        return [each.sequence for each in self._ring.ready(leased=True) if each.sequence in self._entries]

    def _claim(self, arrays: Arrays) -> PayloadRef | None:
        while not self._stop.is_set:
            try:
                return self._server.put(arrays, timeout=_SLICE)
            except BufferFullError:
                self.refresh()
            except PayloadTooLargeError as error:
                nbytes, slot_bytes = plan(arrays).nbytes, self._ring.slot_bytes
                raise PayloadTooLargeError(
                    f"rollout.slot_bytes = {slot_bytes} is too small for a payload of {nbytes:,} bytes: "
                    f"set at least {nbytes}"
                ) from error
        return None


class RingReader:
    """The policy replica's end of the way of trajectories.

    Args:
        client: what `batches` reads with.
        timeout: seconds for reading what `read` is given.
    """

    def __init__(self, client: PayloadClient, batches: BatchReader, timeout: float) -> None:
        self._client = client
        self._batches = batches
        self._timeout = timeout
        self._carried = 0  # bytes that came in the entries themselves

    def read(self, deliveries: Sequence[Delivery]) -> Iterator[tuple[Delivery, Arrays | DrayError]]:
        """The arrays of each delivery, or why they cannot be had; nothing is consumed yet."""
        waiting: dict[PayloadId, Delivery] = {}
        references: list[PayloadRef] = []
        for delivery in deliveries:
            try:
                if delivery.entry.payload is not None:
                    # Memory of its own, because trainers may write to what they are given.
                    yield delivery, unpack(bytearray(delivery.entry.payload))
                    self._carried += len(delivery.entry.payload)
                    continue
                reference = PayloadRef.from_json(delivery.entry.reference or "")
            except DrayError as error:
                yield delivery, error
            else:
                references.append(reference)
                waiting[reference.id] = delivery
        for found in self._batches.fetch_all(references, timeout=self._timeout, consume=False):
            yield waiting[found.ref.id], found.outcome

    def consume(self, entries: Sequence[RolloutEntry]) -> None:
        """Have payloads freed at their producers, for all their readers; does not wait for it."""
        references = []
        for entry in entries:
            try:
                references.append(PayloadRef.from_json(entry.reference or ""))
            except DrayError as error:
                _LOG.warning("payload %s cannot be freed: %s", entry.identity, error)
        self._batches.discard(references)

    def unfreed(self) -> list[PayloadId]:
        """What `consume` was given and no producer has confirmed."""
        return [each.id for each in self._batches.to_free()]

    def statistics(self) -> Mapping[str, float]:
        """``bytes`` and ``retries`` so far, and ``unfreed``: the number of payloads that are done with and whose
        producers have not answered yet."""
        statistics = self._client.statistics()
        return {
            "bytes": statistics.bytes + self._carried,
            "retries": statistics.retries,
            "unfreed": self._batches.unfreed,
        }

    @property
    def transfer(self) -> str:
        """How payloads have come so far: ``"reference"``, read from their producers, or ``"inline"``, in the
        entries of the stream; both joined by ``+``; empty before the first."""
        return "+".join([*(["reference"] if self.lane else []), *(["inline"] if self._carried else [])])

    @property
    def lane(self) -> str:
        """The lane that payloads were read over, e.g. ``"shm"``; several joined by ``+``; empty if over none."""
        reads = self._client.statistics().reads_by_lane
        return "+".join(lane for lane in LANES if reads.get(lane))
