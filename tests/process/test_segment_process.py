"""Faults B9, B11 and B12: the creator of a ring is killed, or forks."""

import gc
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from forked_child import run_in_child

from dray.errors import BufferClosedError
from dray.ring import Segment, SharedRingBuffer, SlotState
from dray.ring.layout import SLOT_HEADER

CREATOR = """
    import socket, sys
    from dray.ring import SharedRingBuffer

    channel = socket.socket(fileno=int(sys.argv[1]))
    ring = SharedRingBuffer(3, 5000)
    with ring.claim(5000) as writer:
        writer.buffer[:] = b"x" * 5000
        writer.commit()
    unfinished = ring.claim(5000)
    unfinished.buffer[:] = b"y" * 5000
    socket.send_fds(channel, [ring.producer_id], [ring.segment.fileno()])
    channel.recv(1)
"""


def bytes_of(segment: Segment, slot: int, nbytes: int) -> memoryview:
    start = segment.slot_offset(slot)
    return segment.view[start : start + nbytes]


def users_of(inode: int, pid: int | str) -> list[str]:
    """Mappings and descriptors of process `pid` that keep the memfd with this inode alive."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    found = [line for line in maps if "memfd:dray" in line and line.split()[4] == str(inode)]
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            status = entry.stat()
        except FileNotFoundError:
            continue
        if status.st_ino == inode and "memfd:dray" in str(entry.readlink()):
            found.append(str(entry))
    return found


def test_b9_killed_creator_leaves_nothing_behind_and_readers_keep_their_bytes() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(CREATOR), str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )
        try:
            theirs.close()
            ours.settimeout(60)
            producer_id, (fd,), _, _ = socket.recv_fds(ours, 16, 1)
            inode = os.fstat(fd).st_ino
            assert users_of(inode, child.pid)
            segment = Segment.attach(fd)
            os.close(fd)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait(30)
    with segment:
        assert segment.producer_id == producer_id
        assert bytes_of(segment, 0, 5000) == b"x" * 5000
        # The write that was cut off never became READY (B11).
        header = SLOT_HEADER.unpack_from(segment.view, segment.layout.header_offset(1))
        assert header[0] == SlotState.WRITING
        assert len(users_of(inode, "self")) == 1
    assert users_of(inode, "self") == []
    assert not [path for path in Path("/dev/shm").iterdir() if "dray" in path.name]


def test_b12_every_method_raises_in_a_forked_child() -> None:
    with SharedRingBuffer(4, 100) as ring:
        with ring.claim(3) as writer:
            writer.buffer[:] = b"abc"
            writer.commit()
        lease = ring.read_raw(writer.slot, writer.sequence)
        unfinished = ring.claim(3)

        def check() -> None:
            assert ring.closed
            for call in (
                lambda: ring.claim(1),
                lambda: ring.read_raw(0, 0),
                lease.acknowledge,
                lease.release,
                lambda: ring.consume(0, 0),
                lambda: ring.checksum(0, 0, len),
                ring.inspect,
                lambda: ring.wait_consumed(0, 0),
                ring.get_ready_count,
                ring.ready,
                ring.statistics,
                ring.segment.fileno,
                lambda: ring.segment.view,
                lambda: lease.buffer,
                lambda: unfinished.buffer,
                unfinished.commit,
                unfinished.abort,
            ):
                with pytest.raises(BufferClosedError):
                    call()
            with pytest.raises(BufferClosedError, match="forked"):
                ring.get_ready_count()
            repr(ring), repr(lease), repr(unfinished), repr(ring.segment)
            ring.close()

        assert run_in_child(check) == ""
        assert lease.buffer == b"abc"
        unfinished.commit()
        assert lease.acknowledge()
        assert ring.get_ready_count() == 1


def test_b12_child_may_leave_with_blocks_that_it_was_forked_in() -> None:
    with SharedRingBuffer(2, 100) as ring, Segment.attach(ring.segment.fileno()) as attached:
        with ring.claim(3) as writer:

            def check() -> None:
                for resource in (writer, ring, attached):
                    resource.__exit__(None, None, None)

            assert run_in_child(check) == ""
            writer.buffer[:] = b"abc"
            writer.commit()
        assert bytes_of(attached, writer.slot, 3) == b"abc"


def test_b12_child_keeps_neither_memory_nor_descriptor() -> None:
    with SharedRingBuffer(2, 100) as ring, Segment.attach(ring.segment.fileno()) as attached:
        inode = os.fstat(ring.segment.fileno()).st_ino
        assert len(users_of(inode, "self")) == 3

        def check() -> None:
            assert users_of(inode, "self") == []
            assert attached.closed

        assert run_in_child(check) == ""
        assert len(users_of(inode, "self")) == 3


def test_b12_child_survives_the_collection_of_inherited_rings_and_makes_its_own() -> None:
    ring = SharedRingBuffer(2, 1 << 20)
    with ring.claim(100) as writer:
        writer.commit()
    view = ring.read_raw(writer.slot, writer.sequence).buffer
    held = [ring, view]
    closed = SharedRingBuffer(2, 1 << 20)
    view_of_closed = closed.claim(10).buffer
    closed.close()
    held.append(view_of_closed)

    def check() -> None:
        nonlocal ring, view, writer, view_of_closed
        # What the child maps now may lie where the segments were; collecting those must not unmap it.
        own = [bytearray(1 << 20) for _ in range(16)]
        with SharedRingBuffer(2, 1 << 20) as fresh:
            held.clear()
            ring = view = writer = view_of_closed = None  # type: ignore[assignment]
            gc.collect()
            for block in own:
                block[:] = b"z" * len(block)
            with fresh.claim(1 << 20) as mine:
                mine.buffer[:] = own[0]
                mine.commit()
            assert fresh.read_raw(mine.slot, mine.sequence).buffer == own[0]

    assert run_in_child(check) == ""
    ring.close()


def test_b12_fork_while_another_thread_is_inside_the_ring() -> None:
    """The other thread holds the ring's lock at the fork and is not there in the child to release it."""
    inside, leave = threading.Event(), threading.Event()

    class SlowClock:
        def now(self) -> float:
            if threading.current_thread() is thread:
                inside.set()
                leave.wait(30)
            return time.monotonic()

    with SharedRingBuffer(2, 100, clock=SlowClock()) as ring:
        writer = ring.claim(1)
        thread = threading.Thread(target=writer.commit)
        thread.start()
        try:
            assert inside.wait(30)

            def check() -> None:
                signal.alarm(20)
                with pytest.raises(BufferClosedError):
                    ring.claim(1)
                ring.close()

            problem = run_in_child(check)
        finally:
            leave.set()
            thread.join(30)
        assert problem == ""
        assert ring.get_ready_count() == 1


def test_b12_child_that_ends_its_interpreter_in_order_does_not_crash() -> None:
    script = """
        import os, sys
        from dray.ring import Segment, SharedRingBuffer
        ring = SharedRingBuffer(2, 1 << 20)
        attached = Segment.attach(ring.segment.fileno())
        writer = ring.claim(10)
        view = writer.buffer
        if os.fork() == 0:
            blocks = [bytearray(1 << 20) for _ in range(8)]
            sys.exit(0)
        _, status = os.wait()
        view[:] = b"0123456789"
        writer.commit()
        sys.exit(0 if status == 0 else 1)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
