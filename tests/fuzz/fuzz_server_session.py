"""The server's end of a connection: any bytes, in any pieces, are answered as the protocol requires or end it.

The bytes go through a real socket and the stream that the server uses. Another connection holds a lease
meanwhile, which must not change. Input: options, then operations of one byte each with their arguments.
"""

import contextlib
import socket
from collections.abc import Iterator

import numpy as np
import xxhash
from fuzz.cursor import Cursor

from dray.errors import StaleSlotError
from dray.payload import pack
from dray.payload.selection import Selection, part_of
from dray.protocol.frames import FRAME, FRAME_BYTES, MAX_TEXT_BYTES, Flag, Frame, Kind, Status
from dray.protocol.handshake import CHALLENGE, HELLO, MAGIC, PROOF, WELCOME, ClientHandshake, ServerIdentity
from dray.ring import SharedRingBuffer
from dray.transport.lanes import SHM, TCP, UCX
from dray.transport.lanes.base import Lane
from dray.transport.lanes.socket import SocketStream
from dray.transport.served_connections import ServedConnections
from dray.transport.service import Service

RAW_HANDSHAKE, SECRET, RESET = 4, 8, 16
FRAME_OP, BYTES_OP, DELIVER_OP, READ_OP = range(4)
_LANES = (TCP, SHM, UCX, TCP)
_MAX_LEASES = 2
_READERS = 2
_IMAGE = bytes(pack({"a": np.arange(700), "b": np.arange(4, dtype=np.int8)}))
_SIZES = (5, 0, len(_IMAGE))
_KINDS = (Kind.READ, Kind.ACK, Kind.CONSUME, Kind.STAT)
_REQUESTS = (Kind.READ, Kind.CONSUME, Kind.STAT, Kind.DESCRIBE, Kind.SUBSCRIBE)
_SMALL_BUFFER = 4096


def frame(kind: int, slot: int = 0, sequence: int = 0, request: int = 0, reader: int = 0, flags: int = 0) -> bytes:
    """The operation that sends one frame; `kind` from 0 to 3 for READ, ACK, CONSUME, STAT."""
    return bytes([FRAME_OP, 0, kind, 0, reader, flags, slot, request, sequence, 0, 0])


def read_part(text: bytes, slot: int = 2, sequence: int = 2, request: int = 1, size: int | None = None) -> bytes:
    """The operation that sends a READ with a body."""
    body = text + b" " * (-len(text) % FRAME_BYTES)
    head = Frame(
        Kind.READ, flags=Flag.BODY, slot=slot, sequence=sequence, request=request, tag=7,
        offset=len(body) if size is None else size,
    )  # fmt: skip
    return bytes([BYTES_OP, FRAME_BYTES + len(body)]) + head.pack() + body


def options(lane: int = 0, *, raw: bool = False, secret: bool = False, reset: bool = False) -> bytes:
    return bytes([lane | RAW_HANDSHAKE * raw | SECRET * secret | RESET * reset])


DELIVER, READ = bytes([DELIVER_OP]), bytes([READ_OP])
_EXCHANGE = frame(0, request=1) + DELIVER + READ + frame(1, request=1, flags=1) + frame(2) + frame(3) + DELIVER
SEEDS = [
    *(options(lane, secret=secret) + _EXCHANGE for lane in range(3) for secret in (False, True)),
    options() + frame(0, 2, 2, 1) + frame(0, 2, 2, 2) + frame(1, 2, 2, 1) + DELIVER + READ,
    *(options(lane) + frame(0, flags=8) * 2 + DELIVER + READ for lane in range(3)),
    options(1)
    + frame(0, 2, 2, 1, flags=8)
    + frame(0, 0, 0, 2, flags=8)
    + DELIVER
    + READ
    + frame(1, 2, 2, 1, flags=1),
    options() + frame(0, 2, 2, 1) + DELIVER + frame(1, 2, 2, 1) + DELIVER,
    options() + frame(0, 2, 2, 1) + DELIVER + READ + frame(0, 1, 1, 1) + DELIVER,
    options() + frame(0, 0, 0, 1) + DELIVER + READ + frame(1, 1, 0, 1) + DELIVER,
    options(1, reset=True) + frame(0, reader=7) + frame(2, reader=9) + frame(0, 99) + DELIVER + frame(3),
    options(raw=True) + bytes([BYTES_OP, 96]) + HELLO.pack(MAGIC, 1, 2, 0, bytes(16), bytes(32)) + bytes(32),
    options(raw=True) + bytes([BYTES_OP, 20]) + b"GET / HTTP/1.1\r\n\r\n  " + DELIVER,
    options() + bytes([BYTES_OP, 64]) + bytes(64) + DELIVER,
    *(
        options(lane) + read_part(b'{"fields":["b"]}') + frame(2) + DELIVER + READ + frame(1, 2, 2, 1, flags=1)
        for lane in range(3)
    ),
    options() + read_part(b'{"rows":{"a":[[0,9],[600,null]]}}') + read_part(b"{}", request=2) + DELIVER + READ,
    options() + read_part(b'{"fields":["c"]}') + read_part(b"no", 0, 0) + read_part(b"{}", 9) + frame(3) + DELIVER,
    options() + read_part(b"{}", size=1 << 16) + frame(0) * 3 + DELIVER,
    options() + read_part(b"{}", size=65) + frame(3) + DELIVER,
]


class _Answers:
    """What the server has sent, checked against what it was asked."""

    def __init__(self, contents: dict[tuple[int, int], bytes]) -> None:
        self.received = bytearray()
        self._contents = contents

    def check(self, sent: bytes, raw: bool) -> None:
        """`sent` is what the client sent after a valid handshake, or from the start."""
        left = memoryview(bytes(self.received))
        if raw:
            handshake, left = left[: CHALLENGE.size], left[CHALLENGE.size :]
            assert len(handshake) in (0, CHALLENGE.size)
            assert handshake[:4] == MAGIC[: len(handshake)]
            welcome, left = left[: WELCOME.size], left[WELCOME.size :]
            assert welcome[:4] == MAGIC[: len(welcome)]
            sent = sent[HELLO.size + PROOF.size :]
        frames = list(_frames(sent))
        requests = [each for each in frames if each[0].kind in _REQUESTS]
        acks = sum(each.kind == Kind.ACK for each, _ in frames)
        acked = 0
        for request, body in requests:
            if len(left) < FRAME_BYTES:
                break
            status, left = Frame(*FRAME.unpack(left[:FRAME_BYTES])), left[FRAME_BYTES:]
            assert status.kind == Kind.STATUS
            assert status[4:7] == request[4:7]
            assert status.reader == request.reader
            assert acked <= status.acked <= acks
            acked = status.acked
            if request.flags & Flag.BODY and request.kind == Kind.READ:
                left = self._follow_body(request, body, status, left)
            else:
                left = self._follow(request, status, left)
        else:
            assert not left

    def _follow(self, request: Frame, status: Frame, left: memoryview) -> memoryview:
        """Check the payload or text behind a STATUS; returns the bytes after it."""
        if status.flags & Flag.TEXT:
            assert status.nbytes <= MAX_TEXT_BYTES
            assert (status.status == Status.OK) == (request.kind == Kind.STAT)
            text, left = left[: status.nbytes], left[status.nbytes :]
            bytes(text).decode(errors="ignore" if not left else "strict")
        elif request.kind == Kind.READ and status.status == Status.OK:
            content = self._contents[request.slot, request.sequence]
            assert request.reader < _READERS
            assert status.nbytes == len(content)
            if status.flags & Flag.CHECKSUM:
                assert status.checksum == xxhash.xxh3_64_intdigest(content)
            if not self.in_place or request.flags & Flag.INLINE:
                payload, left = left[: len(content)], left[len(content) :]
                assert content.startswith(payload)
                assert len(payload) == len(content) or not left
        elif request.kind == Kind.READ:
            assert status.status in (Status.STALE, Status.BUSY, Status.DENIED)
        else:
            assert request.kind == Kind.CONSUME
            assert status.status in (Status.OK, Status.STALE, Status.DENIED)
        return left

    def _follow_body(self, request: Frame, body: bytes, status: Frame, left: memoryview) -> memoryview:
        """As `_follow`, for a READ with a body."""
        assert status.status in (
            Status.OK,
            Status.STALE,
            Status.ERROR,
            Status.BUSY,
            Status.DENIED,
            Status.UNSELECTABLE,
        )
        if status.status != Status.OK:
            text = status.nbytes if status.flags & Flag.TEXT else 0
            return left[text:]
        whole = np.frombuffer(self._contents[request.slot, request.sequence], np.uint8)
        part = part_of(whole, Selection.decode(body))
        expected = np.empty(part.nbytes, np.uint8)
        part.write(whole, expected)
        assert (status.nbytes, status.checksum) == (part.nbytes, xxhash.xxh3_64_intdigest(expected))
        left = left[8 * status.offset :]
        assert expected.tobytes().startswith(left[: part.nbytes])
        return left[part.nbytes :]

    in_place = False


def _frames(sent: bytes) -> Iterator[tuple[Frame, bytes]]:
    """The frames that were sent, each with its body."""
    at = 0
    while at + FRAME_BYTES <= len(sent):
        frame = Frame(*FRAME.unpack_from(sent, at))
        at += FRAME_BYTES
        size = frame.offset if frame.kind == Kind.READ and frame.flags & Flag.BODY else 0
        if at + size <= len(sent):  # a READ is a request once its body is complete
            yield frame, sent[at : at + size]
        at += size


class _Serving:
    """One connection of a server, driven by hand in place of epoll."""

    def __init__(self, sock: socket.socket, service: Service, lane: Lane) -> None:
        self._connections = ServedConnections(service)
        self.connection = self._connections.add(_Stream(sock, lane))

    def serve(self) -> None:
        """Serve until the stream has nothing more or the connection has ended."""
        for connection in self._connections.all():
            connection.stream.idle()
            while self._connections.serve(connection):
                pass

    def end(self) -> None:
        self._connections.close()


class _Stream(SocketStream):
    """Sends no descriptor: the socket may be served as one of any lane."""

    def send(self, items, descriptor=None):
        return super().send(items)


def run(data: bytes) -> None:
    cursor = Cursor(data)
    chosen = cursor.byte()
    lane = _LANES[chosen % 4]
    contents = {}
    with contextlib.ExitStack() as stack:
        ring = stack.enter_context(SharedRingBuffer(4, max(_SIZES), readers=_READERS))
        for size in _SIZES:
            with ring.claim(size) as writer:
                content = bytes(index % 251 + len(contents) for index in range(size))
                if size == len(_IMAGE):
                    content = _IMAGE
                writer.buffer[:] = content
                contents[writer.slot, writer.sequence] = content
                writer.commit()
        identity = ServerIdentity(ring.producer_id, ring.slots, ring.slot_bytes, _MAX_LEASES, ring.readers)
        secret = b"secret" if chosen & SECRET else None
        service = Service(
            ring=ring,
            identity=identity,
            secret=secret,
            checksum=xxhash.xxh3_64_intdigest,
            describe=lambda: '{"a":1}',
            idle_timeout=60.0,
        )
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        stack.enter_context(theirs)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SMALL_BUFFER)
        ours.setblocking(False)
        serving = _Serving(theirs, service, lane)
        beside = ring.read_raw(0, 0, 1)
        answers = _Answers(contents)
        answers.in_place = lane is SHM
        sent = _converse(cursor, ours, serving, answers, chosen, secret, lane)
        serving.serve()
        _read(ours, serving, answers)
        with contextlib.suppress(OSError):
            ours.shutdown(socket.SHUT_WR)
        assert serving.connection.leased <= _MAX_LEASES
        assert ring.statistics().leases == serving.connection.leased + 1
        if chosen & RESET:
            ours.close()
        serving.serve()
        serving.end()
        serving.end()
        answers.check(sent, bool(chosen & RAW_HANDSHAKE))
        assert ring.statistics().leases == 1
        assert bytes(beside.buffer) == contents[0, 0]
        beside.release()
        found = ring.statistics()
        assert (found.leases, found.reading, found.writing, found.double_releases) == (0, 0, 0, 0)
        assert found.free + found.ready == 4
        for each in ring.ready():
            with _lease(ring, each) as lease:
                assert bytes(lease.buffer) == contents[each.slot, each.sequence]


@contextlib.contextmanager
def _lease(ring, ready):
    """A lease of whichever reader has not consumed the payload."""
    for reader in range(_READERS):
        with contextlib.suppress(StaleSlotError):
            lease = ring.read_raw(ready.slot, ready.sequence, reader)
            break
    yield lease
    lease.release()


def _converse(cursor, ours, serving, answers, chosen, secret, lane) -> bytes:
    """Carry out the operations; what was sent after the handshake, or from the start where that is made up."""
    if not chosen & RAW_HANDSHAKE:
        handshake = ClientHandshake(lane, secret=secret)
        answer = handshake.hello()
        while answer is not None:
            ours.send(answer)
            serving.serve()
            answer = handshake.receive(ours.recv(handshake.expects))
        assert serving.connection.session.established
    sent, waiting = bytearray(), bytearray()
    while cursor:
        operation = cursor.byte() % 4
        if operation == FRAME_OP:
            cut, kind, status, reader, flags, slot, request, sequence, nbytes, tag = (
                cursor.byte(), cursor.byte(), cursor.number(8), cursor.number(8), cursor.number(8),
                cursor.number(32), cursor.number(64), cursor.number(64), cursor.number(64), cursor.number(64),
            )  # fmt: skip
            whole = Frame(
                _KINDS[kind] if kind < 4 else kind, status, reader, flags, slot, request, sequence, nbytes, tag=tag
            ).pack()
            if 0 < cut < FRAME_BYTES:  # the frame comes in two pieces
                sent += _deliver(ours, serving, waiting + whole[:cut])
                waiting, whole = bytearray(), whole[cut:]
            waiting += whole
        elif operation == BYTES_OP:
            waiting += cursor.read(cursor.byte())
        elif operation == DELIVER_OP:
            sent += _deliver(ours, serving, waiting)
            waiting = bytearray()
        else:
            _read(ours, serving, answers)
    return bytes(sent + _deliver(ours, serving, waiting))


def _deliver(ours: socket.socket, serving: _Serving, waiting: bytearray) -> bytes:
    accepted = 0
    try:
        while accepted < len(waiting):
            accepted += ours.send(waiting[accepted:])
            serving.serve()
    except OSError:  # the server has ended the connection, or reads no more until it is read
        serving.serve()
    return bytes(waiting[:accepted])


def _read(ours: socket.socket, serving: _Serving, answers: _Answers) -> None:
    """Read all that the server sends."""
    try:
        while part := ours.recv(1 << 16):
            answers.received += part
            serving.serve()
    except OSError:
        return
