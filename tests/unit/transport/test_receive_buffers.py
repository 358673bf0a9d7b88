import gc
import threading

import numpy as np
import pytest

from dray.payload import pack, unpack
from dray.transport.receive_buffers import MIN_POOLED_BYTES, ReceiveBuffers

MIB = 1 << 20


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


@pytest.mark.parametrize("nbytes", [0, 1, MIN_POOLED_BYTES - 1, MIN_POOLED_BYTES, MIB, MIB + 1, 3 * MIB])
def test_memory_has_exactly_the_size_asked_for_and_can_be_written(nbytes: int) -> None:
    memory = ReceiveBuffers().allocate(nbytes)
    assert memory.shape == (nbytes,)
    assert memory.dtype == np.uint8
    assert memory.flags.writeable
    memory[:] = 7


def test_memory_is_reused_once_its_array_is_gone() -> None:
    buffers = ReceiveBuffers()
    first = buffers.allocate(MIB)
    where = address(first)
    del first
    assert buffers.free_bytes == MIB
    again = buffers.allocate(MIB - 5)
    assert address(again) == where
    assert buffers.free_bytes == 0


def test_memory_is_not_reused_while_a_view_of_the_payload_exists() -> None:
    buffers = ReceiveBuffers()
    image = pack({"a": np.arange(MIB, dtype=np.uint8), "b": np.ones(3)})
    memory = buffers.allocate(len(image))
    memory[:] = np.frombuffer(image, np.uint8)
    view = unpack(memory)["a"][10:20]
    del memory
    gc.collect()
    other = buffers.allocate(len(image))
    other[:] = 0
    assert view.tolist() == list(range(10, 20))


def test_memory_is_not_reused_while_a_transport_may_write_into_it() -> None:
    buffers = ReceiveBuffers()
    memory = buffers.allocate(MIB)
    where = address(memory)
    held_by_a_request = memory.data
    del memory
    assert buffers.free_bytes == 0
    assert address(buffers.allocate(MIB)) != where
    held_by_a_request.release()
    del held_by_a_request
    assert buffers.free_bytes == 2 * MIB


def test_free_memory_is_bounded() -> None:
    buffers = ReceiveBuffers(max_free_bytes=3 * MIB)
    taken = [buffers.allocate(MIB) for _ in range(5)]
    taken.clear()
    assert buffers.free_bytes == 3 * MIB


def test_threads_never_share_memory() -> None:
    buffers = ReceiveBuffers()
    wrong = []

    def work(number: int) -> None:
        for _ in range(200):
            memory = buffers.allocate(MIN_POOLED_BYTES)
            memory[:] = number
            if (memory != number).any():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong


def test_memory_that_is_too_large_to_be_kept_is_not_rounded_up() -> None:
    memory = ReceiveBuffers(max_free_bytes=2 * MIB).allocate(3 * MIB + 1)
    assert memoryview(memory.base).nbytes == 3 * MIB + 1
