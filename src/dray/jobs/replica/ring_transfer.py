"""``transfer = "reference"``: payloads and weights stay in rings, references to them travel through Redis."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dray.clock import MONOTONIC, Deadline
from dray.counters import Counters
from dray.errors import (
    BufferClosedError,
    BufferFullError,
    DrayError,
    PayloadTooLargeError,
    ProducerLostError,
    StaleSlotError,
    TransportError,
)
from dray.identifiers import PayloadId
from dray.jobs.process import folder_is_local, own_address
from dray.jobs.queue import (
    Delivery,
    PublishedWeights,
    RolloutEntry,
    RolloutProducer,
    StreamLostError,
    WeightsChannel,
)
from dray.jobs.replica.base import Replica
from dray.jobs.replica.heartbeat import AgeKind
from dray.jobs.replica.transfer import Arrays
from dray.payload import plan, unpack
from dray.prefetch import BatchReader, FreeingThreads
from dray.protocol import PayloadRef
from dray.protocol.ref import has_control
from dray.resources import Closing
from dray.ring import SharedRingBuffer
from dray.transport import PayloadClient, PayloadServer, ReadResult
from dray.transport.lanes import LANES

# --- orphans -----------------------------------------------------------------------------------------------------

# Payloads in a ring that no consumer will ask for, and that are not only on their way to be freed.
#
# The stream no longer lists a payload from its commit on, and a moment later it is freed. One that is still READY,
# and
# not listed, some seconds after it was first seen so is an orphan: its consumer is gone. No I/O.


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


# --- ring transfer -----------------------------------------------------------------------------------------------

_LOG = logging.getLogger("dray.jobs.replica.ring_transfer")
_SLICE = 0.5
_CHECK_INTERVAL = 2.0
_ORPHANED_AFTER = 6.0
_FREE_PAUSE = 2.0
_PAGE = 4096
_MAX_SOCKET_FOLDER = 80


@contextmanager
def ring_rollout_ends(replica: Replica) -> Iterator[tuple[RingPublisher, RingWeightsSubscriber]]:
    """The ends of a rollout replica."""
    config = replica.spec.config.rollout
    with ExitStack() as opened:
        readers = replica.spec.config.policy.readers
        ring = opened.enter_context(SharedRingBuffer(config.slots, config.slot_bytes, readers=readers))
        server = opened.enter_context(_server(replica, ring))
        client = opened.enter_context(_client(replica))
        yield RingPublisher(replica, ring, server), RingWeightsSubscriber(replica, client)


@contextmanager
def ring_policy_ends(replica: Replica) -> Iterator[tuple[RingReader, RingWeightsPublisher]]:
    """The ends of a policy replica."""
    with ExitStack() as opened:
        readers = replica.spec.config.policy.readers
        ended = opened.enter_context(ExitStack())  # after the clients, which end the requests under way
        clients = [opened.enter_context(_client(replica, reader)) for reader in range(readers)]

        def consume(references: Iterable[PayloadRef], timeout: float) -> int:
            deadline = Deadline.after(timeout)
            return sum(client.consume(references, timeout=deadline.remaining) for client in clients)

        # A committed payload is freed however long its producer takes to answer. The slots of the rings limit the
        # number of payloads that wait.
        freeing = FreeingThreads(consume, Counters(), max_attempts=sys.maxsize, pause=_FREE_PAUSE)
        # The last heartbeat has what is left when every request has ended, not what was under way before.
        ended.callback(lambda: replica.activity.show("unfreed", float(freeing.unfreed)))
        ended.callback(freeing.join)
        opened.enter_context(freeing)
        batches = opened.enter_context(_batch_reader(replica, clients[0]))
        yield (
            RingReader(replica, clients[0], batches, freeing),
            opened.enter_context(RingWeightsPublisher(replica)),
        )


def rank_reader(replica: Replica) -> BatchReader:
    """What a policy replica that is not the first of its group reads with."""
    client = _client(replica, replica.index % replica.spec.config.policy.readers)
    return _batch_reader(replica, client)


def _batch_reader(replica: Replica, client: PayloadClient) -> BatchReader:
    config = replica.spec.config
    source = _InPlace(client) if config.policy.in_place else client
    return BatchReader(source, read_timeout=config.timeouts.read, consume=False)


class _InPlace:
    """A client as a `dray.prefetch.Source`: large payloads of this machine are read in place.

    The slot of such a payload stays leased until its last array is gone.
    """

    def __init__(self, client: PayloadClient) -> None:
        self._client = client
        self.read = client.read
        self.consume = client.consume
        self.close = client.close

    def read_many(
        self, refs: Iterable[PayloadRef], *, timeout: float | None, consume: bool, return_errors: bool
    ) -> Iterator[ReadResult[Any]]:
        return self._client.read_many(
            refs, timeout=timeout, consume=consume, return_errors=return_errors, in_place=not consume
        )


def _server(replica: Replica, ring: SharedRingBuffer) -> PayloadServer:
    config = replica.spec.config
    lane = config.job.lane
    sockets = replica.spec.folder.run / "sockets"
    # A Unix socket's path is short by law, and has no control characters in a reference: else the default place.
    fits = folder_is_local() and len(str(sockets)) <= _MAX_SOCKET_FOLDER and not has_control(str(sockets))
    directory: Path | None = sockets if fits else None
    return PayloadServer(
        ring,
        lane=lane,
        host=own_address(),
        threads=config.rollout.server_threads,
        secret=replica.spec.secret,
        max_leases=max(8, ring.slots),
        drain_timeout=replica.bounds.transfers,
        join_timeout=replica.bounds.threads,
        directory=directory,
    )


def _client(replica: Replica, reader: int = 0) -> PayloadClient:
    return PayloadClient(lane=replica.spec.config.job.lane, secret=replica.spec.secret, reader=reader)


class RingPublisher:
    """A `TrajectoryPublisher`. It keeps the entries of payloads in the ring, to publish them after a loss."""

    def __init__(self, replica: Replica, ring: SharedRingBuffer, server: PayloadServer) -> None:
        self._replica = replica
        self._ring = ring
        self._server = server
        self._queue = RolloutProducer(replica.redis, replica.keys)
        self._entries: dict[int, RolloutEntry] = {}
        self._orphans = OrphanWatch(_ORPHANED_AFTER)
        self._next_check = Deadline.after(_CHECK_INTERVAL)
        replica.activity.show_ages(self._ages)

    def put(
        self,
        arrays: Arrays,
        *,
        work_item: int,
        weight_version: int,
        part: int = 0,
        parts: int = 1,
        metadata: str = "",
    ) -> bool:
        reference = self._claim(arrays)
        if reference is None:
            return False
        entry = RolloutEntry(
            producer=reference.producer.hex(),
            sequence=reference.sequence,
            weight_version=weight_version,
            replica=self._replica.name,
            work_item=work_item,
            part=part,
            parts=parts,
            metadata=metadata,
            reference=reference.to_json(),
            payload=self._small(reference),
        )
        self._entries[reference.sequence] = entry
        if len(self._entries) > 2 * self._ring.slots:
            self._entries = {each: self._entries[each] for each in self._waiting()}
        try:
            self._queue.publish(entry, timeout=self._replica.spec.config.timeouts.redis)
        except StreamLostError:
            self.refresh()
        self._replica.activity.counters.add_all({"payloads": 1, "bytes": reference.nbytes})
        self._reclaim()
        return True

    def _small(self, reference: PayloadRef) -> bytes | None:
        """A copy of a payload that is small enough to ride in its entry."""
        most = self._replica.spec.config.rollout.inline_bytes
        if reference.nbytes > most:
            return None
        (copied,) = self._ring.copy_many([(reference.slot, reference.sequence, 0)], most)
        return None if isinstance(copied, DrayError) else copied[0]

    def refresh(self) -> None:
        self._queue.restore(self._again)
        self._reclaim()

    def drain(self, timeout: float) -> int:
        heartbeat, serve = self._replica.heartbeat, self._replica.bounds.serve
        deadline = Deadline.after(timeout)
        for each in self._ring.ready(leased=True):
            while not heartbeat.unread.is_set() and not deadline.expired:
                if heartbeat.over_at is not None:
                    deadline = Deadline(min(deadline.at, heartbeat.over_at + serve))
                if self._ring.wait_consumed(each.slot, each.sequence, deadline.capped_at(_SLICE / 2).timeout):
                    break
        return self._ring.get_ready_count()

    def _ages(self) -> Mapping[AgeKind, float | None]:
        try:
            statistics = self._ring.statistics()
        except BufferClosedError:
            return {}
        return {"payload": statistics.oldest_ready_age, "lease": statistics.oldest_lease_age}

    def _reclaim(self) -> None:
        """Every few seconds: free payloads that no consumer will ask for, and publish again those whose entries
        another client has removed."""
        if not self._next_check.expired or self._replica.stop.is_set:
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
                self._replica.activity.counters.add("reclaimed")
                self._replica.heartbeat.finished_payloads([(entry.work_item, entry.part, entry.parts)])

    def _again(self) -> list[RolloutEntry]:
        waiting = [self._entries[sequence] for sequence in self._waiting()]
        _LOG.warning("Redis was restarted empty; %d payloads are published again", len(waiting))
        return waiting

    def _waiting(self) -> list[int]:
        """Sequence numbers of the payloads that a reader may still ask for: one may die, and another come."""
        return [each.sequence for each in self._ring.ready(leased=True) if each.sequence in self._entries]

    def _claim(self, arrays: Arrays) -> PayloadRef | None:
        while not self._replica.stop.is_set:
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
    """See `TrajectoryReader`."""

    def __init__(
        self, replica: Replica, client: PayloadClient, batches: BatchReader, freeing: FreeingThreads
    ) -> None:
        self._replica = replica
        self._client = client
        self._batches = batches
        self._freeing = freeing
        self._carried = 0  # bytes that came in the entries themselves

    def read(self, deliveries: Sequence[Delivery]) -> Iterator[tuple[Delivery, Arrays | DrayError]]:
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
        timeout = self._replica.spec.config.timeouts.read
        for found in self._batches.fetch_all(references, timeout=timeout, consume=False):
            yield waiting[found.ref.id], found.outcome

    def consume(self, entries: Sequence[RolloutEntry]) -> None:
        references = []
        for entry in entries:
            try:
                references.append(PayloadRef.from_json(entry.reference or ""))
            except DrayError as error:
                _LOG.warning("payload %s cannot be freed: %s", entry.identity, error)
        self._freeing.add(references)

    def unfreed(self) -> list[PayloadId]:
        return [each.id for each in self._freeing.waiting()]

    def statistics(self) -> Mapping[str, float]:
        statistics = self._client.statistics()
        return {
            "bytes": statistics.bytes + self._carried,
            "retries": statistics.retries,
            "unfreed": self._freeing.unfreed,
        }

    @property
    def transfer(self) -> str:
        return "+".join([*(["reference"] if self.lane else []), *(["inline"] if self._carried else [])])

    @property
    def lane(self) -> str:
        reads = self._client.statistics().reads_by_lane
        return "+".join(lane for lane in LANES if reads.get(lane))


class RingWeightsPublisher(Closing):
    """See `WeightsPublisher`. The ring is made for the first weights, when their size is known."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._key = WeightsChannel(replica.redis, replica.keys)
        self._opened = ExitStack()
        self._server: PayloadServer | None = None
        self._first_nbytes = 0
        self._slot_bytes = 0

    def publish(self, weights: Arrays, version: int, epoch: int | None) -> None:
        if self._server is None:
            self._first_nbytes = plan(weights).nbytes
            self._server = self._open(self._first_nbytes)
        try:
            reference = self._server.put(weights, timeout=self._replica.spec.config.timeouts.read)
        except PayloadTooLargeError as error:
            nbytes = plan(weights).nbytes
            raise PayloadTooLargeError(
                f"{nbytes:,} bytes where the first weights had {self._first_nbytes:,}: their ring was made for at "
                f"most {self._slot_bytes:,}; return arrays of the same names, shapes and dtypes each time"
            ) from error
        self._key.publish(reference.to_json(), version, epoch=epoch)

    def restore(self) -> None:
        self._key.restore()

    def newest_version(self) -> int | None:
        newest = self._key.newest(self._replica.spec.config.timeouts.redis)
        return None if newest is None else newest.version

    def _open(self, nbytes: int) -> PayloadServer:
        self._slot_bytes = -(-(nbytes + nbytes // 16) // _PAGE) * _PAGE
        # One slot for each reader that is behind, one for the newest, one to write to.
        slots = self._replica.spec.config.rollout.replicas + 2
        ring = self._opened.enter_context(SharedRingBuffer(slots, self._slot_bytes, retain="newest"))
        return self._opened.enter_context(_server(self._replica, ring))

    def close(self) -> None:
        """End the server and the ring. Twice is fine."""
        self._opened.close()


class RingWeightsSubscriber:
    """See `WeightsSubscriber`."""

    def __init__(self, replica: Replica, client: PayloadClient) -> None:
        self._replica = replica
        self._client = client
        self._key = WeightsChannel(replica.redis, replica.keys)
        self._last: PublishedWeights | None = None

    def newer(self, timeout: float) -> tuple[int, Arrays] | None:
        deadline = Deadline.after(self._replica.spec.config.timeouts.read)
        counters = self._replica.activity.counters
        found = self._key.wait_newer(self._last, timeout)
        while found is not None and not self._replica.stop.is_set:
            reference = PayloadRef.from_json(found.reference)
            try:
                arrays = self._client.read(reference, timeout=deadline.remaining, consume=False)
            except (StaleSlotError, ProducerLostError, TransportError) as error:
                # Newer ones were published meanwhile, or are about to be: also by the successor of a policy that
                # has died.
                if not isinstance(error, StaleSlotError):
                    _LOG.warning("weights %d cannot be fetched: %s", found.version, error)
                counters.add("weight_stale")
                found = self._key.wait_newer(found, deadline.capped_at(_SLICE).timeout)
                continue
            self._last = found
            counters.add("weight_payloads")
            return found.version, arrays
        return None
