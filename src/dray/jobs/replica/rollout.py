"""A rollout replica: takes work items, runs the user's worker with the newest weights, publishes trajectories.

The user's code runs in the main thread. For a worker whose `rollout` is an async function it is an event loop, in
which several work items are in flight; then dray's own waits run in two threads beside it: one asks the controller
for work items and Redis for weights, the other hands payloads on.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import faulthandler
import logging
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dray.clock import MONOTONIC
from dray.jobs.api import RolloutWorker, WorkItem
from dray.jobs.config import RolloutTable
from dray.jobs.exit_codes import ExitCode
from dray.jobs.messages import models
from dray.jobs.messages.models import FailedAttempt, Role
from dray.jobs.process import StopFlag, closed_by_step, exit_at_once, leave, shutdown_step
from dray.jobs.replica.base import Replica, Unreported, run_replica, stop_code
from dray.jobs.replica.entry_points import WorkItemRows, load_entry_point
from dray.jobs.replica.heartbeat import Activity, EndBounds, Heartbeat, Member
from dray.jobs.replica.transfer import TrajectoryPublisher, WeightsSubscriber, rollout_ends
from dray.jobs.replica.user_code import (
    RolloutPayload,
    UserCodeError,
    UserValueError,
    await_user,
    call_name,
    call_user,
    carried,
    is_async,
    make_user_object,
    returned_payloads,
)
from dray.text import printable

_LOG = logging.getLogger("dray.jobs.replica.rollout")
_SLICE = 0.5
"""Seconds after which the controller, Redis and the stop flag are checked again."""

_REMEMBERED = 100
"""Different errors of rollouts after which each one counts as known."""

_T = TypeVar("_T")

_COUNTERS = (
    "payloads", "bytes", "rollouts", "rollout_seconds", "reclaimed", "abandoned", "weight_payloads",
    "weights_in_place", "weight_deltas", "weight_bytes", "weight_received_bytes", "weight_stale",
)  # fmt: skip
"""What a replica counts, which is shown also before it happens."""


def work(replica: Replica) -> ExitCode:
    """Everything between registering and unregistering."""
    config, stop, activity = replica.spec.config, replica.stop, replica.activity
    activity.counters.add_all(dict.fromkeys(_COUNTERS, 0))
    activity.doing("importing the worker")
    folder = replica.spec.job_file.parent
    worker: RolloutWorker = make_user_object(load_entry_point("rollout.worker", config.worker, folder))
    args = dict(config.rollout.args)
    if config.work.replay is not None:
        recording = folder / Path(config.work.replay).expanduser()
        args = {"recording": str(recording), "payloads_per_work_item": config.payloads_of_work_item}
    call_user(worker, "setup", replica.context(args))
    with ExitStack() as opened:
        rows = opened.enter_context(WorkItemRows(config.work, folder, config.job.seed))
        ends = rollout_ends(replica)
        publisher, weights = opened.enter_context(
            closed_by_step(ends, "stop serving payloads", "transfers in flight", replica.bounds.close)
        )
        source = WorkSource(
            rows,
            replica.member,
            replica.heartbeat,
            activity,
            replica.unreported,
            max_attempts=config.rollout.max_attempts,
        )

        def end_hung(error: UserCodeError) -> None:
            stop.set(str(error), error.exit_code)
            drain(replica, publisher)
            replica.leave_at_once(error)
            exit_at_once(error.exit_code)

        loop = (AsyncRollouts if is_async(worker, "rollout") else SyncRollouts)(
            worker,
            config.rollout,
            source,
            publisher,
            weights,
            stop=stop,
            activity=activity,
            bounds=replica.bounds,
            end_hung=end_hung,
        )
        stop.disposable = False
        try:
            loop.run()
        except UserCodeError as error:
            stop.set(str(error), error.exit_code)
            drain(replica, publisher)
            raise
        drain(replica, publisher)
    return stop_code(stop, ExitCode.OK)


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


# --- work items --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Assignment:
    """A work item that the replica was given; `attempt` is which attempt at it this is, from 1."""

    item: WorkItem
    attempt: int


class WorkSource:
    """Asks the controller for work items, and reports the ends of those before. Thread-safe.

    Args:
        rows: what each work item gets of the data set.
        unreported: takes what is reported with the next request, or when the replica leaves.
    """

    def __init__(
        self,
        rows: WorkItemRows,
        member: Member,
        heartbeat: Heartbeat,
        activity: Activity,
        unreported: Unreported,
        *,
        max_attempts: int,
    ) -> None:
        self._rows = rows
        self._member = member
        self._heartbeat = heartbeat
        self._activity = activity
        self._unreported = unreported
        self._max_attempts = max_attempts
        self._lock = threading.Lock()
        self._errors: set[str] = set()

    def request(self, want: int, wait: float, working: Collection[int] = ()) -> list[Assignment]:
        """Up to `want` work items, waiting at most `wait` seconds for one; sets the stop flag at the job's end.

        Args:
            working: the work items that the replica still works on.

        Raises:
            ControlPlaneError: the controller does not answer, or refuses.
            ConfigError: a row is not there any more.
        """
        unreported = self._unreported
        with self._lock:
            published = unreported.published[: models.MAX_REPORTED]
            failed = unreported.failed[: models.MAX_FAILED]
        answer = self._member.post(
            "/work-items",
            models.TakeWork,
            models.WorkList,
            want=want,
            wait=wait,
            published=published,
            failed=failed,
            working=sorted(working),
        )
        with self._lock:
            del unreported.published[: len(published)], unreported.failed[: len(failed)]
        self._heartbeat.follow(answer)
        return [
            Assignment(WorkItem(index, seed, self._rows.row(index)), attempt)
            for (index, seed), attempt in zip(answer.work_items, answer.attempts, strict=True)
        ]

    def published(self, assignment: Assignment) -> None:
        """All payloads of the work item were handed on."""
        with self._lock:
            self._unreported.published.append(assignment.item.index)

    def failed(self, assignment: Assignment, error: UserCodeError) -> None:
        """The rollout has failed. A new error is a warning on the terminal, and its traceback is logged."""
        index, attempt = assignment.item.index, assignment.attempt
        text = printable(str(error), models.MAX_ERROR)
        with self._lock:
            self._unreported.failed.append(FailedAttempt(index=index, attempt=attempt, error=text))
            new = text not in self._errors and len(self._errors) < _REMEMBERED
            if new:
                self._errors.add(text)
        line = f"{text}; work item {index} has failed (attempt {attempt} of {self._max_attempts})"
        if new:
            self._activity.warn(line)
            _LOG.warning("the traceback of this error", exc_info=error.__cause__)
        else:
            _LOG.warning("%s", line)


# --- rollouts ----------------------------------------------------------------------------------------------------


class Rollouts(abc.ABC):
    """What the loops of plain and of asynchronous workers have in common.

    Args:
        config: the table of the job file.
        bounds: of the waits when the replica is to end.
        end_hung: ends the process with the error of a plain `rollout` that takes too long.
    """

    def __init__(
        self,
        worker: RolloutWorker,
        config: RolloutTable,
        source: WorkSource,
        publisher: TrajectoryPublisher,
        weights: WeightsSubscriber,
        *,
        stop: StopFlag,
        activity: Activity,
        bounds: EndBounds,
        end_hung: Callable[[UserCodeError], None],
    ) -> None:
        self._worker = worker
        self._config = config
        self._source = source
        self._publisher = publisher
        self._weights = weights
        self._stop = stop
        self._activity = activity
        self._bounds = bounds
        self._end_hung = end_hung
        self._version = 0

    @abc.abstractmethod
    def run(self) -> None:
        """Work until the replica must stop. A plain rollout at hand is ended, asynchronous ones are cancelled.

        Raises:
            UserCodeError: another method than `rollout` raised, a method returned what cannot be used, or a
                rollout did not end when it was cancelled.
        """

    def _payloads(self, assignment: Assignment, found: object, version: int, began: float) -> list[RolloutPayload]:
        """What `rollout` has returned, which began at the time `began` with weights of `version`."""
        expected = self._config.payloads_per_work_item
        times = (began, MONOTONIC.now())
        payloads = returned_payloads(self._worker, found, expected, assignment.item.index, version, times)
        self._activity.counters.add_all({"rollouts": 1, "rollout_seconds": MONOTONIC.now() - began})
        return payloads

    def _timed_out(self, assignment: Assignment) -> UserCodeError:
        took = (
            f"took longer than rollout.timeout = {self._config.timeout:g} s for work item {assignment.item.index}"
        )
        return UserCodeError(f"{call_name(self._worker, 'rollout')} {took}")


class SyncRollouts(Rollouts):
    """The loop of a worker whose `rollout` is a plain function: one work item at a time."""

    def run(self) -> None:
        self._activity.waits("the first weights", "the policy")
        while not self._stop.is_set and not self._load_weights(_SLICE):
            pass
        while not self._stop.is_set:
            self._activity.waits("work items", "the policy")
            assignments = self._source.request(self._config.work_item_batch, _SLICE)
            if not assignments:
                self._publisher.refresh()
            for assignment in assignments:
                self._load_weights(0.0)
                if self._stop.is_set:
                    return
                self._attempt(assignment)

    def _attempt(self, assignment: Assignment) -> None:
        self._activity.doing("generating")
        began = MONOTONIC.now()
        try:
            with self._limited(assignment):
                found = call_user(self._worker, "rollout", assignment.item)
            payloads = self._payloads(assignment, found, self._version, began)
        except UserValueError:
            raise
        except UserCodeError as error:
            self._source.failed(assignment, error)
            return
        self._activity.waits("room to hand on a trajectory", "the policy")
        for payload in payloads:
            with carried(self._worker, "rollout"):
                handed_on = self._publisher.put(payload)
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
                error = self._timed_out(assignment)
                _LOG.error("%s; the stacks follow", error)
                faulthandler.dump_traceback(all_threads=True)
                self._source.failed(assignment, error)
                self._end_hung(error)

        timer = threading.Timer(self._config.timeout, expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            if not decided.acquire(blocking=False):
                timer.join(self._bounds.shutdown)  # it ends the process

    def _load_weights(self, timeout: float) -> bool:
        """Take over newer weights, waiting for them at most `timeout` seconds; returns whether there were any."""
        newest = self._weights.newer(timeout)
        if newest is None:
            return False
        version, arrays = newest
        call_user(self._worker, "load_weights", arrays, version)
        self._version = version
        self._activity.show("weight_version", version)
        return True


class HungRolloutError(UserCodeError):
    """A rollout did not end when it was cancelled: its place in the replica is not free again."""


class AsyncRollouts(Rollouts):
    """The loop of an asynchronous worker: up to `rollout.concurrency` tasks, each works on one work item."""

    def run(self) -> None:
        self._rollouts: dict[asyncio.Task[None], int] = {}
        self._generating = 0
        self._shows_generating = False
        self._control = ThreadPoolExecutor(1, "control")
        self._handing_on = ThreadPoolExecutor(1, "handing-on")
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(self._run_until_stopped())
        finally:
            loop.close()
            for threads in (self._control, self._handing_on):
                threads.shutdown(cancel_futures=True)  # their calls end once the stop flag is set

    async def _run_until_stopped(self) -> None:
        loop = asyncio.get_running_loop()
        stopped, self._ended = asyncio.Event(), asyncio.Event()

        def stop() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(stopped.set)

        self._stop.on_set(stop)
        stopping, giving_out = loop.create_task(stopped.wait()), loop.create_task(self._give_out())
        try:
            await asyncio.wait({stopping, giving_out}, return_when=asyncio.FIRST_COMPLETED)
            if giving_out.done():
                giving_out.result()
        except UserCodeError as error:
            self._stop.set(str(error), error.exit_code)
            raise
        except BaseException:
            self._stop.set("the replica ends on an error")
            raise
        finally:
            await self._cancel_all()

    async def _cancel_all(self) -> None:
        """Cancel every task of the loop, those of the user's code among them."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if not tasks:
            return
        bound = self._bounds.answer
        _, left = await asyncio.wait(tasks, timeout=bound)
        if left:
            _LOG.warning("%d tasks were still running %g s after they were cancelled", len(left), bound)

    async def _give_out(self) -> None:
        self._activity.waits("the first weights", "the policy")
        while not self._stop.is_set and not await self._load_weights(_SLICE):
            pass
        self._show()
        while not self._stop.is_set:
            free = self._config.concurrency - len(self._rollouts)
            assignments: list[Assignment] = []
            if free:
                assignments = await self._request(min(free, self._config.work_item_batch))
                if not assignments:
                    await self._in_thread(self._handing_on, self._publisher.refresh)
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_SLICE):
                        await self._ended.wait()
            self._ended.clear()
            # Before new rollouts begin: a work item may be given out because these weights were published.
            await self._load_weights(0.0)
            self._raise_failures()
            if self._stop.is_set:
                return
            for assignment in assignments:
                task = asyncio.get_running_loop().create_task(self._attempt(assignment))
                self._rollouts[task] = assignment.item.index
                task.add_done_callback(lambda _: self._ended.set())

    async def _request(self, want: int) -> list[Assignment]:
        working = list(self._rollouts.values())
        return await self._in_thread(self._control, lambda: self._source.request(want, _SLICE, working))

    def _raise_failures(self) -> None:
        """Forget the rollouts that have ended; what ends the replica is raised."""
        for task in [each for each in self._rollouts if each.done()]:
            del self._rollouts[task]
            if not task.cancelled():
                task.result()

    async def _attempt(self, assignment: Assignment) -> None:
        version, began = self._version, MONOTONIC.now()
        self._generating += 1
        self._show()
        try:
            found = await self._bounded(assignment)
            payloads = self._payloads(assignment, found, version, began)
        except (UserValueError, HungRolloutError):
            raise
        except UserCodeError as error:
            self._source.failed(assignment, error)
            return
        finally:
            self._generating -= 1
            self._show()
        for payload in payloads:
            if not await self._hand_on(payload):
                return
        self._source.published(assignment)

    async def _hand_on(self, payload: RolloutPayload) -> bool:
        with carried(self._worker, "rollout"):
            return await self._in_thread(self._handing_on, lambda: self._publisher.put(payload))

    async def _bounded(self, assignment: Assignment) -> object:
        """What `rollout` returns.

        Raises:
            UserCodeError: it raised, or took longer than `rollout.timeout`.
            HungRolloutError: it took longer, and does not end although it was cancelled.
        """
        timeout = self._config.timeout
        if timeout is None:
            return await await_user(self._worker, "rollout", assignment.item)
        call = asyncio.get_running_loop().create_task(await_user(self._worker, "rollout", assignment.item))
        if await self._ends_within(call, timeout):
            return call.result()
        call.cancel()
        error, grace = self._timed_out(assignment), self._bounds.leave
        if not await self._ends_within(call, grace):
            self._source.failed(assignment, error)
            raise HungRolloutError(f"{error}, and did not end within {grace:g} s after it was cancelled")
        if not call.cancelled():
            call.exception()  # whatever it is: the attempt has ended
        raise error

    async def _ends_within(self, call: asyncio.Task[object], timeout: float) -> bool:
        try:
            return bool((await asyncio.wait({call}, timeout=timeout))[0])
        except asyncio.CancelledError:
            call.cancel()
            raise

    async def _load_weights(self, timeout: float) -> bool:
        """As that of `SyncRollouts`, while rollouts are in flight."""
        newest = await self._in_thread(self._control, lambda: self._weights.newer(timeout))
        if newest is None:
            return False
        version, arrays = newest
        await await_user(self._worker, "load_weights", arrays, version)
        self._version = version
        self._activity.show("weight_version", version)
        return True

    def _show(self) -> None:
        """Show what the replica does, if that has changed."""
        generates = self._generating > 0
        if generates and not self._shows_generating:
            self._activity.doing("generating")
        elif not generates and any(not task.done() for task in self._rollouts):
            self._activity.waits("room to hand on a trajectory", "the policy")
        elif not generates:
            self._activity.waits("work items", "the policy")
        self._shows_generating = generates

    async def _in_thread(self, threads: ThreadPoolExecutor, call: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(threads, call)


def main() -> int:
    """``python -m dray.jobs.replica.rollout SPEC INDEX``"""
    return run_replica(Role.ROLLOUT, work)


if __name__ == "__main__":
    leave(main())
