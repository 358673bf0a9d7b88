"""A simulated producer: a ring, its writer, and the production server loops in actors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import xxhash

from dray.clock import Deadline
from dray.errors import BufferFullError, TransportError
from dray.payload.codec import plan as plan_payload
from dray.protocol import PayloadRef
from dray.protocol.handshake import ServerIdentity
from dray.ring import OnFull, Retain, SharedRingBuffer
from dray.transport.lanes.base import Lane
from dray.transport.served_connection import Service
from dray.transport.server_loop import ServerLoop
from dray.transport.server_statistics import LeaseInfo, ServerCounters, ServerStatistics
from dray.transport.trace import Discard, TraceEvent
from simulation.ledger import Ledger
from simulation.network import SimulatedKernel
from simulation.poll import SimulatedPoller
from simulation.scheduler import Process, Violation
from simulation.tagged import SimulatedWorker

DRAIN_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class RingSettings:
    """A ring of a run, and how it is served."""

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
        self.published: Callable[[PayloadRef], None] = lambda _: None
        self._start()

    def _start(self) -> None:
        settings = self.settings
        self._starts += 1
        self.process: Process = self.kernel.process(f"{self.name}.{self._starts}")
        self.ring = SharedRingBuffer(
            settings.slots,
            settings.slot_bytes,
            on_full=settings.on_full,
            readers=settings.readers,
            retain=settings.retain,
            clock=self.kernel.scheduler.clock,
        )
        self.books = self._ledger.open(self.ring, f"{self.name}.{self._starts}", settings.readers)
        identity = ServerIdentity(
            self.ring.producer_id, settings.slots, settings.slot_bytes, settings.max_leases, settings.readers
        )
        self.service = Service(
            ring=self.ring,
            identity=identity,
            secret=settings.secret,
            checksum=xxhash.xxh3_64_intdigest if settings.checksum else None,
            describe=lambda: self.statistics().to_json(),
            clock=self.kernel.scheduler.clock,
        )
        self._open()

    def _open(self) -> None:
        self.loops = [SimulatedLoop(self, index) for index in range(self.settings.loops)]
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
        return ServerStatistics(
            self.ring.producer_id, self.endpoints, connections, leases, ServerCounters(), self.ring.statistics()
        )

    def check(self) -> None:
        """The ring and the leases of all connections agree."""
        if not self.ring.closed:
            self._ledger.check(self.books, [lease for loop in self.loops for lease in loop.leases()])
            for loop in self.loops:
                if loop.worker is not None and loop.worker.reading:
                    loop.worker.reading = [send for send in loop.worker.reading if send.touchable]
                    self.books.check_read([send.memory for send in loop.worker.reading])

    # --- writing ----------------------------------------------------------------------------------------------

    def write(self, arrays: dict[str, Any], seconds: float, completes: Callable[[], bool]) -> None:
        """Put a payload in steps, each of which others may come between, or fail to."""
        scheduler, ring, books = self.kernel.scheduler, self.ring, self.books
        packed = plan_payload(arrays)
        by = scheduler.now() + seconds
        pause = 0.0005
        while True:
            try:
                writer = ring.claim(packed.nbytes, timeout=0)
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
            writer.commit()
            scheduler.note("commits")
        books.committed(writer.slot, writer.sequence, bytes(image))
        self.check()
        self.published(self.make_ref(writer.slot, writer.sequence, packed.nbytes))

    def make_ref(self, slot: int, sequence: int, nbytes: int) -> PayloadRef:
        """The reference for a payload of this server's ring."""
        return PayloadRef(self.ring.producer_id, slot, sequence, nbytes, self.endpoints)

    # --- state ------------------------------------------------------------------------------------------------

    def kill(self) -> None:
        """End the process where it stands; its payloads are lost."""
        self.kernel.scheduler.kill(self.process)
        self.books.lost = True
        self.ring.close()

    def restart(self) -> None:
        """End the server threads in order, and start others over the same ring at the same addresses."""
        for loop in self.loops:
            loop.stop()
            while not loop.actor.greenlet.dead:
                self.kernel.scheduler.wait((loop.actor.ended,), self.kernel.scheduler.now() + 3 * DRAIN_SECONDS)
                if loop.actor.stopped:
                    raise Violation("a loop was to end while its process was stopped")
        self._open()

    def replace(self) -> None:
        """Another producer at the same addresses."""
        if not self.process.dead:
            self.kill()
        self._start()
