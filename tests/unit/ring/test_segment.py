import fcntl
import gc
import mmap
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from dray.errors import BufferClosedError, ConfigError, ProtocolError, SlotError
from dray.ring import Segment
from dray.ring.layout import SegmentLayout
from dray.ring.mapping import SEALS

PRODUCER = bytes(range(16))
LAYOUT = SegmentLayout(slots=4, slot_bytes=10_000)


def mappings_of(inode: int) -> int:
    return sum(line.split()[4] == str(inode) for line in Path("/proc/self/maps").read_text().splitlines())


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_reader_sees_what_the_creator_writes() -> None:
    with Segment.create(LAYOUT, PRODUCER) as segment, Segment.attach(segment.fileno()) as attached:
        assert (attached.layout, attached.producer_id, attached.nbytes) == (LAYOUT, PRODUCER, LAYOUT.nbytes)
        start = segment.slot_offset(3)
        segment.view[start : start + 5] = b"hello"
        assert attached.slot_offset(3) == start
        assert attached.view[start : start + 5] == b"hello"


def test_attached_memory_is_read_only() -> None:
    with Segment.create(LAYOUT, PRODUCER) as segment, Segment.attach(segment.fileno()) as attached:
        with pytest.raises(TypeError):
            attached.view[0] = 1
        assert not np.frombuffer(attached.view, np.uint8).flags.writeable
        with pytest.raises(PermissionError):
            mmap.mmap(segment.fileno(), LAYOUT.nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(PermissionError):
            os.pwrite(segment.fileno(), b"x", 0)


def test_segment_is_sealed_against_shrinking_and_growing() -> None:
    with Segment.create(LAYOUT, PRODUCER) as segment:
        assert fcntl.fcntl(segment.fileno(), fcntl.F_GET_SEALS) == SEALS
        for nbytes in (0, LAYOUT.nbytes * 2):
            with pytest.raises(PermissionError):
                os.ftruncate(segment.fileno(), nbytes)


def test_descriptor_is_not_inherited_over_exec() -> None:
    with Segment.create(LAYOUT, PRODUCER) as segment:
        assert not os.get_inheritable(segment.fileno())


def test_attach_keeps_no_descriptor_and_does_not_take_the_callers() -> None:
    with Segment.create(LAYOUT, PRODUCER) as segment:
        before = open_descriptors()
        with Segment.attach(segment.fileno()) as attached:
            assert open_descriptors() == before
            with pytest.raises(SlotError, match="only the creator"):
                attached.fileno()
        os.fstat(segment.fileno())


def test_close_unmaps_and_may_be_called_twice() -> None:
    segment = Segment.create(LAYOUT, PRODUCER)
    fd = segment.fileno()
    inode = os.fstat(fd).st_ino
    assert mappings_of(inode) == 1
    segment.close()
    segment.close()
    assert mappings_of(inode) == 0
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    with pytest.raises(BufferClosedError):
        segment.fileno()
    with pytest.raises(BufferClosedError):
        _ = segment.view
    assert "closed" in repr(segment)


def test_memory_outlives_close_until_the_last_array_on_it_is_gone() -> None:
    segment = Segment.create(LAYOUT, PRODUCER)
    inode = os.fstat(segment.fileno()).st_ino
    start = segment.slot_offset(1)
    segment.view[start : start + 3] = b"abc"
    array = np.frombuffer(segment.view[start : start + 3], np.uint8)
    tail = array[1:]
    segment.close()
    del array
    assert tail.tobytes() == b"bc"
    assert mappings_of(inode) == 1
    del tail
    assert mappings_of(inode) == 0


def test_memory_may_be_mapped_whenever_the_collector_unmaps_other_memory() -> None:
    with Segment.create(LAYOUT, PRODUCER) as segment:
        inode = os.fstat(segment.fileno()).st_ino
        before, threshold = mappings_of(inode), gc.get_threshold()
        kept = [Segment.attach(segment.fileno()) for _ in range(50)]
        try:
            for allocations in range(1, 100):
                cycle: list[object] = [Segment.attach(segment.fileno()).view]
                cycle.append(cycle)
                del cycle
                # The collector runs at this allocation of the call that follows, or before it.
                gc.set_threshold(allocations, 1, 1)
                Segment.attach(segment.fileno())
                gc.set_threshold(*threshold)
        finally:
            gc.set_threshold(*threshold)
        assert all(each.producer_id == PRODUCER for each in kept)
        del kept
        gc.collect()
        assert mappings_of(inode) == before


def test_foreign_descriptors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(LAYOUT.pack_segment_header(PRODUCER) + bytes(LAYOUT.nbytes))
    with path.open("rb") as file, pytest.raises(ProtocolError):
        Segment.attach(file.fileno())
    with pytest.raises(ProtocolError):
        Segment.attach(1 << 20)


@pytest.mark.parametrize("fault", ["unsealed", "size", "empty"])
def test_memfds_that_are_no_segments_are_refused(fault: str) -> None:
    fd = os.memfd_create("other", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        if fault != "empty":
            os.pwrite(fd, LAYOUT.pack_segment_header(PRODUCER), 0)
            os.ftruncate(fd, LAYOUT.nbytes - (4096 if fault == "size" else 0))
        if fault != "unsealed":
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        with pytest.raises(ProtocolError):
            Segment.attach(fd)
    finally:
        os.close(fd)


def test_too_much_memory_is_refused_by_name_and_leaves_nothing() -> None:
    before = open_descriptors()
    with pytest.raises(ConfigError, match="must fit into this machine's memory") as caught:
        Segment.create(SegmentLayout(slots=1 << 20, slot_bytes=1 << 42), PRODUCER)
    assert caught.value.key == "slots x slot_bytes"
    assert open_descriptors() == before


def test_prefault_reserves_all_pages_at_once() -> None:
    with Segment.create(LAYOUT, PRODUCER) as lazy, Segment.create(LAYOUT, PRODUCER, prefault=True) as reserved:
        assert os.fstat(reserved.fileno()).st_blocks * 512 == LAYOUT.nbytes
        assert os.fstat(lazy.fileno()).st_blocks * 512 < LAYOUT.nbytes
        assert Segment.attach(reserved.fileno()).producer_id == PRODUCER


def test_systems_without_memfd_get_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match=r"needs memfd_create of Linux") as caught:
        Segment.create(LAYOUT, PRODUCER)
    assert caught.value.value == "darwin"


def test_producer_id_has_sixteen_bytes() -> None:
    with pytest.raises(ConfigError, match="16 bytes"):
        Segment.create(LAYOUT, b"short")
