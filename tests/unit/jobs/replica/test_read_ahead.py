"""The next batch is filled while a step is under way, in a thread of its own."""

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_deliveries import QueuedDeliveries, entry, sequences

from dray.errors import DrayError, OutOfResources, ProducerLostError, StaleSlotError
from dray.jobs.queue import Delivery
from dray.jobs.replica.delivery import PayloadState
from dray.jobs.replica.read_ahead import ReadAhead
from dray.payload import Arrays

Outcome = Arrays | DrayError


class Ahead:
    """A `ReadAhead` over a queue in memory. `outcomes` has what reading a payload comes to, by sequence number."""

    def __init__(
        self, folder: Path, *, parts: int = 1, outcomes: dict[int, DrayError] | None = None, **policy: Any
    ):
        self.group = QueuedDeliveries(folder, **policy)
        self.group.deliveries.open()
        self.stop = threading.Event()
        self.more = threading.Condition()
        self.outcomes = outcomes or {}
        receive = self.group.queue.receive

        def wait_and_receive(count: int, timeout: float | None) -> list[Delivery]:
            with self.more:
                self.more.wait_for(lambda: self.group.queue.waiting or self.stop.is_set(), timeout)
                return receive(count, timeout)

        self.group.queue.receive = wait_and_receive  # type: ignore[method-assign]
        self.reader = ReadAhead(
            self.group.deliveries,
            self.read,
            batch_size=2 * parts,
            parts=parts,
            version=0,
            count=self.group.count,
            ending=self.stop.is_set,
        )

    def read(self, deliveries: Sequence[Delivery]) -> Iterator[tuple[Delivery, Outcome]]:
        for each in deliveries:
            number = each.entry.sequence
            yield each, self.outcomes.get(number, {"x": np.array([number])})

    def put(self, *numbers: int, version: int = 0) -> None:
        with self.more:
            self.group.queue.waiting += [entry(number, version=version) for number in numbers]
            self.more.notify_all()

    def end(self) -> None:
        self.stop.set()
        with self.more:
            self.more.notify_all()
        self.reader.wake()


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Callable[..., Ahead]]:
    all_made: list[Ahead] = []

    def make(**options: Any) -> Ahead:
        all_made.append(Ahead(tmp_path, **options))
        return all_made[-1]

    yield make
    for each in all_made:
        each.end()
        each.reader.close()
        each.reader.close()


def wait(ahead: Ahead, on_slice: Callable[[], None] = lambda: None) -> Any:
    return ahead.reader.wait(lambda missing: None, on_slice)


def test_batch_is_whole_and_in_order(made: Callable[..., Ahead]) -> None:
    ahead = made()
    ahead.put(0)
    threading.Timer(0.05, ahead.put, [1, 2]).start()
    batch = wait(ahead)
    assert sequences(batch.deliveries) == [0, 1]
    assert [int(each.arrays["x"][0]) for each in batch.trajectories.values()] == [0, 1]
    assert batch.waited > 0


def test_next_batch_is_there_when_the_step_ends(made: Callable[..., Ahead]) -> None:
    ahead = made()
    ahead.put(0, 1, 2, 3)
    wait(ahead)
    ahead.reader.begin()
    # Nothing is put from here on, and no more than one batch is read ahead.
    ahead.put(4)
    following = wait(ahead)
    assert sequences(following.deliveries) == [2, 3]
    assert [sequences(part) for part in ahead.reader.known()] == [[2, 3]]
    ahead.reader.begin()
    assert set(sequences(ahead.group.deliveries.payloads.within(PayloadState.TRAINING))) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("error", "kind"),
    [(StaleSlotError("gone", slot=0, sequence=1), "stale"), (ProducerLostError("gone"), "lost")],
    ids=["stale", "lost"],
)
def test_payload_that_cannot_be_read_is_replaced_by_another(
    made: Callable[..., Ahead], error: DrayError, kind: str
) -> None:
    ahead = made(outcomes={1: error})
    ahead.put(0, 1, 2)
    assert sequences(wait(ahead).deliveries) == [0, 2]
    assert ahead.group.counted == {kind: 1, "discarded": 1}


def test_payload_that_another_rank_could_not_read_is_replaced(made: Callable[..., Ahead]) -> None:
    ahead = made(parts=2)
    ahead.put(0, 1, 2, 3, 4)
    batch = wait(ahead)
    assert [sequences(part) for part in batch.by_part()] == [[0, 1], [2, 3]]
    ahead.reader.drop({entry(3).identity: "lost"})
    assert [sequences(part) for part in wait(ahead).by_part()] == [[0, 1], [2, 4]]
    assert ahead.group.counted == {"lost": 1, "discarded": 1}


def test_error_of_the_thread_is_raised_where_the_batch_is_waited_for(made: Callable[..., Ahead]) -> None:
    ahead = made(outcomes={0: OutOfResources("no descriptor is left", 24, "EMFILE")})
    ahead.put(0, 1)
    with pytest.raises(OutOfResources):
        wait(ahead)
    with pytest.raises(OutOfResources):
        wait(ahead)


def test_wait_ends_when_the_replica_must(made: Callable[..., Ahead]) -> None:
    ahead = made()
    ahead.put(0)
    threading.Timer(0.05, ahead.end).start()
    assert wait(ahead) is None


def test_wait_without_progress_is_reported_now_and_then(made: Callable[..., Ahead]) -> None:
    ahead = made()
    slices: list[int] = []
    shown: list[int] = []

    def on_slice() -> None:
        slices.append(1)
        ahead.put(0, 1)

    ahead.reader.wait(shown.append, on_slice)
    assert (slices, shown[0]) == ([1], 2)


def test_staleness_is_that_of_the_step_that_uses_the_payload(made: Callable[..., Ahead]) -> None:
    ahead = made(max_staleness=0, staleness="drop")
    ahead.put(0, 1)
    wait(ahead)
    ahead.reader.begin()
    ahead.put(2, version=0)
    ahead.put(3, 4, version=1)
    assert sequences(wait(ahead).deliveries) == [3, 4]
    assert ahead.group.counted == {"too_old": 1}


def test_no_more_is_received_after_close(made: Callable[..., Ahead]) -> None:
    ahead = made()
    ahead.reader.close()
    ahead.put(0)
    assert sequences(ahead.group.queue.receive(1, 0.0)) == [0]
