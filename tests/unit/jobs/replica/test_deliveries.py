"""What the policy group does with the payloads that it is given: without a replica, a Redis and a job."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
from prefetch_fixtures import ManualClock

from dray.jobs.job_file import parse_job
from dray.jobs.messages.models import PayloadPart, UnfinishedWork
from dray.jobs.queue import CommitOutcome, Delivery, OldEpochError, QueueStatistics, RolloutEntry
from dray.jobs.replica.checkpoint import CheckpointState
from dray.jobs.replica.delivery import Deliveries, PayloadState


def entry(sequence: int, work_item: int | None = None, version: int = 0) -> RolloutEntry:
    return RolloutEntry(
        "0f" * 16, sequence, version, "rollout-0", sequence if work_item is None else work_item, payload=b"x"
    )


class MemoryQueue:
    """A queue in memory, which ends deliveries as Redis does."""

    oldest_held = None

    def __init__(self) -> None:
        self.waiting: list[RolloutEntry] = []
        self.others: list[RolloutEntry] = []
        self.dead: list[RolloutEntry] = []
        self.ended: list[tuple[str, int]] = []
        self.refused: set[int] = set()
        self.counters: dict[str, int] = {}
        self.epoch = 0
        self.newest_epoch = 0

    def attach(self, timeout: float | None) -> bool:
        return True

    def begin_epoch(self, after: int, timeout: float | None) -> int:
        self.epoch = self.newest_epoch = max(self.newest_epoch, after) + 1
        return self.epoch

    def check_epoch(self, timeout: float | None) -> None:
        if self.epoch != self.newest_epoch:
            raise OldEpochError("another epoch of the group has begun")

    def receive(self, count: int, timeout: float | None) -> list[Delivery]:
        given, self.waiting = self.waiting[:count], self.waiting[count:]
        return [Delivery(each, 1, f"{each.sequence}-0") for each in given]

    def claim_others(self, timeout: float | None) -> list[Delivery]:
        found, self.others = self.others, []
        return [Delivery(each, 2, f"{each.sequence}-0") for each in found]

    def commit(self, deliveries: Iterable[Delivery], timeout: float | None) -> CommitOutcome:
        self.check_epoch(timeout)
        ended = tuple(each for each in deliveries if each.entry.sequence not in self.refused)
        refused = tuple(each for each in deliveries if each.entry.sequence in self.refused)
        self.ended += [("trained", each.entry.sequence) for each in ended]
        return CommitOutcome(ended, (), refused)

    def commit_trained(
        self, identities: Collection[str], timeout: float | None, *, counter: Literal["trained", "repeated"]
    ) -> list[RolloutEntry]:
        self.ended += [(counter, int(each.rpartition(":")[2])) for each in identities]
        return [entry(int(each.rpartition(":")[2])) for each in identities]

    def discard(
        self, deliveries: Iterable[Delivery], timeout: float | None, *, counter: Literal["discarded", "too_old"]
    ) -> CommitOutcome:
        found = tuple(deliveries)
        self.ended += [(counter, each.entry.sequence) for each in found]
        return CommitOutcome(found, (), ())

    def take_dead_letters(self) -> list[RolloutEntry]:
        dead, self.dead = self.dead, []
        return dead

    def drop_trimmed(self, timeout: float | None, *, held: bool = False) -> int:
        return 0

    def listed_work_items(self, timeout: float | None) -> list[int]:
        return [each.work_item for each in self.waiting]

    def raise_counters(self, values: Mapping[str, int], timeout: float | None) -> None:
        self.counters |= values

    def statistics(self, timeout: float | None) -> QueueStatistics:
        return QueueStatistics(len(self.waiting), 0, None, dict(self.counters))


class Controller:
    """Keeps what was reported."""

    def __init__(self, known: UnfinishedWork) -> None:
        self.known = known
        self.reported: list[int] = []

    def unfinished(self) -> UnfinishedWork:
        return self.known

    given_up = 0

    def finished(self, work_items: Iterable[int]) -> None:
        self.reported += work_items

    def finished_payloads(self, payloads: Iterable[PayloadPart]) -> None:
        self.reported += [index for index, _, _ in payloads]


class QueuedDeliveries:
    """`Deliveries` over a queue in memory, and what it has done."""

    def __init__(
        self, folder: Path, *, state: CheckpointState | None = None, known: Any = None, **policy: Any
    ) -> None:
        self.queue = MemoryQueue()
        self.freed: list[int] = []
        self.counted: dict[str, int] = {}
        self.clock = ManualClock()
        self.controller = Controller(known or UnfinishedWork(unfinished=[], published=[], next=0))
        tables = {
            "job": {"name": "small", "max_steps": 9},
            "rollout": {"worker": "job.py:Worker", "slots": 512},
            "policy": {"trainer": "job.py:Trainer", "batch_size": 2, **policy},
            "controller": {"dead_after": 20.0},
        }
        self.deliveries = Deliveries(
            self.queue,
            lambda entries: self.freed.extend(each.sequence for each in entries),
            self.controller,
            parse_job(tables),
            state or CheckpointState(0, 0, 0),
            recorded=0,
            epoch_file=folder / "epoch.json",
            count=self.count,
            ending=lambda: False,
            clock=self.clock,
        )

    def count(self, name: str, count: int) -> None:
        self.counted[name] = self.counted.get(name, 0) + count

    def step(self, count: int, version: int = 0) -> list[Delivery]:
        """One step on what can be received at once."""
        received = self.deliveries.receive(count, version, 0.0)
        self.deliveries.read(received)
        self.deliveries.begin(received)
        self.deliveries.trained(received)
        self.deliveries.finished(received)
        return received


def sequences(deliveries: Iterable[Delivery]) -> list[int]:
    return [each.entry.sequence for each in deliveries]


def test_payload_is_committed_after_its_step_and_then_freed_and_finished(tmp_path: Path) -> None:
    group = QueuedDeliveries(tmp_path)
    group.deliveries.open()
    group.queue.waiting = [entry(0), entry(1)]
    assert sequences(group.step(2)) == [0, 1]
    assert group.queue.ended == [("trained", 0), ("trained", 1)]
    assert group.freed == group.controller.reported == [0, 1]
    assert (group.deliveries.contributed, group.deliveries.committed) == (2, 2)
    assert len(group.deliveries.payloads.within(PayloadState.COMMITTED)) == 2
    group.deliveries.freed({entry(1).id})
    assert sequences(group.deliveries.payloads.within(PayloadState.COMMITTED)) == [1]


def test_commit_that_waits_for_the_checkpoint_is_in_it_until_then(tmp_path: Path) -> None:
    group = QueuedDeliveries(tmp_path, ack="checkpoint")
    group.deliveries.open()
    group.queue.waiting = [entry(0), entry(1)]
    group.step(2)
    assert (group.queue.ended, group.freed) == ([], [])
    assert group.deliveries.unconfirmed == (entry(0).identity, entry(1).identity)
    group.deliveries.commit()
    assert group.freed == [0, 1]
    assert group.deliveries.unconfirmed == ()


def test_what_a_checkpoint_has_is_committed_first_and_not_received_again(tmp_path: Path) -> None:
    state = CheckpointState(1, 1, 4, contributed=2, unconfirmed=(entry(3).identity,), unfreed=(entry(2).identity,))
    group = QueuedDeliveries(tmp_path, state=state)
    group.queue.others = [entry(5)]
    group.deliveries.open()
    assert group.queue.ended == [("trained", 3), ("repeated", 2)]
    assert group.freed == [3, 2]
    assert sequences(group.deliveries.receive(2, 1, 0.0)) == [5]


def test_payload_that_another_consumer_has_is_left_to_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    group = QueuedDeliveries(tmp_path)
    group.deliveries.open()
    group.queue.waiting, group.queue.refused = [entry(0), entry(1)], {1}
    group.step(2)
    assert group.freed == [0]
    assert "is another consumer's" in caplog.text
    assert group.deliveries.payloads.within(PayloadState.TRAINED) == []


def test_lost_too_old_and_dead_payloads_are_counted_freed_and_finished(tmp_path: Path) -> None:
    group = QueuedDeliveries(tmp_path, max_staleness=1, staleness="drop")
    group.deliveries.open()
    group.queue.waiting = [entry(0, version=5), entry(1, version=3), entry(2, version=5)]
    group.queue.dead = [entry(9)]
    received = group.deliveries.receive(3, 5, 0.0)
    assert sequences(received) == [0, 2]
    group.deliveries.read(received)
    group.deliveries.lost(received[1:])
    assert group.counted == {"dead_letters": 1, "too_old": 1, "discarded": 1}
    assert sorted(group.freed) == sorted(group.controller.reported) == [1, 2, 9]
    assert group.queue.ended == [("too_old", 1), ("discarded", 2)]


def test_epoch_that_was_replaced_commits_nothing(tmp_path: Path) -> None:
    group = QueuedDeliveries(tmp_path)
    group.deliveries.open()
    group.queue.waiting = [entry(0)]
    received = group.deliveries.receive(1, 0, 0.0)
    group.deliveries.read(received)
    group.deliveries.begin(received)
    group.queue.newest_epoch += 1
    with pytest.raises(OldEpochError):
        group.deliveries.trained(received)
    assert group.deliveries.unconfirmed == (entry(0).identity,)
    assert group.freed == []


def test_payloads_of_the_next_step_are_due_while_a_step_is_under_way(tmp_path: Path) -> None:
    group = QueuedDeliveries(tmp_path, max_staleness=1)
    group.deliveries.open()
    group.queue.waiting = [entry(1), entry(0), entry(3), entry(2), entry(4, version=1)]
    first = group.deliveries.receive(2, 0, 0.0)
    assert sequences(first) == [0, 1]
    group.deliveries.read(first)
    assert group.deliveries.receive(2, 0, 0.0) == [], "what comes later than the batch at hand is not due"
    group.deliveries.begin(first)
    second = group.deliveries.receive(2, 1, 0.0)
    assert sequences(second) == [2, 3]
    group.deliveries.read(second)
    group.deliveries.trained(first)
    group.deliveries.finished(first)
    group.deliveries.begin(second)
    assert sequences(group.deliveries.receive(2, 2, 0.0)) == [4]


def test_payload_that_does_not_come_is_given_up_after_a_while(tmp_path: Path) -> None:
    group = QueuedDeliveries(tmp_path, max_staleness=0)
    group.deliveries.open()
    group.queue.waiting = [entry(4), entry(5), entry(6)]
    assert group.deliveries.receive(2, 0, 0.0) == []
    assert group.deliveries.receive(2, 0, 0.0) == []
    group.clock.time += 41.0
    assert sequences(group.deliveries.receive(2, 0, 0.0)) == [4, 5]


def test_work_items_whose_payloads_are_gone_are_finished_at_the_beginning(tmp_path: Path) -> None:
    group = QueuedDeliveries(tmp_path, known=UnfinishedWork(unfinished=[1, 2, 3], published=[1, 2], next=4))
    group.queue.waiting = [entry(2)]
    group.deliveries.open()
    assert group.controller.reported == [1]


def test_epoch_and_commits_are_kept_beside_the_queue(tmp_path: Path) -> None:
    first = QueuedDeliveries(tmp_path)
    first.deliveries.open()
    second = QueuedDeliveries(tmp_path)
    second.deliveries.open()
    assert (first.queue.epoch, second.queue.epoch) == (1, 2)
