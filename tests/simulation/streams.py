"""A simulated run of streams: producers that put, and consumers that take with the production `Inbox`."""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, cast

from dray.clock import Deadline
from dray.errors import BufferClosedError, DrayError, ProtocolError, TransportError
from dray.protocol import PayloadRef
from dray.resources import Closing
from dray.streams.inbox import Inbox
from dray.streams.payload import Payload
from dray.streams.registry import Nudges, Peer, Registry
from dray.streams.source import Source
from dray.streams.surroundings import Surroundings
from dray.streams.wanted import Report, Wanted
from dray.transport import PayloadClient
from dray.transport.lanes import SHM, TCP
from dray.transport.lanes.base import Endpoint, Network, Stream, Worker
from simulation.faults import Fault
from simulation.network import SimulatedListener, SimulatedNetwork, socket_of
from simulation.scheduler import Actor, Interrupted, Process, Signal, Violation
from simulation.serving import RingSettings, SimulatedServer
from simulation.shared import SimulatedAttachment, SimulatedEvents, SimulatedStreamBell
from simulation.sockets import SimulatedSocket
from simulation.stream_serving import Meeting, SimulatedNudges
from simulation.tagged import SimulatedWorker
from simulation.world import LONGEST, Run

BREAKING = (Fault.RESET, Fault.HALF_CLOSE, Fault.TRUNCATION)
"""Faults after which a producer may regard a consumer as gone that works on."""

FAULTS = (
    *BREAKING, Fault.DELAY, Fault.DUPLICATE, Fault.UNREACHABLE, Fault.CONNECT_HANGS, Fault.LOOP_WEDGED,
    Fault.SERVER_STOPPED, Fault.SERVER_REPLACED, Fault.SERVER_KILLED, Fault.SERVER_CLOSED, Fault.CLIENT_STOPPED,
    Fault.CLIENT_KILLED, Fault.CLIENT_CLOSED, Fault.CLIENT_FORKED, Fault.INTERRUPT, Fault.CLOCK_JUMP,
    Fault.BARRIER_FAILS,
)  # fmt: skip
WORK_ITEM_SECONDS = 2.0
"""A barrier that has failed is made up for within a second."""

_LANES = ((SHM,), (SHM,), (SHM, TCP))


class StreamNetwork(SimulatedNetwork):
    """A network whose system calls let others see what the process has stored before."""

    def connect(self, address: Endpoint, deadline: Deadline, worker: Worker | None) -> Stream:
        stream = super().connect(address, deadline, worker)
        sock = socket_of(stream)
        if sock is not None:
            access = self.kernel.memory_of(self.process, late=True)
            sock.called = lambda: access.drain()
        return stream


class SimulatedEpoll:
    """The part of `select.epoll` that an `Inbox` uses, over simulated descriptors.

    Attributes:
        woken: notified to end a wait.
        nudges: those that are watched.
    """

    def __init__(self, network: SimulatedNetwork) -> None:
        self._kernel = network.kernel
        self._watched: set[int] = set()
        self.nudges: SimulatedNudges | None = None
        self.woken = Signal(network.kernel.scheduler)
        self._ends = self._woken = False

    def fileno(self) -> int:
        return -1

    def register(self, descriptor: int, events: int) -> None:
        self._watched.add(descriptor)

    def unregister(self, descriptor: int) -> None:
        self._watched.discard(descriptor)

    def poll(self, timeout: float | None = None) -> list[tuple[int, int]]:
        ready = self._ready()
        if ready or self._ends or timeout == 0:
            return ready
        scheduler = self._kernel.scheduler
        signals = [self.woken, *(each.signal for each in self._held())]
        scheduler.wait(signals, math.inf if timeout is None else scheduler.now() + timeout)
        return self._ready()

    def wake(self) -> None:
        """End the wait, and each later one: `Inbox.interrupt` writes to a descriptor that is not read."""
        self._ends = True
        self.woken.notify()

    def wake_once(self) -> None:
        """End the wait, or the next one."""
        self._woken = True
        self.woken.notify()

    def close(self) -> None:
        self._watched.clear()

    def _held(self) -> list[SimulatedSocket | SimulatedNudges]:
        found: list[SimulatedSocket | SimulatedNudges] = []
        for number in sorted(self._watched):
            held = self._kernel.sockets.get(number)
            if self.nudges is not None and number == self.nudges.number:
                found.append(self.nudges)
            elif held is not None and held.fileno() < 0:
                self._watched.discard(number)  # as the kernel does with a descriptor that is closed
            elif held is not None:
                assert not isinstance(
                    held, SimulatedListener | SimulatedEvents | SimulatedStreamBell | SimulatedWorker
                )
                found.append(held)
        return found

    def _ready(self) -> list[tuple[int, int]]:
        ready = [each.fileno() for each in self._held() if each.readable()]
        if self._woken:
            self._woken = False
            held = {each.fileno() for each in self._held()}
            ready += sorted(self._watched - held)
        return [(number, 1) for number in ready]


class _Registry(Closing):
    """The registry of one consumer."""

    folder = "the simulated folder"

    def __init__(self, meeting: Meeting) -> None:
        self._meeting = meeting

    def add(self, role: str, about: dict[str, Any]) -> str:
        return role

    def peers(self, role: str) -> list[Peer]:
        assert role == "p"
        return self._meeting.peers()

    def elsewhere(self) -> list[str]:
        return []

    def close(self) -> None:
        """The entry is gone."""


class SimulatedSurroundings(Surroundings):
    """The surroundings of one `Inbox`."""

    def __init__(self, consumer: StreamConsumer) -> None:
        self._consumer = consumer
        self.networks: list[StreamNetwork] = []
        self.waits = SimulatedEpoll(self._network())

    def _network(self) -> StreamNetwork:
        network = StreamNetwork(self._consumer.run.kernel, self._consumer.process)
        self.networks.append(network)
        return network

    def network(self, remote: bool) -> Network:
        if self.networks[0].closed:  # by an inbox that was not completed
            self.networks.insert(0, self._network())
            self.networks.pop()
        return self.networks[0]

    def epoll(self) -> Any:
        return self.waits

    def poller(self, epoll: Any) -> Any:
        return epoll.poll

    def registry(self, name: str, scope: str) -> Registry:
        return cast(Registry, _Registry(self._consumer.run.meeting))

    def nudges(self) -> Nudges:
        consumer = self._consumer
        made = SimulatedNudges(consumer.run.kernel, consumer.process, consumer.run.meeting)
        self.waits.nudges = made
        return cast(Nudges, made)

    def client(self, secret: bytes | None, reader: int) -> PayloadClient:
        clock = self._consumer.run.scheduler.clock
        return PayloadClient(secret=secret, reader=reader, direct=False, clock=clock, network=self._network())

    def pause(self, seconds: float) -> None:
        self._consumer.scheduler.sleep(seconds)

    def start(self, run: Callable[[], None]) -> Callable[[], None]:
        consumer, waits = self._consumer, self.waits

        def run_and_wake() -> None:
            run()
            waits.wake_once()

        reading = consumer.scheduler.spawn(consumer.process, "read", run_and_wake, idles=True)

        def join() -> None:
            if reading.alive:
                consumer.scheduler.wait((reading.ended,), consumer.scheduler.now() + LONGEST)
            if reading.alive:
                raise Violation(f"a read of {consumer.process.name} does not end in {LONGEST} s")

        return join


class StreamConsumer:
    """A process with one consumer of the stream, in one thread.

    Attributes:
        closed: its program has ended, or is about to.
        reader: the reader id of its group.
        waits: it waits for a payload.
    """

    def __init__(self, run: StreamRun, name: str, reader: int, wanted: Wanted) -> None:
        self.run = run
        self.reader = reader
        self.scheduler = run.scheduler
        self.rng = run.rng
        self.process: Process = run.kernel.process(name)
        self.closed = False
        self.busy = 0
        self.addresses = wanted.endpoints
        self._wanted = wanted
        self._inbox: Inbox | None = None
        self._surroundings = SimulatedSurroundings(self)
        self._actor: Actor | None = None
        self._interruptible = self.waits = False
        self._current: PayloadRef | None = None
        self._due: Payload | None = None  # it is to be acknowledged
        self._pinned: list[Any] = []
        self._begun: dict[bytes, float] = {}  # since when a payload of that producer is being read
        self._last: dict[bytes, tuple[Source | None, int]] = {}  # of each producer: what came first-hand last

    def spawn(self) -> None:
        """Start the program."""

        def run() -> None:
            try:
                self._run()
            except Exception:
                if not self.scheduler.ending:  # else it is unwound, and may be without its sockets
                    raise

        self._actor = self.scheduler.spawn(self.process, "loop", run, idles=True)

    # --- for the run and its troubles -------------------------------------------------------------------------

    @property
    def attachments(self) -> list[SimulatedAttachment]:
        """Those of the process."""
        return [each for network in self._surroundings.networks for each in network.attachments]

    def may_interrupt(self, actor: Actor) -> bool:
        """A signal handler may raise in what a thread does now."""
        return self._interruptible and actor is self._actor and not self.closed

    def killed(self) -> None:
        """The process dies now: what it was about to consume may be consumed."""
        if self._current is not None:
            self.run.ledger.give_up(self._current, self.reader)

    def close(self) -> None:
        """End the program in order, from another thread."""
        self.closed = True
        if self._inbox is not None:
            self._inbox.interrupt()
            self._surroundings.waits.wake()
        assert self._actor is not None
        if self._actor.alive:
            self.scheduler.wait((self._actor.ended,), self.scheduler.now() + LONGEST)
        if self._actor.alive:
            raise Violation(f"{self.process.name} does not end in {LONGEST} s")

    def release_arrays(self) -> None:
        """Drop the arrays that outlived their payloads."""
        self._pinned.clear()

    def ended_in_order(self) -> None:
        """There is nothing that is known only now."""

    @property
    def alive(self) -> bool:
        """Its program runs."""
        return not self.process.dead and not self.closed

    @property
    def stopped(self) -> bool:
        """Its process stands still."""
        return any(actor.stopped for actor in self.process.actors)

    def has_words(self, producer: bytes) -> bool:
        """It shares words with a producer."""
        source = self._inbox.source_of(producer) if self._inbox is not None else None
        return source is not None and source.subscription.direct

    def check_order(self, ref: PayloadRef) -> None:
        """A payload comes for the first time: earlier ones of its producer have come over the same connection."""
        source = self._inbox.source_of(ref.producer) if self._inbox is not None else None
        before, sequence = self._last.setdefault(ref.producer, (source, ref.sequence))
        if source is None or source is not before:
            self._last[ref.producer] = None, ref.sequence  # what an earlier connection gave may come later
        elif ref.sequence < sequence:
            raise Violation(f"{self.process.name} gets {self.run.ledger.name(ref)} after sequence {sequence}")
        else:
            self._last[ref.producer] = source, ref.sequence

    def reaches(self, server: SimulatedServer) -> bool:
        """The consumer is alive and finds the producer."""
        if not self.alive:
            return False
        found = self.addresses or tuple(each for each in server.endpoints if each.startswith("unix:"))
        return any(each in server.endpoints for each in found)

    # --- the program ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self.closed:
            try:
                self._interruptible = True
                self._acknowledge()
                payload, asked_at = self._next()
            except Interrupted:
                self._outcome("Interrupted")
                if self.rng.random() < 0.3:
                    self._end()
                continue
            except BufferClosedError:
                if not self.closed:
                    raise
                break
            except DrayError as error:
                self._judge(error)
                self._interruptible = False
                self.scheduler.sleep(0.001)  # a program that polls does something else in between
                continue
            finally:
                self._interruptible = False
            if payload is None:
                self._outcome("finished")
                self.scheduler.sleep(1.0)
            else:
                self._work(payload, asked_at)
                del payload
        self._end()

    def _next(self) -> tuple[Payload | None, float]:
        clock = self.scheduler.clock
        if self._inbox is None:
            self._inbox = Inbox(self._wanted, clock, self._surroundings)
        inbox, report = self._inbox, Report(clock)
        deadline = Deadline.after(self.rng.choice((None, None, 5.0, 0.3, 0.0)), clock)
        while not self.closed:
            asked_at = self.scheduler.now()
            payload = inbox.pop(deadline)
            if payload is not None:  # it may have been read since an earlier call
                asked_at = self._begun.pop(payload.id.producer, asked_at)
            self._begun = {each.producer: self._begun.get(each.producer, asked_at) for each in inbox.late}
            if len(inbox.queue) > self._wanted.prefetch:
                raise Violation(f"{self.process.name} holds {len(inbox.queue)} payloads that are not begun")
            if payload is not None or inbox.finished:
                return payload, asked_at
            self.waits = True
            try:
                inbox.wait(deadline, report)
            finally:
                self.waits = False
        return None, 0.0

    def _work(self, payload: Payload, asked_at: float) -> None:
        run, rng, reader = self.run, self.rng, self.reader
        named = payload.id
        ref = PayloadRef(named.producer, named.slot, named.sequence, named.nbytes, ("tcp:127.0.0.1:1",))
        self._current = ref
        name = run.ledger.name(ref)
        self.scheduler.note(f"gets {name}, delivery {payload.deliveries}")
        self._outcome(f"{'in place' if payload.in_place else 'copied'}, redelivered: {payload.redelivered}")
        written = run.ledger.find(ref)
        before = payload["token"].tobytes() + payload["body"].tobytes()
        image = written.image if written is not None and written.image.endswith(before) else before
        run.ledger.deliver(ref, reader, image, asked_at)
        run.record_hand_out(self, ref, payload.deliveries)
        if payload.deliveries == 1 and sum(each.reader == reader for each in run.consumers) == 1:
            self.check_order(ref)
        self.scheduler.sleep(
            rng.choice((0.0, 0.0, 0.0005, 0.01, 0.5, 5.0, 40.0) if rng.random() < 0.6 else (0.0,))
        )
        if payload["token"].tobytes() + payload["body"].tobytes() != before:
            raise Violation(f"{name} changed while a program had it")
        run.check_held(self, ref)
        if rng.random() < 0.1:
            self._pinned.append(payload["body"])
        elif self._pinned:
            self._pinned.pop()
        run.leave(self, ref)
        choice = rng.random()
        if choice < 0.85:
            self._due = payload
        elif choice < 0.95:
            payload.release()
            self.scheduler.note(f"releases {name}")
            self._current = None
        else:
            self._end()

    def _acknowledge(self) -> None:
        """Acknowledge the payload before, as `Consumer` does when the next is asked for, until that succeeds."""
        payload, ref = self._due, self._current
        if payload is not None and ref is not None:
            self.run.ledger.give_up(ref, self.reader)
            payload.end(ring=False)
            self.run.consumed(ref, self.reader)
            self.scheduler.note(f"acknowledges {self.run.ledger.name(ref)}")
        self._due = self._current = None

    def _end(self) -> None:
        """Close the inbox; the next payload is asked for with another one."""
        self._interruptible = False
        self._due = self._current = None
        inbox, self._inbox = self._inbox, None
        if inbox is not None:
            inbox.close()
        if not self.closed:
            self._surroundings = SimulatedSurroundings(self)

    def _judge(self, error: DrayError) -> None:
        self._outcome(type(error).__name__)
        if isinstance(error, ProtocolError) or not isinstance(error, TransportError | TimeoutError):
            raise Violation(f"{self.process.name}: {type(error).__name__}: {error}")

    def _outcome(self, what: str) -> None:
        self.run.plan.count(f"stream: {what}")


class StreamRun(Run):
    """A world of streams made from a seed.

    Attributes:
        meeting: where producers and consumers find each other.
    """

    faults: Sequence[Fault] = FAULTS

    def __init__(self, seed: int, seen: Counter[str], traced: bool = False) -> None:
        self.meeting = Meeting()
        self._holders: dict[tuple[bytes, int, int], StreamConsumer] = {}
        self._stuck: dict[tuple[str, int], float] = {}
        self._had: dict[tuple[bytes, int, int], set[int]] = {}  # the deliveries of each payload
        self._all_words = True  # so far, every payload was handed out with shared words
        self._writers: list[Actor] = []
        super().__init__(seed, seen, traced)
        self._breaks = bool(self.plan.kinds.intersection(BREAKING))

    def go(self) -> None:
        try:
            for server in self.servers:
                self.start_writer(server)
            for consumer in self.consumers:
                consumer.spawn()
            self.troubles.start()
            self.scheduler.run(self.scheduler.now() + self.rng.choice((2.0, 50.0, 200.0)), self._check_work_item)
            self._calm()
        finally:
            self._end()

    def _calm(self) -> None:
        scheduler = self.scheduler
        scheduler.note("calm")
        self.plan.calm = True
        self.troubles.end()
        if not self._until(lambda: not any(actor.alive for actor in self._writers)):
            raise Violation("a producer does not end its last put")
        if not self._until(lambda: not self._waiting()):
            raise Violation(f"no consumer gets {self._waiting()[0]}")
        closing = [consumer for consumer in self.consumers if not consumer.process.dead]
        actors = [scheduler.spawn(each.process, "close", each.close, idles=True) for each in closing]
        if not self._until(lambda: all(actor.greenlet.dead for actor in actors)):
            raise Violation("a consumer's close does not end")
        for consumer in self.consumers:
            consumer.release_arrays()
        gc.collect()
        self._check_quiet()
        self._drain()

    def _check_work_item(self) -> bool:
        """No payload waits for long while a consumer waits that has credit; called before time jumps."""
        now, stuck = self.scheduler.now(), {}
        waiting = {each.process.pid for each in self.consumers if each.waits and not each.stopped}
        for server in self.servers:
            stream = server.stream
            idle = stream is not None and not (server.process.dead or server.closing or server.ring.changing)
            if not idle or any(actor.stopped for actor in server.process.actors):
                continue
            assert stream is not None
            for group in stream.delivery.groups:
                # While its program works, a consumer raises its credit without the bell.
                asking = (each for each in group.recipients if each.stream_words is None or each.pid in waiting)
                if group.waiting and any(each.allowance > 0 for each in asking):
                    key = server.books.name, group.reader
                    stuck[key] = self._stuck.get(key, now)
                    if now - stuck[key] > WORK_ITEM_SECONDS and Fault.CLOCK_JUMP not in self.plan.kinds:
                        sequence = group.waiting[0].sequence
                        raise Violation(f"{server.name}: sequence {sequence} waits although a consumer has credit")
        self._stuck = stuck
        return False

    def _waiting(self) -> list[str]:
        """Payloads that a consumer could have and that are not consumed."""
        found = []
        for server in self.servers:
            if server.process.dead or server.closing or server.ring.closed:
                continue
            for each in server.ring.ready(leased=True):
                for reader in range(server.settings.readers):
                    wanted = any(c.reader == reader and c.reaches(server) for c in self.consumers)
                    if wanted and not each.consumed_by >> reader & 1:
                        found.append(f"{server.name} sequence {each.sequence} for group {reader}")
        return found

    # --- what consumers report --------------------------------------------------------------------------------

    def record_hand_out(self, consumer: StreamConsumer, ref: PayloadRef, deliveries: int) -> None:
        """A program has got a payload: no other one has it, and each delivery is counted.

        Without shared words, a payload that is late can be begun just before its producer takes it back.
        """
        key = ref.producer, ref.sequence, consumer.reader
        words = consumer.has_words(ref.producer)
        self._all_words = self._all_words and words
        before = self._had.setdefault(key, set())
        late = deliveries in before if self._breaks else any(deliveries <= each for each in before)
        if self._all_words and late:
            raise Violation(f"{self.ledger.name(ref)} is not marked as redelivered")
        before.add(deliveries)
        holder = self._holders.get(key)
        if self._all_words and not self._breaks and holder is not None and holder.alive:
            both = f"{holder.process.name} and {consumer.process.name}"
            raise Violation(f"{both} have {self.ledger.name(ref)} at one time")
        self._holders[key] = consumer

    def check_held(self, consumer: StreamConsumer, ref: PayloadRef) -> None:
        """A program has a payload, and has not acknowledged it: it is not consumed."""
        payload, key = self.ledger.find(ref), (ref.producer, ref.sequence, consumer.reader)
        alone = self._holders.get(key) is consumer and self._all_words and not self._breaks
        if payload is not None and alone and consumer.reader in payload.acknowledged:
            raise Violation(f"{self.ledger.name(ref)} is consumed while a program has it")

    def leave(self, consumer: StreamConsumer, ref: PayloadRef) -> None:
        """A program is about to acknowledge a payload, or to give it back."""
        key = ref.producer, ref.sequence, consumer.reader
        if self._holders.get(key) is consumer:
            del self._holders[key]

    def consumed(self, ref: PayloadRef, reader: int) -> None:
        """A program has acknowledged a payload."""
        payload = self.ledger.find(ref)
        if payload is not None and reader not in payload.acknowledged:  # else others see it with its store
            payload.consumed_since.setdefault(reader, self.scheduler.now())

    # --- who there is -----------------------------------------------------------------------------------------

    def _make_server(self, index: int, secret: bytes | None) -> SimulatedServer:
        rng = self.rng
        settings = RingSettings(
            slots=rng.randint(2, 6),
            slot_bytes=2048,
            on_full="overwrite" if rng.random() < 0.2 else "block",
            readers=self.readers,
            retain="unread",
            max_leases=rng.choice((2, 3, 8, 8)),
            lanes=rng.choice(_LANES),
            loops=1,
            secret=secret,
            checksum=rng.random() < 0.5,
            direct=rng.random() < 0.85,
            waits=True,
            groups=self.readers,
            max_deliveries=rng.choice((None, None, None, 3)),
        )
        return SimulatedServer(self.kernel, self.ledger, f"server{index}", settings)

    def _make_consumer(self, index: int, secret: bytes | None) -> StreamConsumer:
        rng = self.rng
        tcp = [each for server in self.servers for each in server.endpoints if each.startswith("tcp:")]
        where: dict[str, Any] = {"name": "s", "scope": "simulation"}
        if tcp and rng.random() < 0.3:
            where = {"endpoints": tuple(tcp)}
        reader = index % self.readers
        prefetch, direct = rng.choice((1, 2, 2, 4)), rng.random() < 0.9
        wanted = Wanted(group=f"g{reader}", prefetch=prefetch, secret=secret, direct=direct, **where)
        return StreamConsumer(self, f"client{index}", reader, wanted)

    def start_writer(self, server: SimulatedServer) -> None:
        rng, scheduler = self.rng, self.scheduler
        stream = server.stream
        assert stream is not None
        stream.register(self.meeting)
        server.published = stream.put
        pauses = (0.0, 0.0, 0.0001, 0.0005) if self.busy else (0.0, 0.0005, 0.02, 2.0, 30.0)

        def run() -> None:
            for _ in range(rng.randint(3, 14) * (3 if self.busy else 1)):
                if self.plan.calm:
                    break
                server.write(self.arrays(server), rng.choice((0.5, 5.0, 60.0)), lambda: rng.random() > 0.08)
                scheduler.sleep(rng.choice(pauses))

        self._writers.append(scheduler.spawn(server.process, "writer", run, idles=True))
