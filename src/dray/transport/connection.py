"""A client's connection: the exchange, driven by the thread that uses it, each wait under a deadline."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from dray.clock import Deadline
from dray.errors import (
    BufferClosedError,
    DrayError,
    MessageTruncated,
    PayloadError,
    ProtocolError,
    TransportError,
    VersionMismatch,
)
from dray.payload.codec import unpack
from dray.protocol import PayloadRef
from dray.protocol.client_session import ClientSession, Request, refusal
from dray.protocol.frames import FRAME_BYTES, MIN_VERSION, VERSION, Flag, Frame, Kind, Status
from dray.protocol.handshake import ServerIdentity
from dray.protocol.server_session import MAX_INLINE_BYTES
from dray.ring import Segment
from dray.ring.layout import SegmentLayout
from dray.transport import trace
from dray.transport.handshaking import shake_hands, wait_for_message, wait_for_stream
from dray.transport.lanes import parse_endpoint
from dray.transport.lanes.base import Network, Stream, Waiter, Worker
from dray.transport.receive_buffers import Bytes, ReceiveBuffers
from dray.transport.trace import Trace

_UINT8 = np.dtype(np.uint8)
_READ = Kind.READ

_WINDOW = 256
"""Requests in flight at a time: both ends can hold them and their answers without reading each other's."""


@dataclass(slots=True)
class Held:
    """A payload as it is before its ACK.

    Attributes:
        request: the READ that holds its lease.
        root: its bytes, uint8 of shape (nbytes,): private memory, or on the shm lane the slot itself, read-only.
        in_place: `root` is the slot.
        buffers: where a copy's memory comes from.
        from_slot: `root` is the slot or a copy of it, right only if the lease has lived until then.
        arrays: views on `root`, where it was unpacked already.
    """

    request: Request
    root: Bytes
    in_place: bool
    buffers: ReceiveBuffers
    from_slot: bool = False
    arrays: dict[str, np.ndarray[Any, np.dtype[Any]]] | None = None

    def data(self) -> Bytes:
        """The payload in memory of its own."""
        if not self.in_place:
            return self.root
        copy = self.buffers.take(self.root.nbytes)
        np.copyto(copy, self.root)
        return copy


class Connection:
    """One connection to one endpoint of a server.

    After any error other than a refusal the connection is unusable and must be closed: what is still on its way
    must not be taken for an answer to something else.

    Attributes:
        reads, read_bytes: payloads that were handed out over it, and their size.
        inline_bytes: payloads of up to this size come with their STATUS, where that is asked for.
        failure: why it must not be used again; None while it can.
        in_band: payloads come over the connection; on the shm lane they lie in the mapped segment.
        ended: leases that the next `ask` or `end_leases` ends, as `acknowledge` takes them.
        handed_out: the lease of the payload that its caller has received last, to be added to `ended`.
        version: the protocol version that both sides speak.
    """

    version = VERSION

    def __init__(
        self,
        stream: Stream,
        endpoint: str,
        identity: ServerIdentity,
        segment: Segment | None,
        verify: bool,
        buffers: ReceiveBuffers,
        network: Network,
        waiter: Waiter,
        inline_bytes: int = MAX_INLINE_BYTES,
        report: Trace | None = None,
    ) -> None:
        self.endpoint = endpoint
        self._report = report
        self.identity = identity
        self.lane = stream.lane
        self.reads = 0
        self.read_bytes = 0
        self.ended: list[tuple[Request, bool]] = []
        self.handed_out: tuple[Request, bool] | None = None
        self.in_band = stream.lane.in_band
        self._stream = stream
        self._segment = segment
        if segment is not None:
            self._memory, self._first, self._stride = segment.view, segment.slot_offset(0), segment.layout.stride
        self._verify = verify
        self._buffers = buffers
        self._network = network
        self._waiter = waiter
        self._looked_at = 0.0
        self._asked_at = 0.0
        self._answered_at: float | None = None
        self.inline_bytes = inline_bytes
        self.failure: DrayError | None = None
        self._session = ClientSession()

    @classmethod
    def open(
        cls,
        endpoint: str,
        producer: bytes,
        secret: bytes | None,
        deadline: Deadline,
        worker: Worker | None = None,
        verify: bool = True,
        buffers: ReceiveBuffers | None = None,
        network: Network | None = None,
        inline_bytes: int = MAX_INLINE_BYTES,
        version: int = VERSION,
        report: Trace | None = None,
    ) -> Connection:
        """Connect, shake hands, and on the shm lane map the segment.

        `version` is offered first. If the server speaks an older one only, that is used on a second connection.

        Raises:
            TransportError: it cannot be reached in time.
            OtherProducerError: another producer listens there.
            AuthenticationError: one side does not know the other's secret.
            VersionMismatch: the server speaks no version that this client speaks.
        """
        network = network or Network()
        waiter = network.waiter()
        older = None
        while True:
            stream = network.connect(parse_endpoint(endpoint), deadline, worker)
            try:
                offered = older or version
                identity, descriptor = shake_hands(stream, endpoint, producer, secret, deadline, waiter, offered)
                try:
                    segment = None if stream.lane.in_band else Segment.attach(descriptor)
                finally:
                    if descriptor >= 0:
                        os.close(descriptor)
                if segment is not None and segment.producer_id != identity.producer:
                    raise ProtocolError("the segment is another producer's", endpoint=endpoint)
                if segment is not None and segment.layout != SegmentLayout(identity.slots, identity.slot_bytes):
                    raise ProtocolError("the segment's slots are not those of the handshake", endpoint=endpoint)
                break
            except VersionMismatch as mismatch:
                stream.close()
                if older or mismatch.version is None or not MIN_VERSION <= mismatch.version < version:
                    raise
                older = mismatch.version
                waiter = network.waiter()
            except BaseException:
                stream.close()
                raise
        connection = cls(
            stream,
            endpoint,
            identity,
            segment,
            verify,
            buffers or ReceiveBuffers(),
            network,
            waiter,
            inline_bytes,
            report,
        )
        connection.version = offered
        return connection

    # --- reading ----------------------------------------------------------------------------------------------

    def read(
        self, ref: PayloadRef, reader: int, status_by: Deadline, deadline: Deadline, copy: bool
    ) -> Held | DrayError:
        """`ask` for one payload, and its `answer`."""
        frame, target = self._asked(ref, reader, copy, status_by)
        self._send(frame, status_by)
        arrays = None
        if target is None and not self.in_band:
            self._looked_at = deadline.now()
            target = self._ahead(ref, copy)
            if target is not None and not copy:
                arrays = _unpacked_ahead(target)
        held = self.answer(ref, target, status_by, deadline)
        if arrays is not None and isinstance(held, Held) and held.root is target:
            held.arrays = arrays
        return held

    def ask(
        self,
        refs: Sequence[PayloadRef],
        reader: int,
        deadline: Deadline,
        copy: bool = False,
    ) -> list[Bytes | None]:
        """Send one READ for each reference, pipelined; the memory each payload will arrive in, or lies in (shm).

        With `copy` payloads are wanted in memory of their own: small ones come with their STATUS, and have None
        here. The leases that have `ended` are told in the same message.
        """
        frames = self._ends()
        targets: list[Bytes | None] = []
        for ref in refs:
            frame, target = self._asked(ref, reader, copy, deadline)
            frames.append(frame)
            targets.append(target)
        self._send(b"".join(frames), deadline)
        if not self.in_band:
            self._looked_at = deadline.now()
            targets = [self._ahead(ref, copy) for ref in refs]
        return targets

    def answer(
        self, ref: PayloadRef, target: Bytes | None, status_by: Deadline, deadline: Deadline
    ) -> Held | DrayError:
        """Take the next payload that was asked for, or the refusal that came instead of it.

        Raises:
            TransportError: the connection failed, or a deadline passed.
            ProtocolError: what came is not the payload that was asked for.
        """
        request, frame = self._session.receive(self._message(FRAME_BYTES, status_by, "STATUS"))
        if self._answered_at is None:
            self._answered_at = status_by.now()
        status, nbytes = frame[1], frame[7]
        if self._report is not None:
            self._report_status(request, status, status_by)
        if status:
            text = self._text(frame, status_by)
            if target is not None and self.in_band:
                self._payload(0, deadline)
            return refusal(request, frame, text, self.endpoint, self.identity.readers)
        if nbytes != ref.nbytes:
            raise ProtocolError(
                f"the payload has {nbytes} bytes, the reference says {ref.nbytes}", endpoint=self.endpoint
            )
        if request[7]:  # INLINE
            target = np.frombuffer(bytearray(self._message(nbytes, deadline, "the payload")), _UINT8)
        elif not self.in_band:
            if target is None or frame[11] != self._first + frame[4] * self._stride:
                raise ProtocolError(
                    f"STATUS says that {nbytes} bytes lie at {frame[11]}", endpoint=self.endpoint, slot=ref.slot
                )
            copied = target.flags.writeable
            if frame[8] >= self._looked_at * 1e9:  # committed after that look: who asked had guessed the reference
                target = self._ahead(ref, copied)
                assert target is not None
            return Held(request, target, not copied, self._buffers, from_slot=True)
        else:
            assert target is not None
            self._payload(nbytes, deadline)
        if frame[3] and self._verify and xxhash.xxh3_64_intdigest(target.data) != frame.checksum:
            raise MessageTruncated(
                "the payload does not match its checksum",
                endpoint=self.endpoint, slot=ref.slot, sequence=ref.sequence,
            )  # fmt: skip
        return Held(request, target, False, self._buffers)

    def acknowledge(self, ended: Sequence[tuple[Request, bool]], deadline: Deadline) -> None:
        """End leases: (request, consumed) each. No answer comes back."""
        if ended:
            self._send(b"".join([self._session.ack(request, consumed) for request, consumed in ended]), deadline)

    def note_handed_out(self) -> None:
        """Add the lease of the payload that was handed out last to those that have `ended`."""
        if self.handed_out is not None:
            self.ended.append(self.handed_out)
            self.handed_out = None

    def end_leases(self, deadline: Deadline) -> None:
        """End the leases that have `ended`."""
        frames = self._ends()
        if frames:
            self._send(b"".join(frames), deadline)

    def finish(self, held: Held, consumed: bool, deadline: Deadline) -> None:
        """End the lease of a payload that is in memory of its own now.

        Raises:
            TransportError: it was copied from its slot, and its lease may have ended meanwhile: the copy
                must not be used.
        """
        try:
            self.acknowledge([(held.request, consumed)], deadline)
        except (TransportError, BufferClosedError) as error:
            if held.from_slot:
                self._session.forget(held.request)
                raise
            self.failure = error  # the payload is whole; its ACK is repeated on another connection
        except BaseException:
            self._session.forget(held.request)  # the caller does not get the payload
            raise

    # --- other requests ---------------------------------------------------------------------------------------

    def consume(
        self, wanted: Sequence[tuple[int, int, int]], deadline: Deadline, status_by: Deadline | None = None
    ) -> list[Status]:
        """CONSUME for each (slot, sequence, reader), pipelined; ``OK`` or ``STALE`` for each.

        The first answer must come until `status_by`, if that is given.

        Raises:
            ReaderIdError: a reader id is not one of the ring's.
            SlotError: the ring is closed.
        """
        went: list[Status] = []
        answer_by = status_by or deadline
        for first in range(0, len(wanted), _WINDOW):
            window = wanted[first : first + _WINDOW]
            requests = [self._session.request(Kind.CONSUME, *each) for each in window]
            if self._report is not None:
                for request in requests:
                    self._report_request(request, answer_by)
            self._send(b"".join([request.pack() for request in requests]), answer_by)
            for _ in window:
                went.append(Status(self._accepted(answer_by)[0].status))
                answer_by = deadline
        return went

    def confirm(self, deadline: Deadline) -> None:
        """Make sure that the ACKs sent so far have arrived; also while the client is being closed."""
        self._waiter = self._network.waiter(lasting=True)
        if self.unconfirmed:
            # Any answer confirms all ACKs before it.
            self.consume(self.unconfirmed[-1:], deadline)

    def stat(self, deadline: Deadline) -> str:
        """The server's statistics, as JSON text."""
        request = self._session.request(Kind.STAT)
        if self._report is not None:
            self._report_request(request, deadline)
        self._send(request.pack(), deadline)
        return self._accepted(deadline)[1]

    @property
    def unconfirmed(self) -> list[tuple[int, int, int]]:
        """(slot, sequence, reader) of ACKs that may not have arrived."""
        ended = self.ended if self.handed_out is None else [*self.ended, self.handed_out]
        lost = [*self._session.unconfirmed, *(request for request, consumed in ended if consumed)]
        return [(request.slot, request.sequence, request.reader) for request in lost]

    def asked_since(self, now: float) -> None:
        """An exchange over this connection began at `now`, with connecting where that was needed."""
        self._asked_at, self._answered_at = now, None

    @property
    def latency(self) -> float | None:
        """Seconds from there to the exchange's first STATUS; None before it."""
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
        self._segment, self._memory = None, memoryview(b"")

    @property
    def drained(self) -> bool:
        """After `close`: nothing writes into memory of this connection's payloads any more."""
        return self._stream.drained

    def __repr__(self) -> str:
        return f"<Connection {self.endpoint} to {self.identity.producer.hex()[:8]}>"

    # --- the exchange's steps ---------------------------------------------------------------------------------

    def _asked(self, ref: PayloadRef, reader: int, copy: bool, deadline: Deadline) -> tuple[bytes, Bytes | None]:
        """The READ for a payload, and the memory for it, as `ask` has it."""
        target, tag, flags = None, 0, Flag.NONE
        if copy and ref.nbytes <= self.inline_bytes:
            flags = Flag.INLINE
        elif self.in_band:
            # A reference is untrusted: one that says more than a slot holds must not claim that memory.
            target = self._buffers.take(min(ref.nbytes, self.identity.slot_bytes))
            tag = self._stream.expect(target.data)
        request = self._session.request(_READ, ref.slot, ref.sequence, reader, ref.nbytes, tag, flags)
        if self._report is not None:
            self._report_request(request, deadline)
        return request.pack(), target

    def _report_request(self, request: Request, deadline: Deadline) -> None:
        assert self._report is not None
        kind, _, slot, sequence, reader, _, _, _ = request
        self._report(trace.Request(deadline.now(), self.endpoint, kind, slot, sequence, reader))

    def _report_status(self, request: Request, status: int, deadline: Deadline) -> None:
        assert self._report is not None
        kind, _, slot, sequence, _, _, _, _ = request
        self._report(trace.Status(deadline.now(), self.endpoint, kind, slot, sequence, Status(status)))

    def _ends(self) -> list[bytes]:
        """The ACKs of the leases that have `ended`."""
        self.note_handed_out()
        frames = [self._session.ack(request, consumed) for request, consumed in self.ended]
        self.ended.clear()
        return frames

    def _send(self, message: bytes, deadline: Deadline) -> None:
        sent = self._stream.send([message])
        while not sent:
            self._wait(deadline, "the request to be sent")
            sent = self._stream.flush()

    def _text(self, frame: Frame, deadline: Deadline) -> str:
        if not (frame.flags & Flag.TEXT and frame.nbytes):
            return ""
        return str(self._message(frame.nbytes, deadline, "the text after STATUS"), "utf-8", "replace")

    def _accepted(self, deadline: Deadline) -> tuple[Frame, str]:
        """The answer to a request that is not a READ, unless it is a refusal."""
        request, frame = self._session.receive(self._message(FRAME_BYTES, deadline, "STATUS"))
        if self._answered_at is None:
            self._answered_at = deadline.now()
        if self._report is not None:
            self._report_status(request, frame.status, deadline)
        text = self._text(frame, deadline)
        if frame.status not in (Status.OK, Status.STALE):
            raise refusal(request, frame, text, self.endpoint, self.identity.readers)
        return frame, text

    def _payload(self, nbytes: int, deadline: Deadline) -> None:
        while not self._stream.payload_arrived(nbytes):
            self._wait(deadline, "the payload")

    def _ahead(self, ref: PayloadRef, copy: bool) -> Bytes | None:
        """A payload on the shm lane as it lies in its slot, or a copy, made while the server looks at the READ.

        It is right if STATUS(ok) comes and says that the payload was committed before: its slot does not change
        until its life is over, which with that STATUS it is not. None where there is no such slot, or the payload
        is to come inline.
        """
        identity, nbytes = self.identity, ref.nbytes
        if ref.slot >= identity.slots or nbytes > identity.slot_bytes:
            return None
        if copy and nbytes <= self.inline_bytes:
            return None
        slot = np.frombuffer(self._memory, _UINT8, nbytes, self._first + ref.slot * self._stride)
        if not copy:
            return slot
        target = self._buffers.take(nbytes)
        np.copyto(target, slot)
        return target

    def _message(self, size: int, deadline: Deadline, awaited: str) -> memoryview:
        message = self._stream.receive(size)
        if message is not None:
            return message
        return wait_for_message(self._stream, self._waiter, size, deadline, awaited, self.endpoint)

    def _wait(self, deadline: Deadline, awaited: str) -> None:
        wait_for_stream(self._stream, self._waiter, deadline, awaited, self.endpoint)


def _unpacked_ahead(root: Bytes) -> dict[str, np.ndarray[Any, np.dtype[Any]]] | None:
    """The arrays of a payload that may turn out to be another one by now, and half written: then None, perhaps."""
    try:
        return unpack(root)
    except PayloadError:
        return None
