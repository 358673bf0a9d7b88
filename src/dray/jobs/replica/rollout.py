"""A rollout replica: takes work items, runs the user's worker with the newest weights, publishes trajectories."""

from __future__ import annotations

import logging
from contextlib import ExitStack

from dray.clock import MONOTONIC
from dray.jobs.api import RolloutWorker, WorkItem
from dray.jobs.exit_codes import ExitCode
from dray.jobs.messages import models
from dray.jobs.messages.models import Role
from dray.jobs.process import ShutdownStep, closed_by_step, leave, shutdown_step
from dray.jobs.replica.base import Replica, run_replica, stop_code
from dray.jobs.replica.entry_points import load_entry_point
from dray.jobs.replica.transfer import TrajectoryPublisher, WeightsSubscriber
from dray.jobs.replica.transfer_choice import open_rollout_ends
from dray.jobs.replica.user_code import UserCodeError, call_user, carried, make_user_object, returned_arrays

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
        closing = ShutdownStep("stop serving payloads", "transfers in flight", replica.bounds.close)
        outlet, weights = closed_by_step(opened, open_rollout_ends(replica), closing)
        replica.stop.disposable = False
        try:
            _generate(replica, worker, outlet, weights)
        except UserCodeError as error:
            replica.stop.set(str(error), error.exit_code)
            _drain(replica, outlet)
            raise
        _drain(replica, outlet)
    return stop_code(replica.stop, ExitCode.OK)


def _generate(
    replica: Replica, worker: RolloutWorker, outlet: TrajectoryPublisher, weights: WeightsSubscriber
) -> None:
    activity, stop = replica.activity, replica.stop
    version = _load_weights(replica, worker, weights, None)
    while not stop.is_set:
        activity.waits("work_items", "the policy")
        answer = replica.client.post(
            "/work-items",
            models.TakeWork(
                name=replica.name,
                incarnation=replica.incarnation,
                want=replica.spec.config.rollout.work_item_batch,
                wait=_SLICE,
                published=replica.published,
            ),
            models.WorkList,
        )
        replica.published = []
        if answer.stop:
            replica.heartbeat.job_over.set()
            stop.set(f"the job is {answer.phase.value}")
        if not answer.work_items:
            outlet.refresh()
        for index, seed in answer.work_items:
            version = _load_weights(replica, worker, weights, version)
            if stop.is_set:
                return
            activity.doing("generating")
            began = MONOTONIC.now()
            found = call_user(worker, "rollout", WorkItem(index, seed))
            arrays = returned_arrays(worker, "rollout", found)
            activity.counters.add_all({"rollouts": 1, "rollout_seconds": MONOTONIC.now() - began})
            activity.waits("room to hand on a trajectory", "the policy")
            with carried(worker, "rollout"):
                handed_on = outlet.put(arrays, work_item=index, weight_version=version)
            if handed_on:
                replica.published.append(index)


def _load_weights(replica: Replica, worker: RolloutWorker, weights: WeightsSubscriber, version: int | None) -> int:
    """Take over newer weights; the first ones (`version` ``None``) are waited for. Returns the acting version."""
    newest = None
    if version is None:
        replica.activity.waits("the first weights", "the policy")
        while newest is None and not replica.stop.is_set:
            newest = weights.newer(_SLICE)
    else:
        newest = weights.newer(0.0)
    if newest is None:
        return version or 0
    call_user(worker, "load_weights", newest[1], newest[0])
    replica.activity.show("weight_version", newest[0])
    return newest[0]


def _drain(replica: Replica, outlet: TrajectoryPublisher) -> None:
    """While the job goes on, its policy still reads what this replica has published."""
    stop, bound = replica.stop, replica.bounds.leave
    _LOG.info("shutdown: took no more work items and finished the rollout at hand, which took %.2f s", stop.since)
    replica.activity.waits("the end of its payloads", "the policy")
    replica.heartbeat.watch_readers()
    with shutdown_step("serve payloads until they are consumed or nobody is left", "the policy", bound):
        left = outlet.drain(bound)
    if left:
        # When the job is over nobody wants them; before that, they are lost to it.
        level = logging.INFO if replica.heartbeat.job_over.is_set() else logging.WARNING
        _LOG.log(level, "%d payloads were not consumed before the end", left)
        replica.activity.counters.add("abandoned", left)


def main() -> int:
    """``python -m dray.jobs.replica.rollout SPEC INDEX``"""
    return run_replica(Role.ROLLOUT, work)


if __name__ == "__main__":
    leave(main())
