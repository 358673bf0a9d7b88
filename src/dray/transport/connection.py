"""A client's connection: its handshake, and requests with their answers. Each wait has a deadline.

The thread that uses a connection drives it. What the protocol demands of the server's messages is checked by
`ClientSession`. Memory, segment offsets, checksums and deadlines belong to the connection.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from dray.clock import MONOTONIC, Clock, Deadline
from dray.errors import (
    BufferClosedError,
    DrayError,
    MessageTruncated,
    ProtocolError,
    SelectionError,
    TransportError,
    VersionMismatch,
)
from dray.payload.selection import Selection
from dray.protocol import PayloadRef
from dray.protocol.client_session import PAYLOAD, Answer, ClientSession, Event, Refusal, Request
from dray.protocol.frames import FRAME_BYTES, MAX_ADDED_BYTES, MIN_VERSION, VERSION, Flag, Kind, Status
from dray.protocol.server_session import MAX_INLINE_BYTES
from dray.transport import trace
from dray.transport.connecting import Shared, shake_hands
from dray.transport.lanes import parse_endpoint
from dray.transport.lanes.base import Network, Stream, Waiter, Worker
from dray.transport.receive_buffers import Bytes, ReceiveBuffers

_UINT8 = np.dtype(np.uint8)
_READ = Kind.READ

_MAX_PIPELINED = 256
"""CONSUME requests on their way at a time: both ends can buffer them and their answers."""


@dataclass(slots=True)
class ReceivedPayload:
    """A payload before its ACK.

    Attributes:
        request: the READ that holds its lease.
        root: its bytes, uint8 of shape (nbytes,): private memory, or on the shm lane the slot itself, read-only.
            In private memory they are those of the part, if one was selected.
        in_place: `root` is the slot.
        buffers: where a copy's memory comes from.
        from_slot: `root` is the slot or a copy of it, correct only if the lease has lasted until then.
    """

    request: Request
    root: Bytes
    in_place: bool
    buffers: ReceiveBuffers
    from_slot: bool = False

    def data(self) -> Bytes:
        """The payload in memory of its own."""
        if not self.in_place:
            return self.root
        return self.buffers.copy(self.root)


class Connection:
    """One connection to one endpoint of a server.

    After any error other than a refusal it must be closed, because what is still on its way could be taken for the
    answer to another request.

    Args:
        stream: the stream, after the handshake; the connection owns it.
        shared: what the handshake has brought.
        verify: compare payloads with their checksums.
        buffers: where the memory of payloads comes from.
        network, waiter: how the connection waits.
        version: the protocol version that both sides speak.
        report: receives the trace events of this connection.

    Attributes:
        reads, read_bytes: payloads that were handed out over it, and their size.
        inline_bytes: payloads of up to this size come with their STATUS when a copy is wanted.
        failure: why it must not be used again; None while it can be.
        in_band: payloads come over the connection; on the shm lane they lie in the mapped segment.
        attachment: the means for direct leases, if the handshake has brought any.
        bodies: READs may have a body; without, payloads are received whole, and the part is selected here.
        ended: leases, with whether they end as consumed, which the next `ask` or `end_leases` ends.
        handed_out: the lease of the payload that the caller has received last, to be added to `ended`.
    """

    def __init__(
        self,
        stream: Stream,
        endpoint: str,
        shared: Shared,
        *,
        verify: bool,
        buffers: ReceiveBuffers,
        network: Network,
        waiter: Waiter,
        version: int = VERSION,
        inline_bytes: int = MAX_INLINE_BYTES,
        clock: Clock = MONOTONIC,
        report: trace.Trace | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.identity = shared.identity
        self.attachment = shared.attachment
        self.bodies = shared.bodies
        self.version = version
        self.lane = stream.lane
        self.in_band = stream.lane.in_band
        self.inline_bytes = inline_bytes
        self.failure: DrayError | None = None
        self.reads = 0
        self.read_bytes = 0
        self.ended: list[tuple[Request, bool]] = []
        self.handed_out: tuple[Request, bool] | None = None
        self._stream = stream
        if (segment := shared.segment) is not None:
            self._memory, self._first, self._stride = segment.view, segment.slot_offset(0), segment.layout.stride
        self._verify = verify
        self._buffers = buffers
        self._network = network
        self._waiter = waiter
        self._clock = clock
        self._report = report
        self._asked_at = 0.0
        self._answered_at: float | None = None
        self._session = ClientSession(endpoint, shared.identity.readers, tagged=stream.lane.tagged)

    @classmethod
    def open(
        cls,
        endpoint: str,
        producer: bytes,
        secret: bytes | None,
        deadline: Deadline,
        *,
        worker: Worker | None = None,
        verify: bool = True,
        buffers: ReceiveBuffers | None = None,
        network: Network | None = None,
        inline_bytes: int = MAX_INLINE_BYTES,
        version: int = VERSION,
        clock: Clock = MONOTONIC,
        report: trace.Trace | None = None,
        attach_as: int | None = None,
    ) -> Connection:
        """Connect, perform the handshake, and on the shm lane map the segment.

        With a reader id in `attach_as`, direct leases are asked for where the lane has shared memory.
        `version` is offered first. If the server speaks an older one only, that is used on a second connection.

        Raises:
            TransportError: the server cannot be reached in time.
            OtherProducerError: another producer listens there.
            AuthenticationError: one side does not know the other's secret.
            VersionMismatch: the server speaks no version that this client speaks.
            ProtocolError: the peer is not a dray server, or the segment is not that of the handshake.
        """
        network = network or Network()
        offered = version
        while True:
            waiter = network.waiter()
            stream = network.connect(parse_endpoint(endpoint), deadline, worker)
            try:
                shared = shake_hands(
                    stream,
                    waiter,
                    deadline,
                    network=network,
                    endpoint=endpoint,
                    producer=producer,
                    secret=secret,
                    version=offered,
                    attach_as=attach_as,
                )
                break
            except VersionMismatch as mismatch:
                stream.close()
                if offered != version or mismatch.version is None or not MIN_VERSION <= mismatch.version < version:
                    raise
                offered = mismatch.version
            except BaseException:
                stream.close()
                raise
        return cls(
            stream, endpoint, shared,
            verify=verify, buffers=buffers or ReceiveBuffers(), network=network, waiter=waiter,
            version=offered, inline_bytes=inline_bytes, clock=clock, report=report,
        )  # fmt: skip

    # --- reading ----------------------------------------------------------------------------------------------

    def read(
        self,
        ref: PayloadRef,
        reader: int,
        status_deadline: Deadline,
        deadline: Deadline,
        *,
        copy: bool,
        selection: Selection | None = None,
    ) -> ReceivedPayload | DrayError:
        """Read one payload: `ask` and `answer` in one call."""
        frame, target = self._request(ref, reader, copy, selection)
        if not self._stream.send([frame]):
            self._flush(status_deadline)
        return self.answer(target, status_deadline, deadline, copy=copy, selection=selection)

    def ask(
        self,
        refs: Sequence[PayloadRef],
        reader: int,
        deadline: Deadline,
        *,
        copy: bool = False,
        selection: Selection | None = None,
    ) -> list[Bytes | None]:
        """Send one READ for each reference, and the ACKs of the leases that have `ended`, as one message.

        Returns the memory that each payload arrives in, for `answer`; None where it comes with its STATUS, stays
        in its slot, or is a part whose size is not known. With `copy` payloads are wanted in memory of their own.
        """
        frames = self._ends()
        targets: list[Bytes | None] = []
        for ref in refs:
            frame, target = self._request(ref, reader, copy, selection)
            frames.append(frame)
            targets.append(target)
        self._send(frames, deadline)
        return targets

    def answer(
        self,
        target: Bytes | None,
        status_deadline: Deadline,
        deadline: Deadline,
        *,
        copy: bool = True,
        selection: Selection | None = None,
    ) -> ReceivedPayload | DrayError:
        """Receive the next payload that was asked for, or the refusal that came instead of it.

        Args:
            target: what `ask` has returned for it.
            status_deadline, deadline: when its STATUS, and all of it, must have come.
            copy, selection: as for `ask`.

        Raises:
            TransportError: the connection failed, or a deadline passed.
            ProtocolError: what came is not the payload that was asked for.
        """
        event = self._event(status_deadline, deadline)
        request = event.request
        asked = request.flags
        if isinstance(event, Refusal):
            if self.in_band and not asked:
                try:
                    self._payload((0,), status_deadline)
                except TransportError as error:
                    self.failure = error  # the refusal is the answer, also without its empty payload
            elif asked & Flag.BODY:
                self._stream.expect_reserved(())
            return event.error
        frame = event.frame
        nbytes = frame.nbytes
        from_slot, copied, checksum = False, True, None
        sizes: Sequence[int] = (nbytes,)
        if asked & Flag.BODY:
            target, sizes = self._expect_part(event)
            selection = None
        if asked & Flag.INLINE:
            target = np.frombuffer(bytearray(event.body), _UINT8)
        elif self.in_band:
            assert target is not None
            if frame.flags and self._verify:
                checksum = self._payload_and_checksum(target, sizes, deadline)
            else:
                self._payload(sizes, deadline)
        else:
            target = self._in_slot(request.slot, nbytes, frame.offset)
            from_slot, copied = True, copy
        if frame.flags and self._verify and not from_slot:
            if checksum is None:
                checksum = xxhash.xxh3_64_intdigest(target.data)
            if checksum != frame.checksum:
                raise MessageTruncated(
                    "the payload does not match its checksum",
                    endpoint=self.endpoint, slot=request.slot, sequence=request.sequence,
                )  # fmt: skip
        if copied and (from_slot or selection is not None):
            try:
                target = self._buffers.copy(target, selection)
            except SelectionError as error:
                self.acknowledge([(request, False)], deadline)
                return error
        if self._report is not None:
            self._report(
                trace.Payload(self._clock.now(), self.endpoint, request.slot, request.sequence, nbytes, id(self))
            )
        return ReceivedPayload(request, target, not copied, self._buffers, from_slot)

    def finish(self, received: ReceivedPayload, consumed: bool, deadline: Deadline) -> None:
        """End the lease of a payload that is in memory of its own now, and count it as handed out.

        Raises:
            TransportError: it was copied from its slot, and its lease may have ended meanwhile: the copy
                must not be used.
        """
        try:
            ack = self._session.ack if self._report is None else self._ack
            if not self._stream.send([ack(received.request, consumed)]):
                self._flush(deadline)
        except (TransportError, BufferClosedError) as error:
            if received.from_slot:
                self._session.forget(received.request)
                raise
            self.failure = error  # the payload is whole; its ACK is repeated on another connection
        except BaseException:
            self._session.forget(received.request)  # the caller does not get the payload
            raise
        self.reads += 1
        self.read_bytes += received.root.nbytes

    def acknowledge(self, ended: Sequence[tuple[Request, bool]], deadline: Deadline) -> None:
        """End leases: (request, consumed) each. No answer comes back."""
        self._send([self._ack(request, consumed) for request, consumed in ended], deadline)

    def end_leases(self, deadline: Deadline) -> None:
        """End the leases that have `ended`."""
        self._send(self._ends(), deadline)

    def note_handed_out(self) -> None:
        """Add the lease of the payload that was handed out last to those that have `ended`."""
        # In this order: an exception of a signal handler in between names the lease twice, not never.
        if self.handed_out is not None:
            self.ended.append(self.handed_out)
            self.handed_out = None

    # --- other requests ---------------------------------------------------------------------------------------

    def consume(
        self, wanted: Sequence[tuple[int, int, int]], deadline: Deadline, status_deadline: Deadline | None = None
    ) -> list[Status]:
        """Send CONSUME for each (slot, sequence, reader), pipelined; ``OK`` or ``STALE`` for each.

        The first answer must come before `status_deadline`, if that is given.

        Raises:
            ReaderIdError: a reader id is not one of the ring's.
            SlotError: the ring is closed.
        """
        found: list[Status] = []
        first_deadline = status_deadline or deadline
        for first in range(0, len(wanted), _MAX_PIPELINED):
            together = wanted[first : first + _MAX_PIPELINED]
            self._send([self._frame(Kind.CONSUME, *each) for each in together], first_deadline)
            for _ in together:
                found.append(Status(self._accepted(first_deadline).frame.status))
                first_deadline = deadline
        return found

    def confirm(self, deadline: Deadline) -> None:
        """Make sure that the ACKs sent so far have arrived; also while the client is being closed."""
        self._waiter = self._network.waiter(lasting=True)
        if self.unconfirmed:
            # Any answer confirms all ACKs before it.
            self.consume(self.unconfirmed[-1:], deadline)

    def stat(self, deadline: Deadline) -> str:
        """The server's statistics, as JSON text."""
        self._send([self._frame(Kind.STAT, 0, 0, 0)], deadline)
        return str(self._accepted(deadline).body, "utf-8", "replace")

    # --- state ------------------------------------------------------------------------------------------------

    @property
    def unconfirmed(self) -> list[tuple[int, int, int]]:
        """(slot, sequence, reader) of ACKs that may not have arrived."""
        ended = self.ended if self.handed_out is None else [*self.ended, self.handed_out]
        lost = [*self._session.unconfirmed, *(request for request, consumed in ended if consumed)]
        return [(request.slot, request.sequence, request.reader) for request in lost]

    def asked_since(self, now: float) -> None:
        """Note that a call began to use this connection at `now`, with connecting if that was needed."""
        self._asked_at, self._answered_at = now, None

    @property
    def latency(self) -> float | None:
        """Seconds from there to the first STATUS; None before it."""
        return None if self._answered_at is None else self._answered_at - self._asked_at

    def usable(self) -> bool:
        """False once the server has closed an idle connection."""
        try:
            self._stream.idle()
            return self._stream.receive(FRAME_BYTES) is None
        except DrayError:
            return False

    def close(self) -> None:
        """Close at once. Twice is fine; arrays of a mapped segment stay valid."""
        self._stream.close()
        self._memory = memoryview(b"")

    def __repr__(self) -> str:
        return f"<Connection {self.endpoint} to {self.identity.producer.hex()[:8]}>"

    # --- requests into bytes ----------------------------------------------------------------------------------

    def _request(
        self, ref: PayloadRef, reader: int, copy: bool, selection: Selection | None
    ) -> tuple[bytes, Bytes | None]:
        """The READ for a payload, and the memory that it arrives in, if it travels by itself."""
        target, tag, flags, body = None, 0, Flag.NONE, b""
        if copy and ref.nbytes <= self.inline_bytes:
            flags = Flag.INLINE
        elif selection is not None and self.bodies:
            body = selection.text
            tag = self._stream.reserve()
        elif self.in_band:
            # A reference is untrusted: one that names more than a slot holds must not claim that memory.
            target = self._buffers.allocate(min(ref.nbytes, self.identity.slot_bytes))
            tag = self._stream.expect(target.data)
        if self._report is not None:
            self._report(
                trace.Request(self._clock.now(), self.endpoint, _READ, ref.slot, ref.sequence, reader, id(self))
            )
        frame = self._session.request(
            _READ, ref.slot, ref.sequence, reader, nbytes=ref.nbytes, tag=tag, flags=flags, body=body
        )
        return frame, target

    def _frame(self, kind: Kind, slot: int, sequence: int, reader: int) -> bytes:
        """Another request."""
        if self._report is not None:
            self._report(trace.Request(self._clock.now(), self.endpoint, kind, slot, sequence, reader, id(self)))
        return self._session.request(kind, slot, sequence, reader)

    def _ack(self, request: Request, consumed: bool) -> bytes:
        if self._report is not None:
            _, _, slot, sequence, reader, _, _, _ = request
            self._report(
                trace.Acknowledgement(self._clock.now(), self.endpoint, slot, sequence, reader, consumed, id(self))
            )
        return self._session.ack(request, consumed)

    def _ends(self) -> list[bytes]:
        """The ACKs of the leases that have `ended`."""
        self.note_handed_out()
        # In this order: an exception of a signal handler in between leaves them in `ended`, not forgotten.
        ack = self._session.ack if self._report is None else self._ack
        frames = [ack(request, consumed) for request, consumed in self.ended]
        self.ended.clear()
        return frames

    def _send(self, frames: Sequence[bytes], deadline: Deadline) -> None:
        if frames and not self._stream.send([b"".join(frames)]):
            self._flush(deadline)

    def _flush(self, deadline: Deadline) -> None:
        sent = False
        while not sent:
            self._wait(deadline, "the request to be sent")
            sent = self._stream.flush()

    # --- bytes into answers -----------------------------------------------------------------------------------

    def _event(self, status_deadline: Deadline, deadline: Deadline) -> Event:
        """The answer to the oldest request; the second deadline is that of an inline payload."""
        session, stream = self._session, self._stream
        event = None
        while event is None:
            while (message := stream.receive(session.expects)) is None:
                self._wait(deadline if session.awaits is PAYLOAD else status_deadline, session.awaits)
            if self._answered_at is None:
                self._answered_at = self._clock.now()
            event = session.receive(message)
        if self._report is not None:
            request, now = event.request, self._clock.now()
            status = Status(event.frame.status)
            self._report(
                trace.Status(now, self.endpoint, request.kind, request.slot, request.sequence, status, id(self))
            )
        return event

    def _accepted(self, deadline: Deadline) -> Answer:
        event = self._event(deadline, deadline)
        if isinstance(event, Refusal):
            raise event.error
        return event

    def _expect_part(self, answer: Answer) -> tuple[Bytes, Sequence[int]]:
        """Memory for a part of a payload, in which its messages are expected, and their sizes.

        Its size was compared with that of the reference, which is untrusted: a slot does not hold more.
        """
        nbytes = answer.frame.nbytes
        if nbytes > self.identity.slot_bytes + MAX_ADDED_BYTES:
            raise ProtocolError(f"the part of a payload has {nbytes} bytes", endpoint=self.endpoint)
        sizes = [nbytes] if not self.lane.tagged else struct.unpack(f"<{len(answer.body) // 8}Q", answer.body)
        if 0 in sizes or sum(sizes) != nbytes:
            raise ProtocolError(
                f"{len(sizes)} messages of {sum(sizes)} bytes are announced for {nbytes}", endpoint=self.endpoint
            )
        target = self._buffers.allocate(nbytes)
        ends = itertools.accumulate(sizes, initial=0)
        self._stream.expect_reserved([target.data[begin:end] for begin, end in itertools.pairwise(ends)])
        return target, sizes

    def _payload(self, sizes: Sequence[int], deadline: Deadline) -> None:
        for size in sizes:
            while not self._stream.payload_arrived(size):
                self._wait(deadline, PAYLOAD)

    def _payload_and_checksum(self, target: Bytes, sizes: Sequence[int], deadline: Deadline) -> int:
        """Receive a payload; its checksum, most of which is computed while the rest is on its way."""
        stream, view = self._stream, target.data
        digest, covered, begin = xxhash.xxh3_64(), 0, 0
        for size in sizes:
            while not stream.payload_arrived(size):
                filled = begin + stream.filled
                if filled > covered:
                    digest.update(view[covered:filled])
                    covered = filled
                self._wait(deadline, PAYLOAD)
            begin += size
        digest.update(view[covered:])
        return int(digest.intdigest())

    def _in_slot(self, slot: int, nbytes: int, offset: int) -> Bytes:
        """A payload on the shm lane as it lies in its slot, for the length of its lease."""
        fits = slot < self.identity.slots and nbytes <= self.identity.slot_bytes
        if not fits or offset != self._first + slot * self._stride:
            raise ProtocolError(
                f"STATUS names offset {offset} for {nbytes} bytes", endpoint=self.endpoint, slot=slot
            )
        return np.frombuffer(self._memory, _UINT8, nbytes, offset)

    def _wait(self, deadline: Deadline, awaited: str) -> None:
        self._waiter.wait(self._stream, deadline, awaited, self.endpoint)
