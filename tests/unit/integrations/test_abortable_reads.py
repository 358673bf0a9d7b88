import threading
from collections.abc import Iterator

import pytest
from waiting import wait_until

from dray.errors import BufferClosedError, ConnectionReset, StaleSlotError
from dray.integrations.abortable_reads import AbortableReads
from dray.integrations.store import PayloadStore


class StalledStore(PayloadStore):
    """A store of which every read waits until it is closed."""

    def __init__(self) -> None:
        super().__init__(capacity_bytes=1, slots=1)
        self.reads = threading.Semaphore(0)
        self._ended = threading.Event()

    def wait(self) -> int:
        self.reads.release()
        assert self._ended.wait(10)
        raise BufferClosedError("the store is closed")

    def close(self) -> None:
        self._ended.set()
        super().close()


@pytest.fixture
def stores() -> list[StalledStore]:
    return []


@pytest.fixture
def reads(stores: list[StalledStore]) -> Iterator[AbortableReads[int]]:
    def make() -> StalledStore:
        stores.append(StalledStore())
        return stores[-1]

    with AbortableReads[int](make) as made:
        yield made


def stalls_at_first(store: PayloadStore, timeout: float) -> int:
    assert isinstance(store, StalledStore)
    return store.wait()


def test_a_read_returns_what_the_store_gives() -> None:
    with PayloadStore(capacity_bytes=1 << 20) as source:
        token = source.put({"x": 7})
        with AbortableReads[int](lambda: PayloadStore(capacity_bytes=1)) as reads:
            found = reads.read(
                "object", lambda store, timeout: int(store.get([token], timeout=timeout)[0]["x"]), 10
            )
            assert found.run() == 7
            assert (reads.done, reads.aborted) == (1, 0)


def test_an_abort_ends_a_read_that_waits(reads: AbortableReads[int], stores: list[StalledStore]) -> None:
    future = reads.read("object", stalls_at_first, 10).start()
    wait_until(lambda: stores, "the read")
    assert stores[0].reads.acquire(timeout=10)
    reads.abort("object")
    with pytest.raises(ConnectionReset, match="the read of object was aborted"):
        future.result(10)
    assert (reads.done, reads.aborted) == (0, 1)


def test_other_reads_continue_with_another_store(reads: AbortableReads[int], stores: list[StalledStore]) -> None:
    def use(store: PayloadStore, timeout: float) -> int:
        return stalls_at_first(store, timeout) if store is stores[0] else 5

    aborted, other = (reads.read(key, use, 10).start() for key in ("aborted", "other"))
    wait_until(lambda: stores, "the reads")
    for _ in range(2):
        assert stores[0].reads.acquire(timeout=10)
    reads.abort("aborted")
    assert other.result(10) == 5
    assert isinstance(aborted.exception(10), ConnectionReset)
    assert len(stores) == 2


def test_one_of_two_reads_of_an_object_is_aborted_alone(
    reads: AbortableReads[int], stores: list[StalledStore]
) -> None:
    def use(store: PayloadStore, timeout: float) -> int:
        return stalls_at_first(store, timeout) if store is stores[0] else 5

    one, other = (reads.read("object", use, 10) for _ in range(2))
    futures = one.start(), other.start()
    wait_until(lambda: stores, "the reads")
    for _ in range(2):
        assert stores[0].reads.acquire(timeout=10)
    one.abort()
    assert isinstance(futures[0].exception(10), ConnectionReset)
    assert futures[1].result(10) == 5


def test_a_read_that_was_aborted_before_it_begins_does_not_begin(
    reads: AbortableReads[int], stores: list[StalledStore]
) -> None:
    read = reads.read("object", stalls_at_first, 10)
    read.abort()
    with pytest.raises(ConnectionReset):
        read.run()
    assert stores == []


def test_an_abort_of_what_has_ended_changes_nothing(reads: AbortableReads[int]) -> None:
    read = reads.read("object", lambda store, timeout: 3, 10)
    assert read.run() == 3
    read.abort()
    reads.abort("unknown")
    assert (reads.done, reads.aborted) == (1, 0)


def test_an_error_of_the_read_is_that_of_the_caller(reads: AbortableReads[int]) -> None:
    def use(store: PayloadStore, timeout: float) -> int:
        raise StaleSlotError("the payload is gone")

    with pytest.raises(StaleSlotError):
        reads.read("object", use, 10).run()
    assert (reads.done, reads.aborted) == (0, 0)


def test_close_ends_reads_and_allows_no_more(reads: AbortableReads[int], stores: list[StalledStore]) -> None:
    future = reads.read("object", stalls_at_first, 10).start()
    wait_until(lambda: stores, "the read")
    assert stores[0].reads.acquire(timeout=10)
    reads.close()
    reads.close()
    with pytest.raises(BufferClosedError):
        future.result(10)
    with pytest.raises(BufferClosedError):
        reads.read("object", stalls_at_first, 10).run()
