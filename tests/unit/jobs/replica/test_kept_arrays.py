"""Arrays that a trainer keeps beyond its step pin their slots: it is warned of that, with names and numbers."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from prefetch_fixtures import ManualClock

from dray.jobs.api import Trajectory
from dray.jobs.replica.ranks import KeptArrays
from dray.jobs.replica.ring_transfer import GroupSource
from dray.prefetch import BatchReader
from dray.ring import SharedRingBuffer
from dray.transport import PayloadClient, PayloadServer

LARGE = {"frames": np.zeros(1 << 16, np.float32), "rewards": np.ones(8, np.float32)}
SMALL = {"frames": np.zeros(8, np.float32)}


class Steps:
    """Training steps on payloads that come out of a ring as in a job."""

    def __init__(self, server: PayloadServer, source: GroupSource, reader: BatchReader) -> None:
        self.server = server
        self.source = source
        self.reader = reader
        self.clock = ManualClock()
        self.warnings: list[str] = []
        self.kept_arrays = KeptArrays(self.warnings.append, self.clock)
        self.work_items = 0

    def step(
        self,
        train_step: Callable[[Sequence[Trajectory]], object],
        arrays: dict[str, Any] = LARGE,
        *,
        payloads: int = 1,
        seconds: float = 60,
    ) -> None:
        """A step of `seconds` on new payloads, which are consumed after it."""
        references = [self.server.put(arrays, timeout=0) for _ in range(payloads)]
        trajectories = []
        for fetched in self.reader.fetch_all(references, timeout=10, consume=False):
            assert isinstance(fetched.outcome, dict), fetched.outcome
            trajectories.append(Trajectory(fetched.outcome, 0, self.work_items))
            self.work_items += 1
        del fetched
        self.kept_arrays.lend(trajectories)
        train_step(trajectories)
        trajectories.clear()
        self.clock.time += seconds
        self.kept_arrays.check()
        self.source.consume(references, timeout=10)


@pytest.fixture
def in_place() -> bool:
    return True


@pytest.fixture
def lane() -> str:
    return "shm"


@pytest.fixture
def steps(in_place: bool, lane: str) -> Iterator[Steps]:
    with SharedRingBuffer(16, 1 << 20) as ring, PayloadServer(ring, lane=lane) as server:
        source = GroupSource([PayloadClient(lane=lane)], in_place=in_place)
        with BatchReader(source, consume=False) as reader:
            made = Steps(server, source, reader)
            made.step(lambda trajectories: None)  # the first read opens the connection, and is a copy
            yield made


class Keeping:
    """A trainer that keeps what `chosen` returns of each trajectory."""

    def __init__(self, chosen: Callable[[Trajectory], object]) -> None:
        self.chosen = chosen
        self.kept: list[object] = []

    def train_step(self, trajectories: Sequence[Trajectory]) -> None:
        self.kept += [self.chosen(each) for each in trajectories]


def test_kept_arrays_are_named_with_their_payloads_and_what_to_do(steps: Steps) -> None:
    steps.step(Keeping(lambda each: each.arrays["frames"].copy()).train_step, payloads=2)
    assert steps.warnings == []
    trainer = Keeping(lambda each: each.arrays["frames"])
    steps.step(trainer.train_step, payloads=3)
    assert steps.warnings == [
        "the trainer keeps arrays 'frames' of 3 payloads (work items 3, 4, 5) after train_step: their slots stay "
        "leased, and rollout replicas wait when no slot is left; copy what is kept, or set policy.in_place = false"
    ]


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (lambda each: each, "arrays 'frames', 'rewards' of 1 payload (work item 1)"),
        (lambda each: each.arrays["frames"][3:], "views of arrays of 1 payload ("),
    ],
    ids=["trajectory", "view"],
)
def test_trajectory_or_view_that_is_kept_counts(
    steps: Steps, chosen: Callable[[Trajectory], object], words: str
) -> None:
    trainer = Keeping(chosen)
    steps.step(trainer.train_step)
    assert len(steps.warnings) == 1
    assert words in steps.warnings[0]


def test_next_warning_comes_when_twice_as_many_are_kept_and_none_after_their_end(steps: Steps) -> None:
    trainer = Keeping(lambda each: each.arrays["frames"])
    counts = []
    for _ in range(9):
        steps.step(trainer.train_step)
        counts.append(len(steps.warnings))
    assert counts == [1, 2, 2, 3, 3, 3, 3, 4, 4]
    trainer.kept.clear()
    steps.step(lambda trajectories: None)
    assert len(steps.warnings) == 4


def test_arrays_in_a_reference_cycle_are_collected_and_not_warned_of(steps: Steps) -> None:
    def train_step(trajectories: Sequence[Trajectory]) -> None:
        cycle: list[object] = [each.arrays["frames"] for each in trajectories]
        cycle.append(cycle)

    for _ in range(3):
        steps.step(train_step)
    # Collecting takes time: after a check that found nothing kept, the next one has to wait.
    kept = Keeping(lambda each: each.arrays["frames"])
    steps.step(kept.train_step, seconds=1)
    assert steps.warnings == []
    steps.clock.time += 10
    steps.kept_arrays.check()
    assert len(steps.warnings) == 1


@pytest.mark.parametrize(
    ("in_place", "lane", "arrays"), [(False, "shm", LARGE), (True, "tcp", LARGE), (True, "shm", SMALL)]
)
def test_copies_may_be_kept(steps: Steps, arrays: dict[str, Any]) -> None:
    trainer = Keeping(lambda each: each)
    steps.step(trainer.train_step, arrays)
    assert steps.warnings == []
