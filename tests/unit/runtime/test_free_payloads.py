import threading
from collections.abc import Iterable

from dray.clock import Deadline
from dray.errors import BufferClosedError, ProducerLostError, TransportTimeout
from dray.protocol import PayloadRef
from dray.runtime.free_payloads import PayloadFreeing

STOPPED, ALIVE, GONE = (bytes([number]) * 16 for number in (1, 2, 3))


def references(producer: bytes, count: int) -> list[PayloadRef]:
    return [PayloadRef(producer, slot, slot, 10, ("tcp:127.0.0.1:1",)) for slot in range(count)]


class Producers:
    """One that does not answer until `woken` is set, one that does, and one that is gone."""

    def __init__(self) -> None:
        self.woken = threading.Event()
        self.freed: list[tuple[bytes, int]] = []
        self.changed = threading.Condition()

    def consume(self, wanted: Iterable[PayloadRef], timeout: float) -> None:
        refs = list(wanted)
        if refs[0].producer == GONE:
            raise ProducerLostError("gone")
        if refs[0].producer == STOPPED and not self.woken.wait(min(timeout, 0.05)):
            raise TransportTimeout("no answer")
        with self.changed:
            self.freed += [(ref.producer, ref.sequence) for ref in refs]
            self.changed.notify_all()

    def wait_freed(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.freed) == count, 10)


def test_producer_that_is_stopped_holds_nobody_up_and_is_asked_until_it_answers() -> None:
    producers = Producers()
    with PayloadFreeing(producers.consume, attempt=1.0) as freeing:
        began = Deadline.after(10)
        freeing.add(references(STOPPED, 3))
        freeing.add(references(GONE, 2))
        for sequence in range(5):
            freeing.add(references(ALIVE, sequence + 1)[sequence:])
        producers.wait_freed(5)
        assert not began.expired
        assert len(freeing) == 3
        producers.woken.set()
        producers.wait_freed(8)
        assert producers.freed[-3:] == [(STOPPED, 0), (STOPPED, 1), (STOPPED, 2)]
    assert len(freeing) == freeing.given_up == 0


def test_end_does_not_wait_for_a_request_under_way_which_ends_with_its_client() -> None:
    asked, client_closed = threading.Event(), threading.Event()

    def consume(wanted: Iterable[PayloadRef], timeout: float) -> None:
        asked.set()
        assert client_closed.wait(20)
        raise BufferClosedError("the client was closed while it waited")

    freeing = PayloadFreeing(consume, attempt=60.0)
    freeing.add(references(STOPPED, 3))
    assert asked.wait(10)
    freeing.close(timeout=0.01)
    assert len(freeing) == 3
    client_closed.set()
    freeing.join()
    assert freeing.given_up == freeing.unfreed == 3


def test_end_asks_each_producer_once_more_and_counts_what_was_not_freed() -> None:
    producers = Producers()
    freeing = PayloadFreeing(producers.consume, attempt=1.0)
    freeing.add(references(STOPPED, 3))
    freeing.add(references(ALIVE, 2))
    freeing.close(timeout=1.0)
    freeing.close()
    assert len(producers.freed) == 2
    assert len(freeing) + freeing.given_up == freeing.unfreed == 3
