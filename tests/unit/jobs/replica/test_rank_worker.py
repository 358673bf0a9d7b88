"""A rank that carries out the commands of the first one, with payloads in a ring, without a replica."""

import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dray.jobs.api import Trajectory
from dray.jobs.exit_codes import ExitCode
from dray.jobs.messages.channel import GroupLostError, MessageChannel
from dray.jobs.process import StopFlag
from dray.jobs.queue import Delivery
from dray.jobs.replica.heartbeat import Activity
from dray.jobs.replica.ranks import Batch, Ranks, RankWorker
from dray.jobs.replica.ring_transfer import GroupSource
from dray.jobs.replica.user_code import RolloutPayload, UserCodeError
from dray.prefetch import BatchReader
from dray.ring import SharedRingBuffer
from dray.transport import PayloadClient, PayloadServer


class Trainer:
    """Notes what it was asked to do, and keeps the trajectories themselves if it `keeps`."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.kept: list[Trajectory] = []
        self.keeps = False
        self.fails = threading.Event()
        self.fails.set()

    def train_step(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        if self.keeps:
            self.kept += trajectories
        self.calls.append([(each.work_item, int(each.arrays["x"][0]), each.metadata) for each in trajectories])
        return {}

    def weights(self) -> dict[str, Any]:
        self.calls.append("weights")
        return {}

    def save(self, folder: Path) -> None:
        self.calls.append(("save", folder.name))

    def load(self, folder: Path) -> None:
        self.calls.append(("load", folder.name))
        if folder.parent.name == "broken":
            assert self.fails.wait(10)
            raise ValueError("cannot load")


class SecondRank:
    """The first rank's end, and a rank in a thread."""

    def __init__(self, server: PayloadServer, reader: BatchReader) -> None:
        ends, stop = socket.socketpair(), StopFlag()
        self.server = server
        self.first = MessageChannel(ends[0], "policy-1", stop, 10.0)
        self.ranks = Ranks([self.first], readers=2)
        self.other = MessageChannel(ends[1], "policy-0", stop, 10.0)
        self.trainer = Trainer()
        self.activity = Activity()
        self.ended: list[object] = []
        self.worker = RankWorker(self.trainer, self.other, reader, self.activity, timeout=10.0)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.ended.append(self.worker.run())
        except (GroupLostError, UserCodeError) as error:
            self.ended.append(error)

    def put(self, number: int, size: int = 4) -> Delivery:
        reference = self.server.put({"x": np.full(size, number, np.float32)}, timeout=0)
        payload = RolloutPayload({}, number, 0, metadata=f'{{"number": {number}}}')
        entry = payload.entry(
            "rollout-0", reference.producer.hex(), reference.sequence, reference=reference.to_json()
        )
        return Delivery(entry, 1, f"{number}-0")

    def close(self) -> None:
        self.first.close()
        self.thread.join(10)
        self.other.close()


@pytest.fixture
def group() -> Iterator[SecondRank]:
    with SharedRingBuffer(16, 1 << 20) as ring, PayloadServer(ring, lane="shm") as server:
        source = GroupSource([PayloadClient(lane="shm")], in_place=True)
        with BatchReader(source, consume=False) as reader:
            made = SecondRank(server, reader)
            made.ranks.read([[made.put(0)]])  # the first read opens the connection, and is a copy
            assert made.ranks.failures() == {}
            try:
                yield made
            finally:
                made.close()


def train(group: SecondRank, deliveries: list[Delivery], ahead: list[Delivery]) -> None:
    batch = Batch(len(deliveries))
    batch.add(0, deliveries)
    group.ranks.read(batch.by_part())
    assert group.ranks.failures() == {}
    group.ranks.train(batch, [ahead])
    group.ranks.wait()


def test_rank_loads_trains_saves_and_ends_as_commanded(group: SecondRank, tmp_path: Path) -> None:
    group.ranks.begin(tmp_path)
    first, second = [group.put(0), group.put(1)], [group.put(2), group.put(3)]
    train(group, first, ahead=second)
    group.ranks.weights()
    train(group, second, ahead=[])
    group.ranks.save(tmp_path)
    group.ranks.wait()
    group.ranks.end()
    group.thread.join(10)
    assert group.ended == [ExitCode.OK]
    numbers = [[(number, number, {"number": number}) for number in pair] for pair in ((0, 1), (2, 3))]
    assert group.trainer.calls == [
        ("load", "trainer-1"),
        numbers[0],
        "weights",
        numbers[1],
        ("save", "trainer-1"),
    ]
    assert group.activity.report().counters["payloads_read"] == 4


def test_payload_that_is_gone_is_reported_and_not_trained_on(group: SecondRank) -> None:
    here, gone = group.put(0), group.put(1)
    group.server.ring.consume(gone.entry.id.slot, gone.entry.id.sequence)
    group.ranks.begin(None)
    group.ranks.read([[here, gone]])
    assert group.ranks.failures() == {gone.entry.identity: "stale"}


def test_trainer_of_a_rank_that_keeps_arrays_is_warned_of(group: SecondRank) -> None:
    group.trainer.keeps = True
    group.ranks.begin(None)
    train(group, [group.put(0, 1 << 16), group.put(1, 1 << 16)], ahead=[])
    (warning,) = group.activity.report().warnings
    assert warning.startswith("the trainer keeps arrays 'x' of 2 payloads (work items 0, 1) after train_step")
    group.trainer.kept.clear()


def test_error_of_the_trainer_ends_the_rank(group: SecondRank) -> None:
    group.ranks.begin(Path("broken"))
    group.thread.join(10)
    (error,) = group.ended
    assert isinstance(error, UserCodeError)
    assert "Trainer.load() raised ValueError: cannot load" in str(error)


def test_error_of_the_trainer_is_a_consequence_where_the_first_rank_is_gone(group: SecondRank) -> None:
    group.trainer.fails.clear()
    group.ranks.begin(Path("broken"))
    group.first.close()
    group.trainer.fails.set()
    group.thread.join(10)
    (error,) = group.ended
    assert isinstance(error, GroupLostError)
