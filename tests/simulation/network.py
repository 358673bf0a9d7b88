"""The network of the simulated machine: listeners, connections, and a client's `Network` over them."""

from __future__ import annotations

import itertools
import os
import random
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias, cast

from dray.clock import Deadline
from dray.errors import BufferClosedError, TransportTimeout, Unreachable
from dray.payload import Selection
from dray.protocol.handshake import PROOF_BYTES, AttachRequest, ClientHandshake, ServerIdentity
from dray.ring import Segment
from dray.ring.attachment import Attachment
from dray.ring.consumer_events import Bell, Descriptor
from dray.ring.direct import PAGE_WORDS, kernel_digest
from dray.ring.stream_words import StreamWords
from dray.transport.lanes.base import (
    Endpoint,
    Lane,
    Listener,
    Network,
    Stream,
    Waiter,
    WantedAttachment,
    Worker,
)
from dray.transport.lanes.socket import SocketStream, TcpStream, UnixStream
from dray.transport.lanes.ucx import UcxStream
from dray.transport.lease_reaper import LeaseReaper
from dray.transport.polling import timed_out
from dray.transport.receive_buffers import Bytes, ReceiveBuffers
from simulation.faults import Fault, FaultPlan
from simulation.ledger import Ledger
from simulation.scheduler import Actor, Process, Scheduler, Signal
from simulation.shared import (
    Memory,
    ProcessMemory,
    SimulatedAttachment,
    SimulatedBell,
    SimulatedEvents,
    SimulatedProcessDescriptor,
    SimulatedSharedWords,
    SimulatedStreamBell,
)
from simulation.sockets import Pipe, SimulatedSocket
from simulation.tagged import SimulatedUcxEndpoint, SimulatedWorker, ucx_names
from simulation.threads import SimulatedMutex

_BACKLOG = 8
Described: TypeAlias = Memory | Process | SimulatedEvents | SimulatedStreamBell
Held: TypeAlias = "SimulatedSocket | SimulatedWorker | SimulatedListener | SimulatedEvents | SimulatedStreamBell"
_sockets: weakref.WeakKeyDictionary[Stream, SimulatedSocket] = weakref.WeakKeyDictionary()


class SimulatedListener(Listener):
    """Accepts the connections of one lane.

    Args:
        signal: notified when there is one.
        worker: the UCX worker that accepts, on that lane.

    Attributes:
        backlog: connections that were not accepted yet.
    """

    worker: SimulatedWorker | None

    def __init__(
        self,
        kernel: SimulatedKernel,
        number: int,
        endpoint: str,
        *,
        process: Process,
        signal: Signal,
        worker: SimulatedWorker | None,
    ) -> None:
        self._kernel = kernel
        self._number = number
        self.endpoint = endpoint
        self.process = process
        self.signal = signal
        self.worker = worker
        self.backlog: deque[SimulatedSocket | SimulatedUcxEndpoint] = deque()
        self.closed = False

    def fileno(self) -> int:
        return self._number if self.worker is None else -1

    @property
    def waiting(self) -> int:
        return len(self.backlog)

    def accept(self) -> Stream | None:
        if not self.backlog:
            return None
        found = self.backlog.popleft()
        if isinstance(found, SimulatedUcxEndpoint):
            assert self.worker is not None
            mine = SimulatedUcxEndpoint(self.worker)
            self._kernel.endpoints.append(mine)
            stream = UcxStream(self.worker, mine, accepted=True)
            mine.join(found)
            if found.closed:
                mine.fail(ucx_names().UCXConnectionResetError)
            return stream
        found.watched_by(self.signal)
        return socket_stream(found, accepted=True)

    def request(self, end: SimulatedUcxEndpoint) -> None:
        """A UCX connection has arrived."""
        if self.closed:
            end.fail(ucx_names().UCXRejectedError)
        else:
            self.backlog.append(end)

    def close(self) -> None:
        self.closed = True
        if self._kernel.listeners.get(self.endpoint) is self:
            del self._kernel.listeners[self.endpoint]
        while self.backlog:
            found = self.backlog.popleft()
            if isinstance(found, SimulatedUcxEndpoint):
                found.fail(ucx_names().UCXRejectedError)
            else:
                found.reset()
                found.close()


def socket_stream(sock: SimulatedSocket, accepted: bool = False) -> SocketStream:
    """A production stream over a simulated socket."""
    kind = TcpStream if sock.lane.in_band else UnixStream
    stream = kind(cast(Any, sock), sock.lane, accepted)
    _sockets[stream] = sock
    return stream


def socket_of(stream: Stream) -> SimulatedSocket | None:
    """The simulated socket under a stream, also after it was closed; None on the ucx lane."""
    return _sockets.get(stream)


class SimulatedKernel:
    """Everything that outlives the processes that use it.

    Attributes:
        watch: learns of direct leases.
        shared: what descriptors stand for, by the inodes behind them.
        registered: the memory of processes that barriers reach.
    """

    def __init__(self, scheduler: Scheduler, plan: FaultPlan, watch: Ledger | None = None) -> None:
        self.scheduler = scheduler
        self.plan = plan
        self.watch = watch or Ledger(scheduler)
        self.listeners: dict[str, SimulatedListener] = {}
        self.sockets: dict[
            int, SimulatedSocket | SimulatedWorker | SimulatedListener | SimulatedEvents | SimulatedStreamBell
        ] = {}
        self.shared: dict[int, Described] = {}
        self.registered: dict[ProcessMemory, None] = {}
        self._memories: dict[Process, ProcessMemory] = {}
        self.endpoints: list[SimulatedUcxEndpoint] = []
        self._numbers = itertools.count(1_000_000)

    def process(self, name: str) -> Process:
        """A new process; its sockets are closed when it ends."""
        process = self.scheduler.process(name)
        process.ends.append(lambda: self._close_all(process))
        return process

    def number(self, events: SimulatedEvents) -> int:
        """A descriptor that loops can wait for."""
        number = next(self._numbers)
        self.sockets[number] = events
        return number

    def describe(self, what: Described) -> Descriptor:
        """A descriptor that stands for something, also once it was sent to another process."""
        descriptor = Descriptor(os.memfd_create, "simulated descriptor")
        self.shared[os.fstat(descriptor.fileno()).st_ino] = what
        return descriptor

    def behind(self, descriptor: int) -> Described | None:
        """What a descriptor stands for."""
        return self.shared.get(os.fstat(descriptor).st_ino)

    def memory_of(self, process: Process, late: bool = False) -> ProcessMemory:
        """How a process accesses shared words."""
        if process not in self._memories:
            self._memories[process] = ProcessMemory(self, process, late=late)
        return self._memories[process]

    def listen(
        self, endpoint: str, process: Process, signal: Signal, worker: SimulatedWorker | None
    ) -> SimulatedListener:
        """Listen at a free address."""
        assert endpoint not in self.listeners
        number = next(self._numbers)
        listener = SimulatedListener(self, number, endpoint, process=process, signal=signal, worker=worker)
        self.listeners[endpoint] = self.sockets[number] = listener
        return listener

    def worker(self, process: Process) -> SimulatedWorker:
        """A new UCX worker."""
        number = next(self._numbers)
        worker = SimulatedWorker(self.scheduler, self.plan, number, process)
        self.sockets[number] = worker
        return worker

    def pair(self, lane: Lane, client: Process, server: Process) -> tuple[SimulatedSocket, SimulatedSocket]:
        """Two connected sockets."""
        up, down = (Pipe(self.scheduler, self.plan) for _ in range(2))
        ends = []
        for process, peer, incoming, outgoing in ((client, server, down, up), (server, client, up, down)):
            number = next(self._numbers)
            end = SimulatedSocket(
                self.scheduler, self.plan, number, lane,
                incoming=incoming, outgoing=outgoing, process=process, peer=peer,
            )  # fmt: skip
            self.sockets[number] = end
            ends.append(end)
        return ends[0], ends[1]

    def connect_socket(self, listener: SimulatedListener, lane: Lane, process: Process) -> SimulatedSocket:
        """The client's end of a new connection, which is not accepted yet."""
        mine, theirs = self.pair(lane, process, listener.process)
        listener.backlog.append(theirs)
        listener.signal.notify()
        if self.plan.strikes(Fault.DUPLICATE):
            self._duplicate(listener, lane, process)
        return mine

    def connect_ucx(self, address: str, worker: SimulatedWorker) -> SimulatedUcxEndpoint:
        """An endpoint towards an address; it fails later if no server listens there."""
        mine = SimulatedUcxEndpoint(worker)
        self.endpoints.append(mine)
        hangs = self.plan.strikes(Fault.CONNECT_HANGS)

        def arrive() -> None:
            listener = self.listeners.get(address)
            if listener is None:
                mine.fail(ucx_names().UCXNotConnectedError)
            elif not hangs:
                assert listener.worker is not None
                listener.worker.do(lambda: listener.request(mine))

        self.scheduler.at(self.scheduler.now() + self.plan.soon(), arrive)
        return mine

    def reset_one(self, rng: random.Random) -> bool:
        """Reset a random connection; False if there is none."""
        ends: list[SimulatedSocket | SimulatedUcxEndpoint] = [
            held for held in self.sockets.values() if isinstance(held, SimulatedSocket) and held.alive
        ]
        ends += [end for end in self.endpoints if end.alive and not end.closed and end.peer is not None]
        if not ends:
            return False
        rng.choice(ends).reset()
        return True

    def is_open(self, process: Process) -> list[str]:
        """What a process has not closed."""
        left = [f"socket {n}" for n, s in self.sockets.items() if s.process is process and not s.closed]
        return left + ["endpoint" for e in self.endpoints if e.worker.process is process and not e.closed]

    def _duplicate(self, listener: SimulatedListener, lane: Lane, process: Process) -> None:
        """A second connection, which sends a part of a handshake and is closed later."""
        rng = self.scheduler.rng
        second, theirs = self.pair(lane, process, listener.process)
        data = ClientHandshake(lane).hello() + bytes(PROOF_BYTES) * rng.randint(0, 1)
        second.write(data[: rng.choice((len(data), len(data), 40, 1))])
        listener.backlog.append(theirs)
        self.scheduler.at(self.scheduler.now() + rng.choice((0.0, 0.01, 5.0, 300.0)), second.close)

    def _close_all(self, process: Process) -> None:
        for listener in [listener for listener in self.listeners.values() if listener.process is process]:
            listener.close()
        for endpoint in self.endpoints:
            if endpoint.worker.process is process and not endpoint.closed:
                endpoint.vanish()
        for held in list(self.sockets.values()):
            if held.process is process:
                held.close()


class SimulatedQueue:
    """The queue of a client's lease reaper."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._signal = Signal(scheduler)
        self._items: deque[object] = deque()

    def put(self, item: object, /) -> None:
        self._items.append(item)
        self._signal.notify()

    def get(self) -> object:
        while not self._items:
            self._scheduler.wait((self._signal,), float("inf"))
        return self._items.popleft()


class SimulatedBuffers(ReceiveBuffers):
    """Memory for payloads; a thread that asks for some may be held up, between STATUS and a copy for example.

    Attributes:
        stalled: called with the seconds for which a thread was held up.
    """

    def __init__(self, kernel: SimulatedKernel) -> None:
        super().__init__()
        self._kernel = kernel
        self.stalled: Callable[[float], None] = lambda seconds: None

    def allocate(self, nbytes: int) -> Bytes:
        self._stall()
        return super().allocate(nbytes)

    def copy(self, payload: Bytes, selection: Selection | None = None) -> Bytes:
        if selection is not None:
            self._stall()
            return super().copy(payload, selection)
        copy = super().allocate(payload.nbytes)
        half = payload.nbytes // 2
        copy[:half] = payload[:half]
        self._stall()
        copy[half:] = payload[half:]
        return copy

    def _stall(self) -> None:
        seconds = self._kernel.plan.stall()
        if seconds:
            began = self._kernel.scheduler.now()
            self._kernel.scheduler.stall(seconds)
            self.stalled(self._kernel.scheduler.now() - began)


class Wire:
    """One connection of a client, as the simulated kernel knows it.

    Attributes:
        lane: its lane.
    """

    def __init__(
        self, lane: Lane, end: SimulatedSocket | SimulatedUcxEndpoint, waiter: SimulatedWaiter | None
    ) -> None:
        self.lane = lane
        self._end = end
        self._waiter = waiter

    @property
    def alive(self) -> bool:
        """No event has ended the connection so far."""
        return self._end.alive if isinstance(self._end, SimulatedSocket) else not self._end.closed

    @property
    def lost(self) -> bool:
        """The client was notified that the connection has ended; on UCX that is not known."""
        return isinstance(self._end, SimulatedSocket) and self._end.failed

    @property
    def failed(self) -> bool:
        """The client must not use the connection again."""
        return self.lost or (self._waiter is not None and self._waiter.failed)


class SimulatedNetwork(Network):
    """A client's `Network` over the simulated kernel.

    Attributes:
        opened: for each actor, the connection that it has opened last.
        attachments: those that exist.
        buffers: memory for copies.
    """

    def __init__(self, kernel: SimulatedKernel, process: Process) -> None:
        super().__init__()
        self.kernel = kernel
        self.process = process
        self.closing = Signal(kernel.scheduler)
        self.closed = False
        self.opened: dict[Actor | None, Wire] = {}
        self.attachments: weakref.WeakSet[SimulatedAttachment] = weakref.WeakSet()
        self.buffers = SimulatedBuffers(kernel)
        self._waiters: dict[Actor | None, SimulatedWaiter] = {}

    def fits(self, worker: Worker, address: Endpoint) -> bool:
        return address.lane.tagged

    def make_worker(self, address: Endpoint) -> Worker | None:
        return self.kernel.worker(self.process) if address.lane.tagged else None

    def connect(self, address: Endpoint, deadline: Deadline, worker: Worker | None) -> Stream:
        kernel, scheduler, endpoint = self.kernel, self.kernel.scheduler, str(address)
        plan = kernel.plan
        scheduler.note(f"connects to {endpoint}")
        if address.lane.tagged:
            assert isinstance(worker, SimulatedWorker)
            if plan.strikes(Fault.UNREACHABLE):
                raise Unreachable("simulated", endpoint=endpoint)
            end = kernel.connect_ucx(endpoint, worker)
            self._opened(address.lane, end)
            return UcxStream(worker, end, accepted=False)
        scheduler.pause()
        if plan.strikes(Fault.UNREACHABLE):
            raise Unreachable("simulated", endpoint=endpoint)
        listener = kernel.listeners.get(endpoint)
        if listener is None:
            raise Unreachable("simulated", endpoint=endpoint, refused=True)
        if plan.strikes(Fault.CONNECT_HANGS) or listener.waiting >= _BACKLOG:
            # The kernel waits for a Unix socket with a full backlog, and only its timeout ends that wait.
            ends_early = not address.lane.local
            scheduler.wait((self.closing,) if ends_early else (), deadline.at)
            if self.closed and ends_early:
                raise BufferClosedError("the client was closed while it waited")
            raise TransportTimeout("simulated", endpoint=endpoint, elapsed=deadline.elapsed)
        sock = kernel.connect_socket(listener, address.lane, self.process)
        self._opened(address.lane, sock)
        return socket_stream(sock)

    def waiter(self, lasting: bool = False) -> Waiter:
        waiter = SimulatedWaiter(self, lasting)
        if not lasting:
            self._waiters[self.kernel.scheduler.actor] = waiter
        return waiter

    def lock(self) -> Any:
        access = self.kernel.memory_of(self.process, late=True)
        return SimulatedMutex(self.kernel.scheduler, lambda seconds: access.delayed(seconds))

    def attach_request(self, reader: int) -> WantedAttachment | None:
        kernel = self.kernel
        if kernel.scheduler.rng.random() < 0.05:
            return None
        access = kernel.memory_of(self.process, late=True)
        access.step()
        kernel.registered[access] = None
        digest = kernel_digest() if kernel.scheduler.rng.random() < 0.95 else bytes(32)
        return WantedAttachment(AttachRequest(digest, reader), kernel.describe(self.process))

    def open_attachment(
        self, descriptors: list[int], identity: ServerIdentity, reader: int, *, newest: bool
    ) -> Attachment:
        kernel = self.kernel
        access = kernel.memory_of(self.process, late=True)
        found = [kernel.behind(number) for number in descriptors]
        control, board, page = (
            SimulatedSharedWords(each, access, []) for each in found[1:4] if isinstance(each, Memory)
        )
        events, owner = found[4:]
        assert isinstance(events, SimulatedEvents)
        assert isinstance(owner, Process)
        assert len(page.words) == identity.max_leases + PAGE_WORDS
        assert len(board.words) == identity.slots * identity.readers
        attachment = SimulatedAttachment(
            kernel,
            self.process,
            segment=Segment.attach(descriptors[0]),
            control=control,
            board=board,
            page=page,
            bell=SimulatedBell(events, access),
            owner=SimulatedProcessDescriptor(owner, access),
            reader=reader,
            newest=newest,
        )
        self.attachments.add(attachment)
        return attachment

    def open_stream_words(self, words: Descriptor, bell: Bell, slots: int) -> tuple[StreamWords, Bell]:
        memory, rung = self.kernel.behind(words.fileno()), self.kernel.behind(bell.fileno())
        assert isinstance(memory, Memory)
        assert isinstance(rung, SimulatedStreamBell)
        access = self.kernel.memory_of(self.process, late=True)
        bell.close()
        return StreamWords(SimulatedSharedWords(memory, access, []), slots), SimulatedBell(rung, access)

    def receive_buffers(self) -> ReceiveBuffers:
        return self.buffers

    def lease_reaper(self) -> LeaseReaper:
        def start(run: Callable[[], None]) -> Callable[[], None]:
            self.kernel.scheduler.spawn(self.process, "leases", run, idles=True)
            return lambda: None

        return LeaseReaper(SimulatedQueue(self.kernel.scheduler), start)

    def close(self) -> None:
        self.closed = True
        self.closing.notify()

    def _opened(self, lane: Lane, end: SimulatedSocket | SimulatedUcxEndpoint) -> None:
        actor = self.kernel.scheduler.actor
        self.opened[actor] = Wire(lane, end, self._waiters.get(actor))


class SimulatedWaiter:
    """Waits while other actors run.

    Attributes:
        failed: a wait ended with an exception; the connection must not be used again.
    """

    def __init__(self, network: SimulatedNetwork, lasting: bool) -> None:
        self._network = network
        self._lasting = lasting
        self.failed = False

    def wait(self, stream: Stream, deadline: Deadline, awaited: str, endpoint: str) -> None:
        if not stream.idle():
            if deadline.expired:
                raise timed_out(deadline, awaited, endpoint)
            return
        self.failed = True  # until the wait has ended without an exception
        kernel = self._network.kernel
        self._check()
        held = kernel.sockets[stream.fileno()]
        assert not isinstance(held, SimulatedListener | SimulatedEvents | SimulatedStreamBell)
        if isinstance(held, SimulatedWorker):
            ready = held.signalled
        else:
            ready = held.writable() if stream.wants_write else held.readable()
        if ready:
            kernel.scheduler.pause()
        elif not kernel.scheduler.wait((held.signal, self._network.closing), deadline.at):
            self._check()
            kernel.scheduler.note(f"timed out while waiting for {awaited}")
            raise timed_out(deadline, awaited, endpoint)
        self._check()
        self.failed = False

    def _check(self) -> None:
        if self._network.closed and not self._lasting:
            raise BufferClosedError("the client was closed while it waited")
