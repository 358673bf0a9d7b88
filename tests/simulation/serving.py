"""A simulated producer: a ring, its writer, and the production server loops in actors."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import xxhash

from dray.clock import Deadline
from dray.errors import BufferClosedError, BufferFullError, TransportError
from dray.payload.codec import plan as plan_payload
from dray.protocol import PayloadRef
from dray.protocol.handshake import ServerIdentity
from dray.ring import OnFull, Retain, RingStatistics, SharedRingBuffer, SlotInfo
from dray.ring.direct import RESCAN_SECONDS
from dray.transport.lanes.base import Lane
from dray.transport.server_loop import ServerLoop
from dray.transport.server_statistics import LeaseInfo, ServerCounters, ServerStatistics
from dray.transport.service import Service
from dray.transport.trace import Discard, TraceEvent
from simulation.faults import WORK_ITEM
from simulation.ledger import Ledger
from simulation.network import SimulatedKernel
from simulation.poll import SimulatedPoller
from simulation.scheduler import Process, Violation
from simulation.shared import SimulatedMachine
from simulation.stream_serving import SimulatedStream
from simulation.tagged import SimulatedWorker
from simulation.threads import SimulatedMutex

DRAIN_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class RingSettings:
    """A ring of a run, and how it is served; with groups, it has a stream."""

    slots: int
    slot_bytes: int
    on_full: OnFull
    readers: int
    retain: Retain
    max_leases: int
    lanes: tuple[Lane, ...]
    loops: int
    secret: bytes | None
    checksum: bool
    direct: bool
    waits: bool
    groups: int = 0
    max_deliveries: int | None = None


class SimulatedRing(SharedRingBuffer):
    """A ring that can be observed without a change."""

    def inspect(self) -> tuple[SlotInfo, ...]:
        return tuple([slot.info() for slot in self._table.slots])

    def statistics(self) -> RingStatistics:
        return self._table.statistics()

    @property
    def changing(self) -> bool:
        """A thread is in the middle of an operation, or about to begin one."""
        lock = cast(SimulatedMutex, self._table.lock)
        return lock.held or lock.awaited > 0 or self._table.changing

    @property
    def words(self) -> dict[int, int]:
        """The lease words that were found last, by slot."""
        return {slot.index: slot.words for slot in self._table.slots if slot.words}

    @property
    def due(self) -> set[int]:
        """Retired slots whose direct leases are not ruled out."""
        return {slot.index for slot in self._table.due}


class SimulatedLoop:
    """The production server loop with an endpoint of its own on each lane; it runs in an actor."""

    def __init__(self, server: SimulatedServer, index: int) -> None:
        kernel, process = server.kernel, server.process
        self._scheduler = kernel.scheduler
        self._stopping = False
        poller = SimulatedPoller(kernel, server.check)
        self.worker: SimulatedWorker | None = None
        listeners = []
        for lane in server.settings.lanes:
            address = server.address(lane, index)
            worker = None
            if lane.tagged:
                self.worker = worker = kernel.worker(process)
                worker.signal = poller.signal
            listeners.append(kernel.listen(address, process, poller.signal, worker))
        self._loop = ServerLoop(
            f"loop{index}",
            cast(Any, listeners),
            dataclasses.replace(server.service, trace=self._check_discard),
            lambda: poller,
        )
        self.actor = self._scheduler.spawn(process, f"loop{index}", self._loop.run, idles=True)

    def stop(self) -> None:
        """Accept no more, finish what is in flight for a while, end."""
        self._stopping = True
        self._loop.stop(Deadline.after(DRAIN_SECONDS, self._scheduler.clock))

    def watch_consumers(self) -> None:
        """See `ServerLoop.watch_consumers`."""
        self._loop.watch_consumers()

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._loop.connections)

    def leases(self) -> list[LeaseInfo]:
        """All live leases, those of connections that are not drained too."""
        return self._loop.connections.leases()

    def _check_discard(self, event: TraceEvent) -> None:
        if not isinstance(event, Discard) or self._scheduler.ending or self._stopping:
            return
        if event.endpoint.startswith("unix:") and event.leases and not isinstance(event.error, TransportError):
            raise Violation(f"a reader's connection was closed while it works in place: {event.error!r}")


class SimulatedServer:
    """A producer at its addresses; it may be restarted, or replaced by another one there."""

    def __init__(self, kernel: SimulatedKernel, ledger: Ledger, name: str, settings: RingSettings) -> None:
        self.kernel = kernel
        self.name = name
        self.settings = settings
        self._ledger = ledger
        self._starts = 0
        self.closing = self.deaf = False
        self.at_step: Callable[[], None] = lambda: None
        self.published: Callable[[PayloadRef], None] = lambda _: None
        self._start()

    def _start(self) -> None:
        settings = self.settings
        self._starts += 1
        self.closing = False
        self.process: Process = self.kernel.process(f"{self.name}.{self._starts}")
        self.process.at_step = lambda: self.at_step()
        self.machine = SimulatedMachine(self.kernel, self.process, settings.slots, settings.readers)
        self.ring = SimulatedRing(
            settings.slots,
            settings.slot_bytes,
            on_full=settings.on_full,
            readers=settings.readers,
            retain=settings.retain,
            clock=self.kernel.scheduler.clock,
            machine=self.machine,
        )
        books = self.books = self._ledger.open(self.ring, f"{self.name}.{self._starts}", settings.readers)
        now = self.kernel.scheduler.now
        self.machine.stored = lambda slot, reader, value, seen: books.stored(
            slot, reader, value, now() if seen else None
        )
        identity = ServerIdentity(
            self.ring.producer_id, settings.slots, settings.slot_bytes, settings.max_leases, settings.readers
        )
        self.stream = SimulatedStream(self) if settings.groups else None
        self.service = Service(
            ring=self.ring,
            identity=identity,
            secret=settings.secret,
            checksum=xxhash.xxh3_64_intdigest if settings.checksum else None,
            describe=lambda: self.statistics().to_json(),
            clock=self.kernel.scheduler.clock,
            direct=settings.direct,
            stream=self.stream,
        )
        self._open()

    def _open(self) -> None:
        self.ring.count_servers(1)
        self.loops = [SimulatedLoop(self, index) for index in range(self.settings.loops)]
        if self.ring.has_direct_consumers:
            self.loops[0].watch_consumers()
        self.endpoints = tuple(
            self.address(lane, index) for lane in self.settings.lanes for index in range(self.settings.loops)
        )

    def address(self, lane: Lane, index: int) -> str:
        """Where one loop listens on one lane."""
        if lane.local:
            return f"unix:/{self.name}/{index}"
        number = int(self.name.removeprefix("server"))
        return f"{lane.scheme}:127.0.0.1:{1000 * (number + 1) + 10 * lane.number + index}"

    def statistics(self) -> ServerStatistics:
        """The answer to STAT."""
        leases = tuple(lease for loop in self.loops for lease in loop.leases())
        connections = sum(loop.connections for loop in self.loops)
        self.ring.observe()
        return ServerStatistics(
            self.ring.producer_id, self.endpoints, connections, leases, ServerCounters(), self.ring.statistics()
        )

    def check(self) -> None:
        """The ring and the leases of all connections agree."""
        if not self.ring.closed and not self.ring.changing:
            live = [lease for loop in self.loops for lease in loop.leases()]
            self.books.check(live, self.ring.words, self.ring.due)
            # A consumer of a stream may connect to another producer between an acknowledgement and its wait.
            if self.kernel.plan.kinds <= WORK_ITEM and not self.kernel.plan.stalls and self.stream is None:
                self.books.check_late_looks(self.kernel.scheduler.now(), self.deaf)
            for loop in self.loops:
                if loop.worker is not None and loop.worker.reading:
                    loop.worker.reading = [send for send in loop.worker.reading if send.touchable]
                    self.books.check_read([send.memory for send in loop.worker.reading])

    # --- writing ----------------------------------------------------------------------------------------------

    def write(self, arrays: dict[str, Any], seconds: float, completes: Callable[[], bool]) -> None:
        """Put a payload in steps, each of which others may come between, or fail to."""
        with contextlib.suppress(BufferClosedError):
            self._write(arrays, seconds, completes)

    def _write(self, arrays: dict[str, Any], seconds: float, completes: Callable[[], bool]) -> None:
        scheduler, ring, books = self.kernel.scheduler, self.ring, self.books
        packed = plan_payload(arrays)
        by = scheduler.now() + seconds
        pause = 0.0005
        while True:
            try:
                writer = ring.claim(packed.nbytes, timeout=seconds if self.settings.waits else 0)
                break
            except BufferFullError:
                if ring.on_full == "error" or scheduler.now() >= by or self.kernel.plan.calm:
                    self.kernel.plan.count("ring full")
                    return
            scheduler.sleep(pause)
            pause *= 4
        scheduler.note(f"claims slot {writer.slot} sequence {writer.sequence}")
        books.claimed(writer.slot, writer.sequence)
        with writer:
            writer.buffer[:] = b"\xdb" * packed.nbytes
            self.check()
            scheduler.pause()
            image = bytearray(packed.nbytes)
            packed.write(memoryview(image))
            half = packed.nbytes // 2
            writer.buffer[:half] = image[:half]
            if not completes():
                scheduler.note("aborts")
                return
            scheduler.pause()
            writer.buffer[half:] = image[half:]
            books.committing(writer.slot, writer.sequence, bytes(image))
            try:
                writer.commit()
            except BufferClosedError:
                books.refused(writer.sequence)
                raise
            scheduler.note("commits")
        books.committed(writer.sequence, scheduler.now())
        self.check()
        self.published(self.make_ref(writer.slot, writer.sequence, packed.nbytes))

    def make_ref(self, slot: int, sequence: int, nbytes: int) -> PayloadRef:
        """The reference for a payload of this server's ring."""
        return PayloadRef(self.ring.producer_id, slot, sequence, nbytes, self.endpoints)

    def wait_consumed(self, ref: PayloadRef, seconds: float) -> None:
        """Wait until a payload retires."""
        if self.ring.wait_consumed(ref.slot, ref.sequence, seconds):
            info = self.ring.inspect()[ref.slot]
            if info.sequence == ref.sequence and not info.retired:
                raise Violation(f"{self._ledger.name(ref)} is reported as consumed, and is still there")
            self.kernel.plan.count("wait_consumed: done")

    # --- state ------------------------------------------------------------------------------------------------

    def begin_close(self) -> None:
        """What is there from now on may be lost."""
        self.closing = self.books.lost = True

    def close(self) -> None:
        """End the server threads in order, and close the ring; the process ends soon after. In a thread of it."""
        scheduler = self.kernel.scheduler
        if self.stream is not None:
            self.stream.end()
        self.ring.count_servers(-1)
        self._end_loops()
        self.ring.close()
        scheduler.at(scheduler.now() + scheduler.rng.choice((0.0, 0.01, 1.0, 30.0)), self._exit)

    def _exit(self) -> None:
        self.kernel.scheduler.kill(self.process)

    def kill(self) -> None:
        """End the process where it stands; its payloads are lost."""
        self.books.lost = True
        self.kernel.scheduler.kill(self.process)
        self.ring.close()

    def restart(self) -> None:
        """End the server threads in order, and start others over the same ring at the same addresses."""
        self.deaf = True
        self.ring.count_servers(-1)
        self._end_loops()
        self._open()
        scheduler = self.kernel.scheduler
        scheduler.at(scheduler.now() + 2 * RESCAN_SECONDS, self._end_deafness)

    def _end_deafness(self) -> None:
        self.deaf = False

    def _end_loops(self) -> None:
        for loop in self.loops:
            loop.stop()
            while not loop.actor.greenlet.dead:
                self.kernel.scheduler.wait((loop.actor.ended,), self.kernel.scheduler.now() + 3 * DRAIN_SECONDS)
                if loop.actor.stopped:
                    raise Violation("a loop was to end while its process was stopped")

    def replace(self) -> None:
        """Another producer at the same addresses."""
        if not self.process.dead:
            self.kill()
        self._start()
