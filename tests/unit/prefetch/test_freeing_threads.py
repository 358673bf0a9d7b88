"""`FreeingThreads`: payloads are freed however long a producer takes to answer, and counted if they are not."""

import sys
import threading
from collections.abc import Callable, Iterable

from dray.clock import Deadline
from dray.counters import Counters
from dray.errors import BufferClosedError, ProducerLostError, TransportTimeout
from dray.prefetch.freeing import FreeingThreads
from dray.protocol import PayloadRef

STOPPED, ALIVE, GONE = (bytes([number]) * 16 for number in (1, 2, 3))


def references(producer: bytes, count: int) -> list[PayloadRef]:
    return [PayloadRef(producer, slot, slot, 10, ("tcp:127.0.0.1:1",)) for slot in range(count)]


class Producers:
    """A producer that does not answer until `woken` is set, one that answers, and one that is lost."""

    def __init__(self) -> None:
        self.woken = threading.Event()
        self.freed: list[tuple[bytes, int]] = []
        self.changed = threading.Condition()

    def consume(self, wanted: Iterable[PayloadRef], timeout: float) -> int:
        refs = list(wanted)
        if refs[0].producer == GONE:
            raise ProducerLostError("gone")
        if refs[0].producer == STOPPED and not self.woken.wait(min(timeout, 0.05)):
            raise TransportTimeout("no answer")
        with self.changed:
            self.freed += [(ref.producer, ref.sequence) for ref in refs]
            self.changed.notify_all()
        return len(refs)

    def wait_freed(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.freed) == count, 10)


def freeing_until_answered(consume: Callable[[Iterable[PayloadRef], float], int]) -> FreeingThreads:
    return FreeingThreads(consume, Counters(), max_attempts=sys.maxsize, pause=0.5)


def test_stopped_producer_delays_no_other_and_is_asked_until_it_answers() -> None:
    producers = Producers()
    with freeing_until_answered(producers.consume) as freeing:
        deadline = Deadline.after(10)
        freeing.add(references(STOPPED, 3))
        freeing.add(references(GONE, 2))
        for sequence in range(5):
            freeing.add(references(ALIVE, sequence + 1)[sequence:])
        producers.wait_freed(5)
        assert not deadline.expired
        assert len(freeing.waiting()) == 3
        producers.woken.set()
        producers.wait_freed(8)
        assert producers.freed[-3:] == [(STOPPED, 0), (STOPPED, 1), (STOPPED, 2)]
    assert freeing.waiting() == []
    assert freeing.unfreed == 0


def test_close_does_not_wait_for_a_request_under_way_which_ends_with_its_client() -> None:
    asked, client_closed = threading.Event(), threading.Event()

    def consume(wanted: Iterable[PayloadRef], timeout: float) -> int:
        asked.set()
        assert client_closed.wait(20)
        raise BufferClosedError("the client was closed while it waited")

    freeing = freeing_until_answered(consume)
    freeing.add(references(STOPPED, 3))
    assert asked.wait(10)
    freeing.close(timeout=0.01)
    assert len(freeing.waiting()) == 3
    assert freeing.workers.alive == 1
    client_closed.set()
    freeing.join()
    assert freeing.waiting() == []
    assert freeing.unfreed == 3


def test_close_asks_each_producer_once_more_and_counts_what_was_not_freed() -> None:
    producers = Producers()
    freeing = freeing_until_answered(producers.consume)
    freeing.add(references(STOPPED, 3))
    freeing.add(references(ALIVE, 2))
    freeing.close(timeout=1.0)
    freeing.close()
    assert len(producers.freed) == 2
    assert freeing.unfreed == 3


def test_error_of_another_kind_ends_the_thread_and_is_reported() -> None:
    def consume(wanted: Iterable[PayloadRef], timeout: float) -> int:
        raise MemoryError("no memory for the request")

    crashes: list[BaseException] = []
    freeing = FreeingThreads(consume, Counters(), on_crash=crashes.append)
    freeing.add(references(ALIVE, 2))
    freeing.close()
    assert [type(crash) for crash in crashes] == [MemoryError]
    assert freeing.unfreed == 2
