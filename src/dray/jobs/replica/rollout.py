"""A rollout replica: takes work items, runs the user's worker with the newest weights, publishes trajectories."""

from __future__ import annotations

import faulthandler
import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from dray.clock import MONOTONIC
from dray.jobs.api import RolloutWorker
from dray.jobs.exit_codes import ExitCode
from dray.jobs.messages.models import Role
from dray.jobs.process import closed_by_step, exit_at_once, leave, shutdown_step
from dray.jobs.replica.async_rollouts import AsyncRollouts
from dray.jobs.replica.base import Replica, run_replica, stop_code
from dray.jobs.replica.entry_points import load_entry_point
from dray.jobs.replica.redis_transfer import redis_rollout_ends
from dray.jobs.replica.ring_transfer import ring_rollout_ends
from dray.jobs.replica.transfer import RolloutEnds, TrajectoryPublisher, WeightsSubscriber
from dray.jobs.replica.user_code import (
    UserCodeError,
    UserValueError,
    call_name,
    call_user,
    carried,
    is_async,
    make_user_object,
    returned_payloads,
)
from dray.jobs.replica.work import Assignment, WorkSource

_LOG = logging.getLogger("dray.jobs.replica.rollout")
_SLICE = 0.5


def work(replica: Replica) -> ExitCode:
    """Everything between registering and unregistering."""
    config = replica.spec.config.rollout
    replica.activity.doing("importing the worker")
    worker_class = load_entry_point("rollout.worker", config.worker, replica.spec.job_file.parent)
    worker: RolloutWorker = make_user_object(worker_class)
    call_user(worker, "setup", replica.context(dict(config.args)))
    with ExitStack() as opened:
        source = opened.enter_context(WorkSource(replica))
        publisher, weights = opened.enter_context(
            closed_by_step(_ends(replica), "stop serving payloads", "transfers in flight", replica.bounds.close)
        )
        replica.stop.disposable = False
        try:
            if is_async(worker, "rollout"):
                AsyncRollouts(replica, worker, source, publisher, weights).run()
            else:
                SyncRollouts(replica, worker, source, publisher, weights).run()
        except UserCodeError as error:
            replica.stop.set(str(error), error.exit_code)
            drain(replica, publisher)
            raise
        drain(replica, publisher)
    return stop_code(replica.stop, ExitCode.OK)


class SyncRollouts:
    """The loop of a worker whose `rollout` is a plain function: one work item at a time, in the main thread."""

    def __init__(
        self,
        replica: Replica,
        worker: RolloutWorker,
        source: WorkSource,
        publisher: TrajectoryPublisher,
        weights: WeightsSubscriber,
    ) -> None:
        self._replica = replica
        self._config = replica.spec.config.rollout
        self._worker = worker
        self._source = source
        self._publisher = publisher
        self._weights = weights
        self._version: int | None = None

    def run(self) -> None:
        """Until the replica must stop.

        Raises:
            UserCodeError: another method than `rollout` raised, or a method returned what cannot be used.
        """
        activity, stop = self._replica.activity, self._replica.stop
        self._load_weights()
        while not stop.is_set:
            activity.waits("work items", "the policy")
            assignments = self._source.request(self._config.work_item_batch, _SLICE)
            if not assignments:
                self._publisher.refresh()
            for assignment in assignments:
                self._load_weights()
                if stop.is_set:
                    return
                self._attempt(assignment)

    def _attempt(self, assignment: Assignment) -> None:
        activity = self._replica.activity
        activity.doing("generating")
        began = MONOTONIC.now()
        try:
            with self._limited(assignment):
                found = call_user(self._worker, "rollout", assignment.item)
            payloads = returned_payloads(self._worker, found, self._config.payloads_per_work_item)
        except UserValueError:
            raise
        except UserCodeError as error:
            self._source.failed(assignment, error)
            return
        activity.counters.add_all({"rollouts": 1, "rollout_seconds": MONOTONIC.now() - began})
        activity.waits("room to hand on a trajectory", "the policy")
        for part, payload in enumerate(payloads):
            with carried(self._worker, "rollout"):
                handed_on = self._publisher.put(
                    payload.arrays,
                    work_item=assignment.item.index,
                    weight_version=self._version or 0,
                    part=part,
                    parts=len(payloads),
                    metadata=payload.metadata,
                )
            if not handed_on:
                return
        self._source.published(assignment)

    @contextmanager
    def _limited(self, assignment: Assignment) -> Iterator[None]:
        """End the replica if the block takes longer than `rollout.timeout`: a thread cannot be interrupted."""
        if self._config.timeout is None:
            yield
            return
        decided = threading.Lock()

        def expire() -> None:
            if decided.acquire(blocking=False):
                self._end_hung(assignment)

        timer = threading.Timer(self._config.timeout, expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            if not decided.acquire(blocking=False):
                timer.join(self._replica.spec.config.timeouts.shutdown)  # it ends the process

    def _end_hung(self, assignment: Assignment) -> None:
        replica = self._replica
        what = (
            f"{call_name(self._worker, 'rollout')} took longer than rollout.timeout = {self._config.timeout:g} s"
        )
        error = UserCodeError(f"{what} for work item {assignment.item.index}")
        _LOG.error("%s; the stacks follow", error)
        faulthandler.dump_traceback(all_threads=True)
        self._source.failed(assignment, error)
        replica.stop.set(str(error), error.exit_code)
        drain(replica, self._publisher)
        replica.leave_at_once(error)
        exit_at_once(error.exit_code)

    def _load_weights(self) -> None:
        """Take over newer weights; the first ones are waited for."""
        newest = None
        if self._version is None:
            self._replica.activity.waits("the first weights", "the policy")
            while newest is None and not self._replica.stop.is_set:
                newest = self._weights.newer(_SLICE)
        else:
            newest = self._weights.newer(0.0)
        if newest is None:
            return
        call_user(self._worker, "load_weights", newest[1], newest[0])
        self._version = newest[0]
        self._replica.activity.show("weight_version", newest[0])


def _ends(replica: Replica) -> RolloutEnds:
    inline = replica.spec.config.job.transfer == "inline"
    return redis_rollout_ends(replica) if inline else ring_rollout_ends(replica)


def drain(replica: Replica, publisher: TrajectoryPublisher) -> None:
    """Before the job ends, its policy still reads what this replica has published."""
    stop, bound = replica.stop, replica.bounds.leave
    _LOG.info("shutdown: took no more work items; the rollouts at hand have ended after %.2f s", stop.since)
    replica.activity.waits("the end of its payloads", "the policy")
    replica.heartbeat.watch_readers()
    with shutdown_step("serve payloads until they are consumed or no policy replica is left", "the policy", bound):
        left = publisher.drain(bound)
    if left:
        # When the job has ended they are not needed; before that, they are lost to it.
        level = logging.INFO if replica.heartbeat.job_over.is_set() else logging.WARNING
        _LOG.log(level, "%d payloads were not consumed before the end", left)
        replica.activity.counters.add("abandoned", left)


def main() -> int:
    """``python -m dray.jobs.replica.rollout SPEC INDEX``"""
    return run_replica(Role.ROLLOUT, work)


if __name__ == "__main__":
    leave(main())
