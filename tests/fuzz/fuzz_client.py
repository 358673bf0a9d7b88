"""A client's connection to a hostile server: a payload arrives whole, or a typed error is raised.

All that the server sends is in the socket before the client sends a request, and the connection ends there, so
that no read waits. Input: options, then the client's requests, then operations that make up the server's bytes.
A valid handshake comes first, unless the options exclude it.
"""

import contextlib
import socket

import numpy as np
import xxhash
from fuzz.cursor import Cursor

from dray.clock import Deadline
from dray.errors import DrayError, Unreachable
from dray.payload import Selection, pack, unpack
from dray.protocol import PayloadRef
from dray.protocol.frames import MAX_ADDED_BYTES, VERSION, Flag, Frame, Kind, Status
from dray.protocol.handshake import CHALLENGE, MAGIC, WELCOME, HelloFlag, ServerIdentity
from dray.ring import Segment, SharedRingBuffer
from dray.transport.connecting import Shared
from dray.transport.connection import Connection, ReceivedPayload
from dray.transport.lanes import SHM, TCP
from dray.transport.lanes.base import Network
from dray.transport.lanes.socket import SocketStream, UnixStream
from dray.transport.polling import PollWaiter
from dray.transport.receive_buffers import ReceiveBuffers

IN_PLACE, UNVERIFIED, RAW_HANDSHAKE, INLINE, PART = 1, 2, 4, 8, 16
STATUS_OP, PAYLOAD_OP, BYTES_OP = range(3)
_SLOTS, _SLOT_BYTES = 4, 256
_PRODUCER = bytes(range(16))
_ENDPOINT = "tcp:127.0.0.1:1"
_SECONDS = 5.0


def status(step: int = 1, code: int = 0, flags: int = 0, nbytes: int = 5, *changes: int) -> bytes:
    """The operation that answers the request `step` further on; `changes` are pairs of byte index and byte."""
    return bytes([STATUS_OP, step, code, flags, nbytes, len(changes) // 2, *changes])


def payload(content: bytes) -> bytes:
    return bytes([PAYLOAD_OP, len(content)]) + content


def raw(text: bytes) -> bytes:
    return bytes([BYTES_OP, len(text)]) + text


_HANDSHAKE = CHALLENGE.pack(
    MAGIC, VERSION, 0, HelloFlag.BODIES, _PRODUCER, bytes(32), bytes(32), _SLOTS, _SLOT_BYTES, 8, 1
) + WELCOME.pack(MAGIC, 0, 0)
_SELECTION = Selection.decode(b'{"fields":["a"]}')
_IMAGE = bytes(pack({"a": np.arange(3, dtype=np.int8), "b": np.arange(2, dtype=np.int8)}))
_READS = bytes([2, 5, 0, 1])  # of 5 and of 0 bytes, consumed
SEEDS = [
    bytes([0]) + _READS + status() + payload(b"hello") + status(nbytes=0),
    bytes([0]) + _READS + status(flags=Flag.CHECKSUM) + payload(b"hello") + status(nbytes=0),
    bytes([0]) + _READS + status(code=Status.STALE) + status(code=Status.BUSY),
    bytes([0]) + _READS + status(code=Status.ERROR, flags=Flag.TEXT) + raw(b"wrong"),
    bytes([0]) + _READS + status(step=2) + payload(b"hello"),
    bytes([0]) + _READS + status(nbytes=6) + payload(b"hello!"),
    *(bytes([INLINE | each]) + _READS + status() + payload(b"hello") + status(nbytes=0) for each in (0, IN_PLACE)),
    bytes([INLINE]) + _READS + status(flags=Flag.CHECKSUM) + payload(b"abc"),
    bytes([PART]) + _READS + status(nbytes=6) + payload(b"whole?") + status(nbytes=0),
    bytes([PART]) + _READS + status(flags=Flag.CHECKSUM) + payload(b"hello") + status(code=Status.STALE),
    bytes([PART])
    + _READS
    + status(code=Status.UNSELECTABLE, flags=Flag.TEXT)
    + raw(b"wrong")
    + status(nbytes=254),
    bytes([PART | INLINE]) + bytes([1, len(_IMAGE), 1]) + status(nbytes=len(_IMAGE)) + payload(_IMAGE),
    bytes([IN_PLACE]) + _READS + status() + status(nbytes=0),
    bytes([IN_PLACE]) + _READS + status(1, 0, 0, 5, 56, 1),
    bytes([IN_PLACE]) + _READS + status(1, 0, 0, 255),
    bytes([0, 0, 0]) + status(nbytes=0) + status(nbytes=0) + status(flags=Flag.TEXT, nbytes=9) + raw(b'{"a": []}'),
    bytes([RAW_HANDSHAKE]) + _READS + raw(_HANDSHAKE) + status() + payload(b"hello") + status(nbytes=0),
    bytes([RAW_HANDSHAKE]) + _READS + raw(_HANDSHAKE[:6] + b"\1" + _HANDSHAKE[7:]),
    bytes([RAW_HANDSHAKE]) + _READS + raw(_HANDSHAKE[:108] + b"\1" + bytes(11) + _HANDSHAKE[120:]) + status(),
    bytes([0, 0, 0]) + status(nbytes=0) + status(nbytes=0) + status(flags=Flag.TEXT, nbytes=200) + raw(b"[" * 200),
]


def run(data: bytes) -> None:
    cursor = Cursor(data)
    chosen = cursor.byte()
    in_place = bool(chosen & IN_PLACE)
    sizes = [min(cursor.byte(), _SLOT_BYTES) for _ in range(cursor.byte() % 4)]
    consumed = bool(cursor.byte() & 1)
    refs = [PayloadRef(_PRODUCER, slot, slot + 10, size, (_ENDPOINT,)) for slot, size in enumerate(sizes)]
    deadline = Deadline.after(_SECONDS)
    with contextlib.ExitStack() as stack:
        segment = None
        if in_place:
            ring = stack.enter_context(SharedRingBuffer(_SLOTS, _SLOT_BYTES))
            segment = stack.enter_context(Segment.attach(ring.segment.fileno()))
        hostile = _answers(cursor, refs, segment)
        if not chosen & (RAW_HANDSHAKE | IN_PLACE):
            hostile = _HANDSHAKE + hostile
        ours, theirs = socket.socketpair()
        stack.enter_context(theirs)
        stack.enter_context(ours)
        theirs.send(hostile)
        theirs.shutdown(socket.SHUT_WR)
        verified = not chosen & UNVERIFIED
        try:
            connection = _connection(ours, segment, verified, deadline)
        except DrayError:
            assert ours.fileno() < 0
            return
        stack.enter_context(contextlib.closing(connection))
        with contextlib.suppress(DrayError):
            selection = _SELECTION if chosen & PART else None
            _read(
                connection, refs, consumed, hostile, bool(chosen & INLINE), in_place, verified, deadline, selection
            )
            connection.consume([(9, 9, 0)], deadline)
            connection.stat(deadline)
            connection.confirm(deadline)
        assert not deadline.expired
        assert len(connection.unconfirmed) <= len(refs)


class _Network(Network):
    """Every address leads to the same socket."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._sock = sock

    def connect(self, address, deadline, worker):
        if self._sock.fileno() < 0:  # the server has offered an older version
            raise Unreachable("there is no second connection", endpoint=str(address))
        return SocketStream(self._sock, TCP)


def _connection(ours, segment, verified, deadline) -> Connection:
    network = _Network(ours)
    if segment is None:
        return Connection.open(_ENDPOINT, _PRODUCER, None, deadline, verify=verified, network=network)
    # The segment's descriptor comes with WELCOME; what is behind it is fuzz_segment's.
    identity = ServerIdentity(_PRODUCER, _SLOTS, _SLOT_BYTES, 8, 1)
    return Connection(
        UnixStream(ours, SHM), _ENDPOINT, Shared(identity, segment),
        verify=verified, buffers=ReceiveBuffers(), network=network, waiter=PollWaiter(None),
    )  # fmt: skip


def _read(connection, refs, consumed, hostile, inline, in_place, verified, deadline, selection) -> None:
    targets = connection.ask(refs, 0, deadline, copy=inline, selection=selection)
    for ref, target in zip(refs, targets, strict=True):
        received = connection.answer(target, deadline, deadline, selection=selection)
        if not isinstance(received, ReceivedPayload):
            assert isinstance(received, DrayError)
            continue
        data = received.data()
        if selection is not None and (inline or in_place):
            assert list(unpack(data)) == ["a"]  # the part was taken from the whole, which was a payload
            connection.finish(received, consumed, deadline)
            continue
        assert data.nbytes == ref.nbytes or (selection is not None and data.nbytes <= ref.nbytes + MAX_ADDED_BYTES)
        if in_place and not inline:
            assert np.array_equal(data, np.zeros(ref.nbytes, np.uint8))
        else:
            assert data.tobytes() in hostile
            if verified:
                assert _vouched(hostile, data.tobytes())
        connection.finish(received, consumed, deadline)


def _vouched(hostile: bytes, content: bytes) -> bool:
    """The hostile bytes contain the checksum of what was handed out, or a STATUS without one."""
    digest = xxhash.xxh3_64_intdigest(content).to_bytes(8, "little")
    return digest in hostile or any(
        hostile[at] == Kind.STATUS and not hostile[at + 3] & Flag.CHECKSUM for at in range(len(hostile) - 63)
    )


def _answers(cursor: Cursor, refs: list[PayloadRef], segment: Segment | None) -> bytes:
    """What the hostile server sends: correct answers, changed ones and any others."""
    requests = [(ref.slot, ref.sequence, ref.nbytes) for ref in refs] + [(9, 9, 0), (0, 0, 0)]
    answers, step = bytearray(), -1
    last = b""
    while cursor and len(answers) < 1 << 15:
        operation = cursor.byte() % 3
        if operation == STATUS_OP:
            step += cursor.byte() % 4
            code, flags, nbytes = cursor.byte(), cursor.byte(), cursor.number(64)
            slot, sequence, _ = requests[step % len(requests)]
            offset = segment.slot_offset(slot % _SLOTS) if segment is not None else 0
            checksum = xxhash.xxh3_64_intdigest(last or b"hello")
            frame = bytearray(
                Frame(
                    Kind.STATUS, code % 7, 0, flags, slot, step % len(requests), sequence, nbytes, checksum,
                    offset=offset,
                ).pack()
            )  # fmt: skip
            for _ in range(cursor.byte() % 4):
                frame[cursor.byte() % 64] = cursor.byte()
            answers += frame
        else:
            last = cursor.read(cursor.byte())
            answers += last
    return bytes(answers)
