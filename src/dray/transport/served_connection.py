"""One connection of a server: its session, its stream, its leases and its counters.

`ServedConnection` does with the ring what the events of the session ask for. Each READ that it grants has one
lease, which ends once: by the reader's acknowledgement, or in `close`. It never waits.
"""

from __future__ import annotations

import contextlib
import enum
import math
from collections import deque
from collections.abc import Callable, Sequence

from dray.errors import (
    BufferClosedError,
    OutOfResources,
    PayloadError,
    SelectionError,
    SlotError,
    StaleSlotError,
    TransportError,
)
from dray.exclusive import Exclusive
from dray.protocol.frames import Flag, Kind, Outgoing, Status
from dray.protocol.handshake import AttachRequest, Verdict, WelcomeFlag
from dray.protocol.server_session import (
    MAX_INLINE_BYTES,
    NO_BYTES,
    Acknowledgement,
    Established,
    Refused,
    ServerSession,
    Violation,
)
from dray.protocol.streams import Begun, Credit, Returned
from dray.ring import Lease
from dray.ring.consumer_events import Descriptor
from dray.ring.direct import Attached, kernel_digest
from dray.ring.shared_words import SharedWords
from dray.transport.lanes.base import Stream
from dray.transport.served_parts import PreparedPart
from dray.transport.served_trace import ServedTrace
from dray.transport.server_statistics import COUNTED, LeaseInfo
from dray.transport.service import Service, Subscriber

BATCH_BYTES = 8 << 20
"""Payloads that are passed to the stream together, to be sent one behind the other without a pause."""

COPY_WEIGHT = 32
"""An inline payload counts this many times its size in a batch: until it is sent, it is in memory twice."""

REQUEST_WEIGHT = BATCH_BYTES >> 10
"""The minimum that an answer counts in a batch. STAT and a READ with a body count as a whole batch."""

LINGER_SECONDS = 1.0
"""The client of a connection that is `lingering` must close it within this time."""

PROGRESS_CHECKS = 8
"""How often the progress of a reader with a lease is checked within the time limit of the lease."""

_READ = int(Kind.READ)
_CONSUME = int(Kind.CONSUME)
_SUBSCRIBE = int(Kind.SUBSCRIBE)
_DESCRIBE = int(Kind.DESCRIBE)


class _Outcome(enum.Enum):
    """Of an attempt to send a frame at once."""

    SENT = enum.auto()
    LEFT_TO_LOOP = enum.auto()
    NOT_SENT = enum.auto()


class ServedConnection:
    """A connection of a server.

    Args:
        stream: transports its messages and payloads.
        endpoint: the address at which it was accepted.
        service: what is served.
        pushed: called in any thread when the connection has something to send: its loop must serve it.

    Attributes:
        stream, session, endpoint: its parts.
        counts: what has happened on it, by the names in `ServerCounters`.
        active: time of its last message, or of the last payload that has left.
        announced: the answer that completes the handshake was passed to the stream.
        ending: the consumer was sent its last frame, and is to close the connection.
        lingering: the last answer was passed to the stream, and the client is to close the connection.
        unsent: answers wait for room in the connection.
        watched: the value of `unsent` that the poller knows; None before the connection is registered.
        subscriber: the client, once it has subscribed to the stream.
        direct: the client may lease directly.
    """

    def __init__(
        self,
        stream: Stream,
        endpoint: str,
        service: Service,
        pushed: Callable[[ServedConnection], None] = lambda _: None,
    ) -> None:
        self.stream = stream
        self.endpoint = endpoint
        self.session = ServerSession(
            stream.lane, service.identity, secret=service.secret, newest=service.newest, direct=service.direct
        )
        self.counts = dict.fromkeys(COUNTED, 0)
        self.active = self._progressed = service.clock.now()
        self.announced = False
        self.lingering = False
        self.unsent = False
        self.watched: bool | None = None
        self._service = service
        self._ring = service.ring
        self._checksum = service.checksum if stream.lane.in_band else None
        self._trace: ServedTrace | None = None
        if service.trace is not None:
            self._trace = ServedTrace(service.trace, service.clock, endpoint, stream.lane, number=id(self))
        self._leases: dict[int, Lease] = {}
        self._preparing: PreparedPart | None = None  # the answer to the oldest request
        self._max_leases = service.identity.max_leases
        self._attached: Attached | None = None
        self.direct = False
        self._subscribing = False
        self._words: SharedWords | None = None
        self._progress: object = None
        self.subscriber: Subscriber | None = None
        self._pushed = pushed
        self._pushes: deque[bytes] = deque()
        self._carrying = False  # `answer` has taken pushes that were not passed to the stream yet
        self._sending = Exclusive()  # once there is a subscriber, other threads send as well
        self._ended = self.ending = False

    # --- messages and answers ---------------------------------------------------------------------------------

    def receive(self, messages: bytes | bytearray | memoryview, descriptors: list[int] | None = None) -> None:
        """Act on messages of the client, and take the descriptors that came with them.

        Raises:
            ProtocolError: the client has broken the protocol; the connection must be discarded.
        """
        session, counts = self.session, self.counts
        received = [Descriptor(descriptors.pop, 0) for _ in range(len(descriptors))] if descriptors else ()
        known = len(session.requests)
        events = session.receive(messages)
        self.active = self._service.clock.now()
        if self._trace is not None:
            self._trace.received(events, list(session.requests)[known:])
        consumed: list[tuple[int, int, int]] = []
        try:
            for event in events:
                if isinstance(event, Acknowledgement):
                    of, request, payload, done = event
                    if of == "late":
                        counts["late_acks"] += 1
                        if done and self._is_known(payload):
                            consumed.append(payload)
                    elif done:
                        counts["acks_consumed"] += 1
                        if of == "copy":
                            consumed.append(payload)
                        else:
                            self._leases.pop(request).acknowledge()
                    else:
                        counts["acks_returned"] += 1
                        if of == "lease":
                            self._leases.pop(request).release()
                elif isinstance(event, Credit | Begun | Returned):
                    self._handle_consumer(event)
                elif isinstance(event, Established):
                    if event.attach is not None:
                        self._attach(event.attach, received)
                elif isinstance(event, Violation):
                    raise event.error
                elif isinstance(event, Refused):
                    counts[_REFUSED.get(event.verdict, "malformed")] += 1
        finally:
            if consumed:
                with contextlib.suppress(BufferClosedError):
                    self._ring.consume_many(consumed)

    def answer(self) -> list[Outgoing]:
        """What to send next: the answers to a batch of requests. `flushed` must follow before the next batch.

        Raises:
            ProtocolError: the client has broken the protocol; the connection must be discarded.
        """
        session = self.session
        if session.sending:
            return []
        if self._pushes:
            self._carrying = True
            while self._pushes:
                session.push(self._pushes.popleft())
        requests = session.requests
        if not requests:
            return session.pop_outgoing()
        waiting = None if self._trace is None else list(requests)
        weight = 0
        while requests and weight < BATCH_BYTES:
            request = requests[0]
            kind, _, _, flags, _, _, _, _, _, _, _, _ = request
            try:
                if kind != _READ:
                    if kind == _CONSUME:
                        weight += self._consume(request)
                    elif kind == _SUBSCRIBE:
                        weight += self._subscribe(request)
                    elif kind == _DESCRIBE and self._service.stream is None:
                        weight += self._fail(_NO_STREAM)
                    elif kind == _DESCRIBE:
                        assert self._service.stream is not None
                        session.answer(self._service.stream.describe())
                        weight += BATCH_BYTES
                    else:
                        session.answer(self._service.describe())
                        weight += BATCH_BYTES
                elif not flags:
                    weight += self._grant(request)
                elif flags & Flag.INLINE:
                    weight += self._copy()
                else:
                    weight += self._grant_part(request)
            except BufferClosedError as error:
                session.fail_all(str(error))
        outgoing = session.pop_outgoing()
        if waiting is not None and self._trace is not None:
            self._trace.answered(waiting[: len(waiting) - len(requests)], outgoing)
        return outgoing

    def flushed(self) -> None:
        """All that `answer` has returned has left."""
        self.session.flushed()
        if self._attached is not None:
            self._attached.page.close_descriptor()
            self._attached = None
        if self._subscribing:
            assert self.subscriber is not None
            if self._words is not None:
                self._words.close_descriptor()
                self._words = None
            self._subscribing = False
            self.subscriber.start()
        if self._trace is not None:
            self._trace.flushed()

    def close(self) -> None:
        """Release every lease. The stream must be `drained`: it must read no slot any more. Twice is fine."""
        if self.session.unproven and not self.session.closing:
            self.counts["auth_failures"] += 1
        self.session.close()
        self._preparing = None
        self.end_subscription()
        leases, self._leases = self._leases, {}
        for lease in leases.values():
            lease.release()
            if self._trace is not None:
                self._trace.released((lease.slot, lease.sequence, lease.reader))

    # --- direct leases ----------------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        """Direct leases were granted, and the answer with the descriptors has not left."""
        return self._attached is not None

    def shared_descriptors(self) -> list[int]:
        """What goes with WELCOME on a lane with shared memory.

        Raises:
            BufferClosedError: the ring is closed.
        """
        ring = self._ring
        attached = [] if self._attached is None else ring.direct().descriptors(self._attached)
        return [ring.segment.fileno(), *attached]

    def _attach(self, request: AttachRequest, received: Sequence[Descriptor]) -> None:
        """Grant direct leases, if the client is a process under the same kernel and the ring can."""
        flags = WelcomeFlag.NONE
        if len(received) == 1 and request.kernel == kernel_digest():
            (process,) = received
            pid = self._ring.machine.pid_behind(process.fileno())
            if pid is not None and pid in (0, self.stream.peer_pid):
                with contextlib.suppress(OutOfResources, BufferClosedError):
                    self._attached = self._ring.attach(
                        process, pid=self.stream.peer_pid or 0, reader=request.reader, leases=self._max_leases
                    )
        if self._attached is not None:
            self.direct = True
            flags = WelcomeFlag.ATTACHED
            if self._ring.retain == "newest":
                flags |= WelcomeFlag.NEWEST
        self.session.welcome(flags)

    # --- the stream -------------------------------------------------------------------------------------------

    def push(self, frame: bytes) -> None:
        """Send a frame to a consumer that has subscribed, from any thread: on the shm lane at once.

        If a signal handler raises meanwhile, the connection ends: the frame may have left or not.
        """
        try:
            if self.stream.lane.local:
                outcome = self._sending.try_call(lambda: self._send_at_once(frame), _Outcome.NOT_SENT)
            else:
                outcome = _Outcome.NOT_SENT
            if outcome is _Outcome.NOT_SENT:
                self._pushes.append(frame)
            if outcome is not _Outcome.SENT:
                self._pushed(self)
        except BaseException:
            self.stream.abort()
            raise

    def _send_at_once(self, frame: bytes) -> _Outcome:
        # In this order: `answer` sets the last before it empties the one before.
        if self._ended or self.unsent or self._pushes or self._carrying:
            return _Outcome.NOT_SENT
        try:
            self.unsent = not self.stream.send([frame])
        except TransportError:
            return _Outcome.LEFT_TO_LOOP  # which finds out why
        return _Outcome.LEFT_TO_LOOP if self.unsent else _Outcome.SENT

    def push_last(self, frame: bytes) -> None:
        """`push` the frame after which the consumer closes the connection, as it is to do within `drain_timeout`.

        If the server closed first, the frame could be lost, unless the lane is local.
        """
        self.ending = not self.stream.lane.local
        self.push(frame)

    def send(self, items: Sequence[Outgoing], shared: Sequence[int] = ()) -> bool:
        """As `Stream.send`, while other threads may `push`."""
        if self.subscriber is None:
            return self.stream.send(items, shared)
        with self._sending.call():
            self._carrying = False
            return self.stream.send(items, self._stream_descriptors())

    def _stream_descriptors(self) -> list[int]:
        """What goes with the answer to SUBSCRIBE."""
        if self._words is None:
            return []
        assert self._service.stream is not None
        return [self._words.fileno(), self._service.stream.bell.fileno()]

    def flush(self) -> bool:
        """As `Stream.flush`, while other threads may `push`."""
        if self.subscriber is None:
            return self.stream.flush()
        with self._sending.call():
            return self.stream.flush()

    def end_subscription(self) -> None:
        """Give the consumer nothing any more. Before the stream is closed; twice is fine."""
        if self.subscriber is not None and not self._ended:
            with self._sending.call():
                self._ended = True
            self.subscriber.end()

    def _handle_consumer(self, event: Credit | Begun | Returned) -> None:
        assert self.subscriber is not None
        if isinstance(event, Credit):
            self.subscriber.set_credit(event.total)
        elif isinstance(event, Begun):
            self.subscriber.begin(*event)
        else:
            self.subscriber.take_back(event)

    def _subscribe(self, request: tuple[int, ...]) -> int:
        stream = self._service.stream
        if stream is None:
            return self._fail(_NO_STREAM)
        reader = request[2]
        if reader >= self._service.identity.readers:
            return self._refuse(Status.DENIED)
        self.subscriber = subscriber = stream.subscribe(self, reader)
        self._words, self._subscribing = subscriber.words, True
        self.session.subscribe(self._words is not None)
        return REQUEST_WEIGHT

    # --- state ------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """An exchange is in flight, or the connection holds a lease."""
        return self.session.busy or self.ending or bool(self._leases or self._pushes or self.unsent)

    @property
    def preparing(self) -> bool:
        """The next answer is being prepared; `answer` continues with that."""
        return self._preparing is not None

    @property
    def leased(self) -> int:
        """Leases that the connection holds."""
        return len(self._leases)

    def leases(self, now: float) -> list[LeaseInfo]:
        """The leases that the connection holds."""
        pid, age = self.stream.peer_pid, now - self.silent_since
        leases = list(self._leases.values())
        return [LeaseInfo(pid, lease.slot, lease.sequence, lease.reader, age) for lease in leases]

    @property
    def silent_since(self) -> float:
        """When the connection was last seen to make progress."""
        return max(self.active, self._progressed)

    @property
    def limit(self) -> float:
        """Seconds of silence after which the connection is closed."""
        if self.lingering:
            return LINGER_SECONDS
        if not self.session.established or self.subscriber is not None:
            return math.inf  # its proof has a deadline; a consumer may be silent
        if not self._leases:
            return self._service.idle_timeout
        return math.inf if self.stream.lane.local else self._service.lease_timeout

    @property
    def next_check(self) -> float:
        """Seconds until `check_progress` is due; ``inf`` if nothing depends on the progress."""
        timed = self._leases and not self.stream.lane.local and not self.lingering
        return self._service.lease_timeout / PROGRESS_CHECKS if timed else math.inf

    def check_progress(self, now: float) -> None:
        """Note whether bytes have travelled since the last check."""
        progress = self.stream.progress()
        if progress is None or progress == self._progress:
            return
        self._progress = progress
        self._progressed = now
        if (slowest := self.stream.lane.min_bytes_per_second) is not None:
            sending = sum(self._leases[request].nbytes for request in self.session.sending)
            self._progressed = min(now, self.active + sending / slowest)

    # --- answers to the oldest request; each returns what it counts in a batch ----------------------------------

    def _lease(self, request: tuple[int, ...]) -> Lease | None:
        """The lease that a READ asks for; None if it was answered otherwise."""
        refusal = self.session.refusal()
        if refusal is not None:
            self._refuse(refusal)
            return None
        _, _, reader, _, slot, number, sequence, size, _, _, _, _ = request
        try:
            lease = self._ring.read_raw(slot, sequence, reader)
        except StaleSlotError:
            self._refuse(Status.STALE)
            return None
        except BufferClosedError:
            raise
        except SlotError as error:
            self._fail(str(error))
            return None
        if size and size != lease.nbytes:
            lease.release()
            self._fail(_other_size(size, lease.nbytes))
            return None
        self._leases[number] = lease
        return lease

    def _grant(self, request: tuple[int, ...]) -> int:
        """Answer a READ with a lease."""
        lease = self._lease(request)
        if lease is None:
            return REQUEST_WEIGHT
        session, nbytes = self.session, lease.nbytes
        if self.stream.lane.in_band:
            # Before STATUS(OK) is final: another thread may close the ring at any moment.
            view = lease.buffer if nbytes else NO_BYTES
            if self._checksum is not None and nbytes:
                checksum = self._ring.checksum(lease.slot, lease.sequence, self._checksum)
                session.grant(view, nbytes, lease.offset, flags=Flag.CHECKSUM, checksum=checksum)
            else:
                session.grant(view, nbytes, lease.offset)
            weight = max(nbytes, REQUEST_WEIGHT)
        else:
            session.grant(NO_BYTES, nbytes, lease.offset)
            weight = REQUEST_WEIGHT
        self.counts["reads"] += 1
        self.counts["bytes"] += nbytes
        return weight

    def _grant_part(self, request: tuple[int, ...]) -> int:
        """Answer a READ with a body, or prepare the answer in steps: one at a time, however many there are."""
        session, part = self.session, self._preparing
        if part is None:
            lease = self._lease(request)
            if lease is None:
                return BATCH_BYTES
            try:
                part = PreparedPart(lease.buffer, session.body, checksum=self._checksum is not None)
            except SelectionError as error:
                self._leases.pop(request[5]).release()
                self._fail(error.message, Status.UNSELECTABLE)
                return BATCH_BYTES
        self._preparing = None if part.advance() else part
        if self._preparing is None:
            flags, checksum = (0, 0) if part.checksum is None else (Flag.CHECKSUM, part.checksum)
            session.grant_part(part.views, part.nbytes, flags=flags, checksum=checksum)
            self.counts["reads"] += 1
            self.counts["bytes"] += part.nbytes
        return BATCH_BYTES

    def _copy(self) -> int:
        """Answer the inline READs that are due with copies, which need no lease."""
        requests, compute, send = self.session.requests, self._checksum, self.session.copy
        wanted, sizes = [], []
        weight = 0
        for kind, _, reader, flags, slot, _, sequence, size, _, _, _, _ in requests:
            if weight >= BATCH_BYTES or kind != _READ or flags != Flag.INLINE:
                break
            wanted.append((slot, sequence, reader))
            sizes.append(size)
            # A size of 0 accepts any size.
            weight += REQUEST_WEIGHT + COPY_WEIGHT * min(size or MAX_INLINE_BYTES, MAX_INLINE_BYTES)
        reads = nbytes = 0
        for size, copied in zip(sizes, self._ring.copy_many(wanted, MAX_INLINE_BYTES), strict=True):
            if not isinstance(copied, tuple):
                self._refuse_copy(copied)
                continue
            payload, checksum = copied
            found = len(payload)
            if size and size != found:
                self._fail(_other_size(size, found))
                continue
            if compute is None or not found:
                checksum = None
            elif checksum is None:
                checksum = compute(payload)
            send(payload, checksum)
            reads += 1
            nbytes += found
        self.counts["reads"] += reads
        self.counts["bytes"] += nbytes
        return len(wanted) * REQUEST_WEIGHT + COPY_WEIGHT * nbytes

    def _refuse_copy(self, error: PayloadError | SlotError) -> None:
        refusal = self.session.refusal()
        if refusal is not None:
            self._refuse(refusal)
        elif isinstance(error, StaleSlotError):
            self._refuse(Status.STALE)
        else:
            self._fail(str(error))

    def _consume(self, request: tuple[int, ...]) -> int:
        status = self.session.refusal()
        if status is None:
            _, _, reader, _, slot, _, sequence, *_ = request
            consumed = self._ring.consume(slot, sequence, reader)
            status = Status.OK if consumed else Status.STALE
        if status is not Status.DENIED:
            self.counts["consumed" if status is Status.OK else "consumed_stale"] += 1
        if status is Status.OK:
            self.session.answer()
        else:
            self.session.refuse(status)
        return REQUEST_WEIGHT

    def _refuse(self, status: Status) -> int:
        self.counts[status.name.lower()] += 1
        self.session.refuse(status)
        return REQUEST_WEIGHT

    def _fail(self, text: str, status: Status = Status.ERROR) -> int:
        self.counts["error"] += 1
        self.session.fail(text, status)
        return REQUEST_WEIGHT

    def _is_known(self, payload: tuple[int, int, int]) -> bool:
        slot, _, reader = payload
        return slot < self._ring.slots and reader < self._ring.readers


_NO_STREAM = "this server has no stream: its payloads are read by reference"
_REFUSED = {Verdict.DENIED: "auth_failures", Verdict.VERSION: "other_versions"}


def _other_size(announced: int, nbytes: int) -> str:
    return f"the payload has {nbytes} bytes, {announced} were requested"
