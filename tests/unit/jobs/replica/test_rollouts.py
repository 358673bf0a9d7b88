"""The loops of plain and of asynchronous workers, and where their work items come from, without a replica."""

import asyncio
import threading
from collections.abc import Collection, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dray.jobs.api import WorkItem
from dray.jobs.config import RolloutTable, WorkTable
from dray.jobs.messages import models
from dray.jobs.messages.controller_client import ControllerLostError
from dray.jobs.messages.models import Phase
from dray.jobs.process import StopFlag
from dray.jobs.replica.base import Unreported
from dray.jobs.replica.entry_points import WorkItemRows
from dray.jobs.replica.heartbeat import Activity, EndBounds, Heartbeat
from dray.jobs.replica.rollout import Assignment, AsyncRollouts, Rollouts, SyncRollouts, WorkSource
from dray.jobs.replica.user_code import RolloutPayload, UserCodeError, UserValueError

BOUNDS = EndBounds.of(2.0)


class Worker:
    """Returns the payloads in `results` of the work item, or raises them."""

    def __init__(self, results: dict[int, Any]) -> None:
        self.results = results
        self.weights: list[int] = []

    def load_weights(self, weights: Any, version: int) -> None:
        self.weights.append(version)

    def rollout(self, work_item: WorkItem) -> Any:
        found = self.results.get(work_item.index, {"x": np.array([work_item.index])})
        if isinstance(found, BaseException):
            raise found
        if isinstance(found, threading.Event):
            assert found.wait(10)
            return {"x": np.zeros(1)}
        return found


class AsyncWorker(Worker):
    async def rollout(self, work_item: WorkItem) -> Any:
        if isinstance(self.results.get(work_item.index), threading.Event):
            await asyncio.sleep(600)
        return super().rollout(work_item)


class Surroundings:
    """What a loop works with, in memory: it ends when all work items are given out and reported."""

    def __init__(self, count: int, refused: Collection[int] = ()) -> None:
        self.stop = StopFlag()
        self.activity = Activity()
        self.waiting = list(range(count))
        self.left = count
        self.refused = refused
        self.put_payloads: list[RolloutPayload] = []
        self.done: list[int] = []
        self.failures: dict[int, str] = {}
        self.hung: list[str] = []
        self.versions = [3]

    # as a WorkSource

    def request(self, want: int, wait: float, working: Collection[int] = ()) -> list[Assignment]:
        given, self.waiting = self.waiting[:want], self.waiting[want:]
        return [Assignment(WorkItem(index, index), 1) for index in given]

    def published(self, assignment: Assignment) -> None:
        self.done.append(assignment.item.index)
        self._end_one()

    def failed(self, assignment: Assignment, error: UserCodeError) -> None:
        self.failures[assignment.item.index] = str(error)
        self._end_one()

    def _end_one(self) -> None:
        self.left -= 1
        if not self.left:
            self.stop.set("all work items have ended")

    # as a TrajectoryPublisher and a WeightsSubscriber

    def put(self, payload: RolloutPayload) -> bool:
        if payload.work_item in self.refused:
            self.stop.set("the job ends")
            return False
        self.put_payloads.append(payload)
        return True

    def refresh(self) -> None:
        pass

    def newer(self, timeout: float) -> tuple[int, Any] | None:
        return (self.versions.pop(0), {"w": np.zeros(1)}) if self.versions else None

    def end_hung(self, error: UserCodeError) -> None:
        self.hung.append(str(error))

    def loop(self, worker: Worker, **config: Any) -> Rollouts:
        kind = AsyncRollouts if isinstance(worker, AsyncWorker) else SyncRollouts
        table = RolloutTable(worker="a.py:A", **config)
        return kind(
            worker,  # type: ignore[arg-type]
            table,
            self,  # type: ignore[arg-type]
            self,
            self,
            stop=self.stop,
            activity=self.activity,
            bounds=BOUNDS,
            end_hung=self.end_hung,
        )


BOTH = pytest.mark.parametrize("kind", [Worker, AsyncWorker], ids=["plain", "async"])


@BOTH
def test_every_payload_of_each_work_item_is_handed_on_with_its_place(kind: type[Worker]) -> None:
    around = Surroundings(3)
    worker = kind({1: [{"x": np.ones(1)}, {"x": np.ones(2)}]})
    around.loop(worker, work_item_batch=2).run()
    places = [(each.work_item, each.part, each.parts, each.weight_version) for each in around.put_payloads]
    assert sorted(places) == [(0, 0, 1, 3), (1, 0, 2, 3), (1, 1, 2, 3), (2, 0, 1, 3)]
    assert sorted(around.done) == [0, 1, 2]
    assert worker.weights == [3]
    report = around.activity.report()
    assert (report.counters["rollouts"], report.counters["weight_version"]) == (3, 3)


@BOTH
def test_rollout_that_raises_fails_alone(kind: type[Worker]) -> None:
    around = Surroundings(3)
    around.loop(kind({1: ValueError("the environment broke")})).run()
    assert sorted(around.done) == [0, 2]
    assert list(around.failures) == [1]
    assert "rollout() raised ValueError: the environment broke" in around.failures[1]


@BOTH
def test_value_that_cannot_be_used_ends_the_loop(kind: type[Worker]) -> None:
    around = Surroundings(2)
    with pytest.raises(UserValueError, match="returned a list whose item 0 is None"):
        around.loop(kind({0: [None]})).run()
    assert 0 not in around.done
    assert around.failures == {}


@BOTH
def test_work_item_that_was_not_handed_on_as_the_job_ends_is_not_reported(kind: type[Worker]) -> None:
    around = Surroundings(1, refused=[0])
    around.loop(kind({})).run()
    assert (around.done, around.failures, around.put_payloads) == ([], {}, [])


def test_plain_rollout_that_takes_too_long_ends_the_process() -> None:
    around, gate = Surroundings(1), threading.Event()
    ended = around.end_hung

    def end_hung(error: UserCodeError) -> None:
        ended(error)
        gate.set()  # in a job the process ends here

    around.end_hung = end_hung  # type: ignore[method-assign]
    around.loop(Worker({0: gate}), timeout=0.05).run()
    (reason,) = around.hung
    assert "rollout() of test_rollouts.py took longer than rollout.timeout = 0.05 s for work item 0" in reason
    assert around.failures == {0: reason}


def test_asynchronous_rollout_that_takes_too_long_is_cancelled_and_fails_alone() -> None:
    around = Surroundings(2)
    around.loop(AsyncWorker({0: threading.Event()}), timeout=0.05, concurrency=2).run()
    assert around.done == [1]
    assert "took longer than rollout.timeout = 0.05 s for work item 0" in around.failures[0]
    assert around.hung == []


# --- work items --------------------------------------------------------------------------------------------------


class Controller:
    """A `Member` whose controller gives one work item at a time, until it is `gone` or the job ends."""

    client = SimpleNamespace(refused=False)

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.gone = False
        self.over = False

    def post(self, path: str, body: Any, reply: Any, timeout: float | None = None, **fields: Any) -> Any:
        body(name="rollout-0", incarnation="a", **fields)
        if path != "/work-items":
            return reply(phase=Phase.RUNNING, stop=False)
        if self.gone:
            raise ControllerLostError("gone")
        self.asked.append(fields)
        phase = Phase.DRAINING if self.over else Phase.RUNNING
        return models.WorkList(phase=phase, stop=self.over, work_items=[(len(self.asked), 7)], attempts=[2])


@pytest.fixture
def controller() -> Controller:
    return Controller()


@pytest.fixture
def heartbeat(controller: Controller) -> Iterator[Heartbeat]:
    options: dict[str, Any] = {"interval": 600, "lost_after": 600, "bounds": BOUNDS}
    with Heartbeat(controller, Activity(), StopFlag(), **options) as made:  # type: ignore[arg-type]
        yield made


def source_of(controller: Controller, heartbeat: Heartbeat, activity: Activity, tmp_path: Any) -> WorkSource:
    rows = WorkItemRows(WorkTable(), tmp_path, 0)
    return WorkSource(rows, controller, heartbeat, activity, Unreported(), max_attempts=3)  # type: ignore[arg-type]


def test_ends_are_reported_with_the_next_request_that_is_answered(
    controller: Controller, heartbeat: Heartbeat, tmp_path: Any
) -> None:
    activity = Activity()
    source = source_of(controller, heartbeat, activity, tmp_path)
    (first,) = source.request(1, 0.1)
    assert (first.item.index, first.item.seed, first.attempt) == (1, 7, 2)
    source.published(first)
    for _ in range(2):  # only the first one is a warning
        source.failed(Assignment(WorkItem(5, 0), 2), UserCodeError("Worker.rollout() raised ValueError"))
    controller.gone = True
    with pytest.raises(ControllerLostError):
        source.request(1, 0.1)
    controller.gone = False
    source.request(1, 0.1, working=[9, 8])
    source.request(1, 0.1)
    published = [each["published"] for each in controller.asked]
    failed = [[each.index for each in asked["failed"]] for asked in controller.asked]
    assert (published, failed) == ([[], [1], []], [[], [5, 5], []])
    assert controller.asked[1]["working"] == [8, 9]
    assert activity.report().warnings == [
        "Worker.rollout() raised ValueError; work item 5 has failed (attempt 2 of 3)"
    ]


def test_end_of_the_job_that_comes_with_work_items_counts_from_then(
    controller: Controller, heartbeat: Heartbeat, tmp_path: Any
) -> None:
    controller.over = True
    source_of(controller, heartbeat, Activity(), tmp_path).request(1, 0.1)
    assert heartbeat.job_over.is_set()
    assert heartbeat.over_at is not None
