"""Hostile servers in place of producers: the client raises a typed error in time, and keeps nothing."""

import contextlib
import json
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dray import PayloadClient, PayloadRef, SharedRingBuffer
from dray.clock import Deadline
from dray.errors import DrayError, PayloadTooLargeError, ProtocolError
from dray.protocol.frames import FRAME_BYTES, Flag, Frame, Kind, Status
from dray.protocol.handshake import CHALLENGE, HELLO, MAGIC, PROOF, WELCOME

PRODUCER = bytes(range(16))
LANES = ("shm", "tcp")
Behaviour = Callable[[socket.socket], None]


def challenge(
    slots: int = 4, slot_bytes: int = 4096, max_leases: int = 8, readers: int = 1, producer: bytes = PRODUCER
) -> bytes:
    return CHALLENGE.pack(
        MAGIC, 1, 0, 0, producer, bytes(32), bytes(32), slots, slot_bytes, max_leases, readers
    )  # fmt: skip


def valid(sock: socket.socket, descriptors: tuple[int, ...] = (), **ring: int) -> None:
    """Perform the handshake as a server of this ring."""
    sock.recv(HELLO.size, socket.MSG_WAITALL)
    sock.sendall(challenge(**ring))
    sock.recv(PROOF.size, socket.MSG_WAITALL)
    if descriptors:
        socket.send_fds(sock, [WELCOME.pack(MAGIC, 0, 0)], list(descriptors))
    else:
        sock.sendall(WELCOME.pack(MAGIC, 0, 0))


@contextlib.contextmanager
def listening(lane: str, behave: Behaviour) -> Iterator[PayloadRef]:
    """A reference to a server that runs `behave` with each connection, then closes it."""
    with contextlib.ExitStack() as stack:
        if lane == "shm":
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp"))
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            address = str(Path(folder) / "s")
            listener.bind(address)
            endpoint = f"unix:{address}"
        else:
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            endpoint = f"tcp:127.0.0.1:{listener.getsockname()[1]}"
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    sock.settimeout(10)
                    with sock, contextlib.suppress(OSError):
                        behave(sock)
                        sock.shutdown(socket.SHUT_WR)
                        while sock.recv(1 << 16):
                            pass

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield PayloadRef(PRODUCER, 0, 0, 5, (endpoint,))
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(
    "ring", [{"max_leases": 0}, {"slots": 0}, {"slot_bytes": 0}, {"readers": 0}, {"readers": 65}]
)
def test_a_server_whose_ring_cannot_be_is_a_protocol_error_at_once(lane: str, ring: dict[str, int]) -> None:
    """With no lease at a time, a batch would never end."""
    with listening(lane, lambda sock: valid(sock, **ring)) as ref, PayloadClient(lane=lane) as client:
        deadline = Deadline.after(20)
        with pytest.raises(ProtocolError):
            client.read_bytes(ref, timeout=20)
        (result,) = client.read_many([ref], timeout=20, return_errors=True)
        assert isinstance(result.error, ProtocolError)
        assert not deadline.expired


@pytest.mark.parametrize("nbytes", [2**46, 2**62, 2**63, 2**64 - 1])
def test_a_payload_that_no_memory_can_hold_is_refused_before_it_is_asked_for(nbytes: int) -> None:
    with listening("tcp", lambda sock: valid(sock, slot_bytes=2**64 - 1)) as ref:
        huge = PayloadRef(ref.producer, 0, 0, nbytes, ref.endpoints)
        with PayloadClient(lane="tcp") as client:
            with pytest.raises(PayloadTooLargeError, match=str(nbytes)):
                client.read_bytes(huge, timeout=20)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"[" * 65536, b"\xff", b"9" * 5000])
def test_statistics_that_are_no_json_object_are_a_protocol_error(lane: str, text: bytes) -> None:
    with SharedRingBuffer(4, 4096) as ring:

        def behave(sock: socket.socket) -> None:
            descriptors = (ring.segment.fileno(),) if lane == "shm" else ()
            valid(sock, descriptors, producer=ring.producer_id)  # type: ignore[arg-type]
            sock.recv(FRAME_BYTES, socket.MSG_WAITALL)
            sock.sendall(Frame(Kind.STATUS, Status.OK, flags=Flag.TEXT, nbytes=len(text)).pack() + text)

        with listening(lane, behave) as ref, PayloadClient(lane=lane) as client:
            right = PayloadRef(ring.producer_id, 0, 0, 5, ref.endpoints)
            with pytest.raises(ProtocolError, match="statistics must be"):
                client.stat(right, timeout=20)


@pytest.mark.parametrize("sent", ["nothing", "a pipe", "unsealed", "another ring", "empty", "three"])
def test_a_descriptor_that_is_not_the_segment_is_refused_and_closed(sent: str) -> None:
    with SharedRingBuffer(4, 4096) as other, contextlib.ExitStack() as stack:
        unsealed = os.memfd_create("dray-hostile")
        stack.callback(os.close, unsealed)
        if sent == "unsealed":
            os.pwrite(unsealed, os.pread(other.segment.fileno(), 8192, 0), 0)
        pipe = os.pipe()
        for end in pipe:
            stack.callback(os.close, end)
        descriptors = {
            "nothing": (),
            "a pipe": (pipe[0],),
            "unsealed": (unsealed,),
            "another ring": (other.segment.fileno(),),
            "empty": (unsealed,),
            "three": (pipe[0], pipe[1], unsealed),
        }[sent]
        with listening("shm", lambda sock: valid(sock, descriptors)) as ref:
            with PayloadClient(lane="shm") as client:
                for _ in range(3):
                    with pytest.raises(DrayError):
                        client.read_bytes(ref, timeout=20)


hostile_bytes = st.lists(
    st.binary(max_size=130)
    | st.sampled_from([challenge(), WELCOME.pack(MAGIC, 0, 0), challenge() + WELCOME.pack(MAGIC, 0, 0), b"hello"])
    | st.tuples(st.sampled_from(list(Status)), st.sampled_from([0, 2, 4]), st.sampled_from([0, 5, 70_000])).map(
        lambda t: Frame(Kind.STATUS, t[0], flags=t[1], nbytes=t[2]).pack()
    ),
    max_size=6,
).map(b"".join)


@pytest.mark.parametrize("lane", LANES)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(hostile_bytes)
def test_any_bytes_of_a_server_are_the_payload_or_a_typed_error(lane: str, sent: bytes) -> None:
    with listening(lane, lambda sock: sock.sendall(sent)) as ref, PayloadClient(lane=lane) as client:
        deadline = Deadline.after(20)
        with contextlib.suppress(DrayError):
            assert bytes(client.read_bytes(ref, timeout=20)) in sent
        for result in client.read_many_bytes([ref], timeout=20, return_errors=True):
            assert result.error is not None or bytes(result.payload) in sent
        with contextlib.suppress(DrayError):
            json.dumps(client.stat(ref, timeout=20))
        with contextlib.suppress(DrayError):
            client.consume([ref], timeout=20)
        assert not deadline.expired
