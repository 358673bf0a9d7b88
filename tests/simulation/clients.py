"""Simulated consumers: processes whose threads use a `PayloadClient`, step by step."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from dray.errors import (
    AuthenticationError,
    BufferClosedError,
    DrayError,
    LeaseInUseError,
    ProducerLostError,
    ReaderIdError,
    ServerBusy,
    SlotError,
    StaleSlotError,
    TransportError,
)
from dray.protocol import PayloadRef
from dray.transport.lanes import SHM
from simulation.faults import FaultPlan
from simulation.ledger import Ledger
from simulation.network import SimulatedKernel
from simulation.observed import ObservedClient
from simulation.scheduler import Actor, Interrupted, Process, Violation
from simulation.shared import SimulatedAttachment

LEASE_END_SECONDS = 1.0
LONG_ENOUGH = 5.0
"""A read with this much time fails only where something is wrong."""


class World(Protocol):
    """What a consumer sees of the run."""

    kernel: SimulatedKernel
    ledger: Ledger
    plan: FaultPlan
    busy: bool

    def hand_references(self, reader: int, most: int) -> list[PayloadRef]:
        """References that this reader does not have yet, or gave back."""
        ...

    def give_back(self, reader: int, refs: Sequence[PayloadRef]) -> None:
        """References that this reader will get again."""
        ...

    def old(self) -> list[PayloadRef]:
        """References of long ago."""
        ...

    def listened(self, ref: PayloadRef, since: float) -> bool:
        """The producer of a reference has listened without a break since then."""
        ...


class _Abandoned(Exception):
    """A program leaves a block with an error of its own."""


class SimulatedConsumer:
    """A process that reads.

    Args:
        world: the run that it belongs to.
        name: its name.
        reader: its reader id.
        welcome: it has the right secret and a reader id that exists.
        options: of its client.
    """

    def __init__(self, world: World, name: str, reader: int, welcome: bool, **options: Any) -> None:
        self.world = world
        self.reader = reader
        self.welcome = welcome
        self.scheduler = world.kernel.scheduler
        self.rng = self.scheduler.rng
        self.process: Process = world.kernel.process(name)
        self.client = ObservedClient(world.kernel, self.process, reader=reader, **options)
        self.consumed: list[PayloadRef] = []
        self.busy = 0
        self.closed = False
        self._pinned: list[Any] = []
        self._doing: list[list[PayloadRef]] = []
        self._began: dict[Actor | None, float] = {}

    def spawn(self, name: str, steps: int) -> None:
        """Start a thread that makes `steps` random calls one after the other."""
        self.busy += 1

        def run() -> None:
            for _ in range(steps):
                if self.closed:
                    break
                self._something()
            self.busy -= 1

        self.scheduler.spawn(self.process, name, run)

    def close(self) -> None:
        """Close the client in order."""
        self.closes()
        with self.unhurried(10.0):
            self.client.close()

    def closes(self) -> None:
        """From now on, calls under way may take longer, because they make sure that their ACKs arrive."""
        self.closed = True
        self.release_arrays()
        for actor in self.process.actors:
            actor.slack = math.inf

    def release_arrays(self) -> None:
        """Drop the arrays that outlived their blocks."""
        self._pinned.clear()

    @property
    def attachments(self) -> list[SimulatedAttachment]:
        """Those of the process."""
        return list(self.client.network.attachments)

    def may_interrupt(self, actor: Actor) -> bool:
        """A signal handler may raise in what a thread does now."""
        return actor.bound < math.inf and not actor.idles

    def killed(self) -> None:
        """The process dies now: what it was about to consume may be consumed."""
        for refs in self._doing:
            for ref in refs:
                self.world.ledger.give_up(ref, self.reader)

    def ended_in_order(self) -> None:
        """The producers must know what the process has consumed."""
        for ref in self.consumed:
            self.world.ledger.keep(ref, self.reader)

    # --- what programs do -------------------------------------------------------------------------------------

    def _something(self) -> None:
        seconds = self.rng.choice((0.02, 0.5, 5.0, 5.0, 30.0, 30.0))
        choice = self.rng.random() * (0.7 if self.world.busy else 1.0)
        if choice < 0.34:
            self._attempt(self._some(1), seconds, self._read)
        elif choice < 0.52:
            self._attempt(self._some(6), seconds, self._read_many)
        elif choice < 0.68:
            self._attempt(self._some(1), seconds, self._lease)
        elif choice < 0.74:
            self._attempt(self._some(3), seconds, self._consume)
        elif choice < 0.79:
            self._attempt(self._some(1), seconds, self._stat)
        elif choice < 0.88 and self._pinned:
            self._pinned.pop()
        else:
            self.scheduler.sleep(self.rng.choice((0.001, 0.05, 1.0, 20.0, 99.0, 110.0, 125.0)))

    def _some(self, most: int) -> list[PayloadRef]:
        """References, mostly fresh ones."""
        old = self.world.old()
        if old and self.rng.random() < 0.15:
            ref = self.rng.choice(old)
            match self.rng.randrange(6):
                case 0:
                    ref = dataclasses.replace(ref, sequence=ref.sequence + self.rng.choice((1, 2, 1000)))
                case 1:
                    ref = dataclasses.replace(ref, slot=ref.slot + self.rng.choice((1, 1000)))
                case 2:
                    ref = dataclasses.replace(ref, nbytes=ref.nbytes + self.rng.choice((-1, 1)))
            return [ref]
        for _ in range(4):
            if refs := self.world.hand_references(self.reader, self.rng.randint(1, most)):
                return refs
            if old := self.world.old():
                return [self.rng.choice(old)]
            self.scheduler.sleep(0.0005 if self.world.busy else 0.5)
        return []

    def _attempt(
        self, refs: list[PayloadRef], seconds: float, run: Callable[[list[PayloadRef], float], None]
    ) -> None:
        name = run.__name__.strip("_")
        if not refs:
            return
        self.scheduler.note(f"{name} {', '.join(map(self.world.ledger.name, refs))} within {seconds} s")
        self.client.asks(refs)
        self._began[self.scheduler.actor] = self.scheduler.now()
        self._doing.append(refs)
        try:
            with self.bounded(seconds):
                run(refs, seconds)
            outcome = "done"
        except Interrupted:
            outcome = "Interrupted"
            for ref in refs:
                self.world.ledger.give_up(ref, self.reader)
            self.world.give_back(self.reader, refs)
        except DrayError as error:
            outcome = type(error).__name__
            self.judge(refs[0], error, seconds)
            for ref in refs:
                self.client.answered(ref, error)
        self._doing.remove(refs)
        self.world.plan.count(f"{name}: {outcome}")
        self.scheduler.note(f"{name}: {outcome}")

    def _read(self, refs: list[PayloadRef], seconds: float) -> None:
        (ref,) = refs
        consume = self.rng.random() < 0.8
        data = self.client.read_bytes(ref, timeout=seconds, consume=consume)
        kept = self.client.kept
        if kept is not None and kept.lane is SHM and kept.lost and ref.nbytes > self.client.inline_bytes:
            raise Violation(f"{self.world.ledger.name(ref)} was copied from a slot whose lease may have ended")
        self.got(ref, data.tobytes(), consume)

    def _read_many(self, refs: list[PayloadRef], seconds: float) -> None:
        consume = self.rng.random() < 0.7
        leave = self.rng.random() < 0.15
        results = self.client.read_many(
            refs, timeout=seconds, consume=consume, return_errors=True, **self._selected()
        )
        began = self.scheduler.now()
        left = list(refs)
        with contextlib.closing(results):
            for result, due in zip(results, refs, strict=False):
                ref = result.ref
                if ref is not due:
                    raise Violation("the results of a batch are not in the order of its references")
                left.remove(ref)
                if result.error is not None:
                    self.judge(ref, result.error, seconds, began)
                    continue
                self.got_arrays(ref, result.payload, consume)
                if leave:
                    break
                if self.rng.random() < 0.2:
                    self.scheduler.pause()
        self.world.give_back(self.reader, left)

    def _lease(self, refs: list[PayloadRef], seconds: float) -> None:
        (ref,) = refs
        lease = self.client.lease(ref, timeout=seconds, **self._selected())
        wire = self.client.kept
        self.unbound()
        began = self.scheduler.now()
        if self.rng.random() < 0.1:
            if self.rng.random() < 0.5:
                lease.close()
            self.world.plan.count("lease: not entered")
            return
        try:
            with lease as arrays:
                before = {name: array.tobytes() for name, array in arrays.items()}
                self.got_arrays(ref, arrays, consume=False)
                usual = (0.0, 0.01, 0.5, 3.0, 50.0, 130.0)
                self.scheduler.sleep(self.rng.choice((0.0, 0.0002, 0.002) if self.world.busy else usual))
                if {name: array.tobytes() for name, array in arrays.items()} != before:
                    if wire is None or wire.alive:
                        raise Violation(f"{self.world.ledger.name(ref)} changed while it was leased")
                    self.world.plan.count("lease: changed after its connection had ended")
                if self.rng.random() < 0.25:
                    self._pinned.append(arrays["body"])
                self.world.ledger.give_up(ref, self.reader)
                self.rebound(LEASE_END_SECONDS)
                if self.rng.random() < 0.2:
                    raise _Abandoned
            if wire is None or (self.scheduler.now() - began < 40 and wire.alive):
                self.consumed.append(ref)
        except (LeaseInUseError, _Abandoned) as error:
            self.world.plan.count(f"lease: {type(error).__name__.strip('_')}")

    def _selected(self) -> dict[str, Any]:
        """A selection of everything, in parts, or none."""
        match self.rng.randrange(4):
            case 0:
                return {"fields": ("token", "body")}
            case 1:
                return {"rows": {"body": [slice(0, 0), slice(0, None)]}}
            case _:
                return {}

    def _consume(self, refs: list[PayloadRef], seconds: float) -> None:
        by_producer = {ref.producer: ref for ref in refs}
        for ref in refs:
            self.world.ledger.give_up(ref, self.reader)
        if len(by_producer) > 1:
            refs = [ref for ref in refs if ref.producer == refs[0].producer]
        freed = self.client.consume(refs, timeout=seconds)
        assert 0 <= freed <= len(refs)

    def _stat(self, refs: list[PayloadRef], seconds: float) -> None:
        self.world.give_back(self.reader, refs)
        self.client.stat(refs[0], timeout=seconds)

    # --- what comes of it -------------------------------------------------------------------------------------

    def got(self, ref: PayloadRef, data: bytes, consume: bool, asked_at: float | None = None) -> None:
        """A payload was handed out, which was asked for at a time, by default with the call of this actor."""
        if asked_at is None:
            asked_at = self._began.get(self.scheduler.actor, -math.inf)
        self.scheduler.note(f"gets {self.world.ledger.name(ref)}{', consumed' if consume else ''}")
        self.world.ledger.deliver(ref, self.reader, data, asked_at)
        if consume:
            self.consumed.append(ref)

    def got_arrays(
        self, ref: PayloadRef, arrays: dict[str, Any], consume: bool, asked_at: float | None = None
    ) -> None:
        """The same, unpacked."""
        payload = self.world.ledger.find(ref)
        data = arrays["token"].tobytes() + arrays["body"].tobytes()
        if payload is not None and payload.image.endswith(data):
            data = payload.image
        self.got(ref, data, consume, asked_at)

    def judge(self, ref: PayloadRef, error: DrayError, seconds: float, began: float | None = None) -> None:
        """Check that an error can happen here, and that it is true."""
        ledger, plan = self.world.ledger, self.world.plan
        books, name = ledger.of(ref), ledger.name(ref)
        payload = ledger.find(ref)
        began = self._began[self.scheduler.actor] if began is None else began
        plan.count(f"error: {type(error).__name__}")
        if isinstance(error, StaleSlotError):
            if payload is not None and not books.lost and not self._gone(ref) and self._was_there(ref, began):
                raise Violation(f"{name} is reported as stale although it is there")
        elif isinstance(error, ProducerLostError):
            if not books.lost and self.world.listened(ref, began):
                raise Violation(f"the producer of {name} is reported as lost although it listens")
        elif isinstance(error, AuthenticationError | ReaderIdError):
            if self.welcome:
                raise Violation(f"{name}: {error}")
        elif isinstance(error, TransportError):
            if isinstance(error, ServerBusy) or error.endpoint is None:
                return  # without an endpoint: the producer has none on this client's lanes
            if not plan.kinds and not plan.stalls and seconds >= LONG_ENOUGH and self.welcome:
                raise Violation(f"{name} cannot be read, with nothing wrong: {type(error).__name__}: {error}")
            self.world.give_back(self.reader, [ref])
        elif not isinstance(error, BufferClosedError):
            made_up = payload is None or ref.nbytes != len(payload.image)
            if not isinstance(error, SlotError) or not made_up:
                raise Violation(f"{name}: {type(error).__name__}: {error}")

    def _was_there(self, ref: PayloadRef, began: float) -> bool:
        """The payload was committed when the program asked for it: references are made up, too."""
        payload = self.world.ledger.find(ref)
        return payload is not None and payload.since < began

    def _gone(self, ref: PayloadRef) -> bool:
        info = self.world.ledger.of(ref).ring.inspect()[ref.slot]
        payload = self.world.ledger.find(ref)
        return (
            info.sequence != ref.sequence
            or info.retired
            or bool(info.consumed_by >> self.reader & 1)
            or (payload is not None and self.reader in payload.acknowledged)
        )

    # --- deadlines --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def bounded(self, seconds: float) -> Iterator[None]:
        """The block ends within that time."""
        self.rebound(seconds)
        try:
            yield
        finally:
            self.unbound()

    @contextlib.contextmanager
    def unhurried(self, seconds: float) -> Iterator[None]:
        """The block, which has deadlines of its own, ends within that time unless the scheduler delays it."""
        actor = self.scheduler.actor
        assert actor is not None
        began, actor.late = self.scheduler.now(), 0.0
        yield
        if self.scheduler.now() - began - actor.late > seconds:
            raise Violation(f"{actor.name} took {self.scheduler.now() - began:.3f} s to close")

    def rebound(self, seconds: float) -> None:
        """This actor must finish within that time, from now on."""
        actor = self.scheduler.actor
        if actor is not None:
            actor.bound = self.scheduler.now() + seconds
            actor.late = 0.0

    def unbound(self) -> None:
        """This actor has no deadline."""
        actor = self.scheduler.actor
        if actor is not None:
            actor.bound = math.inf
