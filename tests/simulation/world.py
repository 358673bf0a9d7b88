"""One simulated run: producers, consumers and what happens to them, all of it out of one seed."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import random
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from greenlet import GreenletExit

from dray.errors import BufferClosedError, ConfigError
from dray.protocol import PayloadRef
from dray.protocol.server_session import MAX_INLINE_BYTES
from dray.ring import OnFull, Retain
from dray.transport.lanes import SHM, TCP, UCX
from simulation.batches import SimulatedBatches
from simulation.clients import SimulatedConsumer
from simulation.clock import ManualClock
from simulation.faults import HARMLESS, Fault, FaultPlan
from simulation.ledger import Ledger
from simulation.network import SimulatedKernel
from simulation.scheduler import Interrupted, Scheduler, Violation
from simulation.serving import RingSettings, SimulatedServer
from simulation.tagged import ucx_names
from simulation.troubles import Troubles

LONGEST = 4000.0
"""Simulated seconds that a run takes at most."""
QUIET = 400.0
"""Simulated seconds after which nothing may be left of clients that have gone."""
_LANES = ((SHM,), (TCP,), (UCX,), (SHM, TCP), (UCX, TCP), (SHM, TCP, UCX))
_RETAIN: tuple[Retain, ...] = ("unread", "unread", "unread", "newest")
_ON_FULL: tuple[OnFull, ...] = ("block", "error", "overwrite")


class Run:
    """A world made from a seed; `go` lets it happen.

    Args:
        seed: decides everything.
        seen: counts what happens, over all runs.
        traced: keep a trace.

    Attributes:
        busy: programs hardly pause: producers use their slots again while consumers lease.
    """

    faults: Sequence[Fault] = tuple(Fault)

    def __init__(self, seed: int, seen: Counter[str], traced: bool = False) -> None:
        self.seed = seed
        self.rng = rng = random.Random(seed)
        self.busy = rng.random() < 0.25
        self.scheduler = Scheduler(rng, ManualClock(), traced)
        self.plan = FaultPlan(rng, seen, among=self.faults)
        self.ledger = Ledger(self.scheduler)
        self.kernel = SimulatedKernel(self.scheduler, self.plan, self.ledger)
        self._serial = itertools.count(1)
        self._refs: dict[int, deque[PayloadRef]] = {}
        self._old: list[PayloadRef] = []
        self._published: set[PayloadRef] = set()
        secret = b"the job's secret" if rng.random() < 0.3 else None
        self.readers = rng.choice((1, 1, 1, 2, 3))
        self.servers = [self._make_server(index, secret) for index in range(rng.choice((1, 1, 2)))]
        self.consumers = [self._make_consumer(index, secret) for index in range(rng.choice((1, 2, 2, 3)))]
        self.troubles = Troubles(self)
        for server in self.servers:
            self.troubles.watch(server)
        for consumer in self.consumers:
            self.troubles.watch_client(consumer)
        self.scheduler.note(f"faults: {self.plan}")

    # --- what consumers see -----------------------------------------------------------------------------------

    def hand_references(self, reader: int, most: int) -> list[PayloadRef]:
        """See `simulation.clients.World`; no reference is given out twice at a time to one reader."""
        waiting = self._refs.setdefault(reader, deque())
        take = waiting.pop if self.busy and self.rng.random() < 0.5 else waiting.popleft
        return [take() for _ in range(min(most, len(waiting)))]

    def give_back(self, reader: int, refs: Sequence[PayloadRef]) -> None:
        # Those that programs have made up are not given to others.
        self._refs.setdefault(reader, deque()).extend(ref for ref in refs if ref in self._published)

    def old(self) -> list[PayloadRef]:
        return self._old[-4:] if self.busy else self._old

    def listened(self, ref: PayloadRef, since: float) -> bool:
        return self.troubles.listened(ref.producer, since)

    # --- the run ----------------------------------------------------------------------------------------------

    def go(self) -> None:
        """Let everything happen.

        Raises:
            Violation: something that dray promises did not hold.
        """
        try:
            for server in self.servers:
                self.start_writer(server)
            for consumer in self.consumers:
                for name in "ab"[: self.rng.choice((1, 1, 2))]:
                    consumer.spawn(name, self.rng.randint(3, 8) * (4 if self.busy else 1))
            self.troubles.start()
            if not self._until(lambda: not self._busy()):
                raise Violation(f"consumers did not end in {LONGEST} s")
            self._calm()
        finally:
            self._end()

    def _calm(self) -> None:
        """Nothing goes wrong any more: everything ends, and must have been in order."""
        scheduler = self.scheduler
        scheduler.note("calm")
        self.plan.calm = True
        self.troubles.end()
        if not self._until(lambda: not self.troubles.restarting):
            raise Violation("a server's restart does not end")
        closing = [consumer for consumer in self.consumers if not consumer.process.dead]
        if not self.plan.kinds <= HARMLESS:  # else what is closed in trouble may not reach its producers
            closing = [consumer for consumer in closing if not consumer.closed]
        actors = [scheduler.spawn(consumer.process, "close", consumer.close) for consumer in closing]
        if not self._until(lambda: all(actor.greenlet.dead for actor in actors)):
            raise Violation("a client's close does not end")
        for consumer in closing:
            consumer.ended_in_order()
        for consumer in self.consumers:
            consumer.release_arrays()
        gc.collect()
        self._check_quiet()
        self._drain()

    def _check_quiet(self) -> None:
        """Nothing is left of clients that have gone, and the ledger is in order."""
        self.scheduler.run(self.scheduler.now() + QUIET, lambda: False)
        for consumer in self.consumers:
            left = self.kernel.is_open(consumer.process)
            if left:
                raise Violation(f"{consumer.process.name} is gone and left {', '.join(left)}")
        for server in self.servers:
            if server.process.dead or server.closing:
                continue
            server.ring.observe()
            server.check()
            server.books.check_end()
            self._check_attachments(server)
            if sum(loop.connections for loop in server.loops):
                raise Violation(f"{server.name} keeps connections of clients that are gone")

    def _check_attachments(self, server: SimulatedServer) -> None:
        """All attachments have ended that a consumer had learned of."""
        if not server.machine.pages:
            return
        unknown = sum(page.process is None for page in server.machine.pages)
        attachments = server.ring.statistics().attachments
        if attachments > unknown:
            raise Violation(f"{server.name} keeps {attachments} attachments, {unknown} never came to a consumer")

    def _drain(self) -> None:
        """What is still there can be read."""
        for server in self.servers:
            if server.process.dead or server.closing or server.ring.retain == "newest":
                continue
            waiting = server.ring.ready()
            for reader in range(server.settings.readers):
                left = [
                    server.make_ref(each.slot, each.sequence, each.nbytes)
                    for each in waiting
                    if not each.consumed_by >> reader & 1
                ]
                if left:
                    self._read_all(server, reader, left)
            if server.ring.ready(leased=True):
                raise Violation(f"{server.name}: payloads were consumed by all readers and are there")

    def _read_all(self, server: SimulatedServer, reader: int, refs: list[PayloadRef]) -> None:
        last = SimulatedConsumer(self, f"last{server.name}.{reader}", reader, True, secret=server.settings.secret)

        def read() -> None:
            last.client.asks(refs)
            for ref in refs:
                with last.bounded(30.0):
                    data = last.client.read_bytes(ref, timeout=30.0)
                last.got(ref, data.tobytes(), consume=True)
            last.close()
            last.busy = -1

        actor = self.scheduler.spawn(last.process, "read", read)
        self._until(lambda: actor.greenlet.dead)
        if last.busy >= 0:
            raise Violation(f"{server.name}: what is READY cannot be read")
        self.scheduler.run(self.scheduler.now() + 3.0, lambda: False)

    def _until(self, done: Any) -> bool:
        return self.scheduler.run(self.scheduler.now() + LONGEST, done)

    def _busy(self) -> bool:
        return any(consumer.busy for consumer in self.consumers if not consumer.process.dead)

    def _end(self) -> None:
        self.scheduler.end()
        for books in self.ledger.all:
            books.ring.close()
        for held in list(self.kernel.sockets.values()):
            held.close()

    # --- who there is -----------------------------------------------------------------------------------------

    def _make_server(self, index: int, secret: bytes | None) -> SimulatedServer:
        rng = self.rng
        retain: Retain = rng.choice(_RETAIN[-2:] if self.busy else _RETAIN)
        on_full: OnFull = rng.choice(_ON_FULL if retain == "unread" else _ON_FULL[:2])
        if self.busy:
            slots = rng.randint(2, 4)
            on_full = "overwrite" if retain == "unread" and rng.random() < 0.6 else on_full
        else:
            slots = rng.randint(2, 6) + (2 if retain == "newest" else 0)
        settings = RingSettings(
            slots=slots,
            slot_bytes=70_000 if rng.random() < 0.05 else 2048,
            on_full=on_full,
            readers=self.readers,
            retain=retain,
            max_leases=rng.choice((1, 2, 8)),
            lanes=rng.choice(_LANES[:1] if self.busy and rng.random() < 0.7 else _LANES),
            loops=rng.choice((1, 2)),
            secret=secret,
            checksum=rng.random() < 0.5,
            direct=rng.random() < (0.95 if self.busy else 0.8),
            waits=rng.random() < 0.6,
        )
        return SimulatedServer(self.kernel, self.ledger, f"server{index}", settings)

    def _make_consumer(self, index: int, secret: bytes | None) -> Any:
        rng = self.rng
        reader = index % self.readers
        welcome = True
        if rng.random() < 0.06:
            welcome = False
            if rng.random() < 0.5:
                reader = self.readers
            else:
                secret = None if secret is not None else b"another job's secret"
        kind = SimulatedBatches if rng.random() < 0.35 else SimulatedConsumer
        lane = rng.choice(("auto", "auto", "auto", *(lane.name for lane in self.servers[0].settings.lanes)))
        inline_bytes = rng.choice((0, 200, 1000, MAX_INLINE_BYTES))
        return kind(
            self, f"client{index}", reader, welcome, secret=secret, verify=rng.random() < 0.5, lane=lane,
            inline_bytes=inline_bytes, direct=rng.random() < 0.85,
        )  # fmt: skip

    def start_writer(self, server: SimulatedServer) -> None:
        """Have a producer write, as long as it runs."""
        rng, scheduler = self.rng, self.scheduler
        count = rng.randint(3, 14) * (5 if self.busy else 1)
        pauses = (0.0, 0.0, 0.0001, 0.0005) if self.busy else (0.0, 0.0005, 0.02, 2.0, 30.0)

        def run() -> None:
            for _ in range(count):
                if self.plan.calm:
                    break
                server.write(self.arrays(server), rng.choice((0.5, 5.0, 60.0)), lambda: rng.random() > 0.08)
                scheduler.sleep(rng.choice(pauses))

        def wait() -> None:
            for _ in range(rng.choice((0, 0, 1, 4))):
                scheduler.sleep(rng.choice((0.001, 0.5, 5.0)))
                recent = [ref for ref in self._old[-5:] if ref.producer == server.ring.producer_id]
                if self.plan.calm or not recent:
                    break
                with contextlib.suppress(BufferClosedError):
                    server.wait_consumed(rng.choice(recent), rng.choice((0.0, 0.3, 3.0, 30.0)))

        scheduler.spawn(server.process, "waiter", wait)
        server.published = self._publish
        scheduler.spawn(server.process, "writer", run)

    def arrays(self, server: SimulatedServer) -> dict[str, Any]:
        """Arrays that no other payload has, of any size."""
        size = self.rng.choice((0, 1, 40, 700, 1500, server.settings.slot_bytes - 400))
        number = next(self._serial)
        body = np.frombuffer(number.to_bytes(4, "little") * (size // 4 + 1), np.uint8)[:size]
        return {"token": np.array([number, size], np.uint64), "body": body}

    def _publish(self, ref: PayloadRef) -> None:
        self._old.append(ref)
        self._published.add(ref)
        for reader in range(self.readers):
            self._refs.setdefault(reader, deque()).append(ref)


@contextlib.contextmanager
def quiet_process() -> Iterator[None]:
    """No log lines and no collector that comes when it likes, for as long as runs are made.

    Nor words about generators of dead or interrupted actors that were to be closed in order and are not.
    """
    with contextlib.suppress(ConfigError):
        ucx_names()  # here, as what is loaded before `freeze` is not looked through after each run
    disabled = logging.root.manager.disable
    collecting = gc.isenabled()
    unraisable = sys.unraisablehook

    def unwound(what: sys.UnraisableHookArgs) -> None:
        if not issubclass(what.exc_type, GreenletExit | Interrupted):
            unraisable(what)

    sys.unraisablehook = unwound
    logging.disable(logging.CRITICAL)
    gc.disable()
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        sys.unraisablehook = unraisable
        logging.disable(disabled)
        if collecting:
            gc.enable()
