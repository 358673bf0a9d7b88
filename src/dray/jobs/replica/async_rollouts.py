"""The loop of a worker whose `rollout` is an async function: several work items in flight in one event loop.

The user's code runs in the event loop of the main thread, and dray's own waits run in two threads beside it: one
asks the controller for work items and Redis for weights, the other hands payloads on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from dray.clock import MONOTONIC
from dray.jobs.api import RolloutWorker
from dray.jobs.replica.base import Replica
from dray.jobs.replica.transfer import Arrays, TrajectoryPublisher, WeightsSubscriber
from dray.jobs.replica.user_code import (
    ReturnedPayload,
    UserCodeError,
    UserValueError,
    await_user,
    call_name,
    carried,
    returned_payloads,
)
from dray.jobs.replica.work import Assignment, WorkSource

_LOG = logging.getLogger("dray.jobs.replica.async_rollouts")
_SLICE = 0.5
"""Seconds after which the controller, Redis and the stop flag are checked again."""

_T = TypeVar("_T")


class HungRolloutError(UserCodeError):
    """A rollout did not end when it was cancelled: its place in the replica is not free again."""


class AsyncRollouts:
    """Up to `rollout.concurrency` tasks, each of which works on one work item."""

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
        self._version = 0
        self._rollouts: dict[asyncio.Task[None], int] = {}
        self._generating = 0
        self._shows_generating = False
        self._control = ThreadPoolExecutor(1, "control")
        self._handing_on = ThreadPoolExecutor(1, "handing-on")

    def run(self) -> None:
        """Until the replica must stop; what is in flight then is cancelled.

        Raises:
            UserCodeError: another method than `rollout` raised, a method returned what cannot be used, or a
            rollout
                did not end when it was cancelled.
        """
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(self._run_until_stopped())
        finally:
            loop.close()
            for threads in (self._control, self._handing_on):
                threads.shutdown(cancel_futures=True)  # their calls end once the stop flag is set

    async def _run_until_stopped(self) -> None:
        loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self._ended = asyncio.Event()

        def stop() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._stopped.set)

        self._replica.stop.on_set(stop)
        stopped = loop.create_task(self._stopped.wait())
        giving_out = loop.create_task(self._give_out())
        try:
            await asyncio.wait({stopped, giving_out}, return_when=asyncio.FIRST_COMPLETED)
            if giving_out.done():
                giving_out.result()
        except UserCodeError as error:
            self._replica.stop.set(str(error), error.exit_code)
            raise
        except BaseException:
            self._replica.stop.set("the replica ends on an error")
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
        bound = self._replica.bounds.answer
        _, left = await asyncio.wait(tasks, timeout=bound)
        if left:
            _LOG.warning("%d tasks were still running %g s after they were cancelled", len(left), bound)

    async def _give_out(self) -> None:
        stop, concurrency = self._replica.stop, self._config.concurrency
        self._replica.activity.waits("the first weights", "the policy")
        while not stop.is_set and not await self._load_weights(_SLICE):
            pass
        self._show()
        while not stop.is_set:
            free = concurrency - len(self._rollouts)
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
            if stop.is_set:
                return
            for assignment in assignments:
                self._begin(assignment)

    async def _request(self, want: int) -> list[Assignment]:
        working = list(self._rollouts.values())
        return await self._in_thread(self._control, lambda: self._source.request(want, _SLICE, working))

    def _begin(self, assignment: Assignment) -> None:
        task = asyncio.get_running_loop().create_task(self._attempt(assignment))
        self._rollouts[task] = assignment.item.index
        task.add_done_callback(lambda _: self._ended.set())

    def _raise_failures(self) -> None:
        """Forget the rollouts that have ended; what ends the replica is raised."""
        for task in [each for each in self._rollouts if each.done()]:
            del self._rollouts[task]
            if not task.cancelled():
                task.result()

    async def _attempt(self, assignment: Assignment) -> None:
        activity, version = self._replica.activity, self._version
        began = MONOTONIC.now()
        self._generating += 1
        self._show()
        try:
            found = await self._bounded(assignment)
            payloads = returned_payloads(self._worker, found, self._config.payloads_per_work_item)
        except (UserValueError, HungRolloutError):
            raise
        except UserCodeError as error:
            self._source.failed(assignment, error)
            return
        finally:
            self._generating -= 1
            self._show()
        activity.counters.add_all({"rollouts": 1, "rollout_seconds": MONOTONIC.now() - began})
        for part, payload in enumerate(payloads):
            if not await self._hand_on(assignment, payload, version, (part, len(payloads))):
                return
        self._source.published(assignment)

    async def _hand_on(
        self, assignment: Assignment, payload: ReturnedPayload, version: int, place: tuple[int, int]
    ) -> bool:
        part, parts = place

        def put() -> bool:
            return self._publisher.put(
                payload.arrays,
                work_item=assignment.item.index,
                weight_version=version,
                part=part,
                parts=parts,
                metadata=payload.metadata,
            )

        with carried(self._worker, "rollout"):
            return await self._in_thread(self._handing_on, put)

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
        took = f"{call_name(self._worker, 'rollout')} took longer than rollout.timeout = {timeout:g} s"
        error = UserCodeError(f"{took} for work item {assignment.item.index}")
        grace = self._replica.bounds.leave
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
        """Take over newer weights, waiting for them at most `timeout` seconds; returns whether there were any."""
        newest: tuple[int, Arrays] | None = await self._in_thread(
            self._control, lambda: self._weights.newer(timeout)
        )
        if newest is None:
            return False
        version, arrays = newest
        await await_user(self._worker, "load_weights", arrays, version)
        self._version = version
        self._replica.activity.show("weight_version", version)
        return True

    def _show(self) -> None:
        """Show what the replica does, if that has changed."""
        activity, generates = self._replica.activity, self._generating > 0
        if generates and not self._shows_generating:
            activity.doing("generating")
        elif not generates and any(not task.done() for task in self._rollouts):
            activity.waits("room to hand on a trajectory", "the policy")
        elif not generates:
            activity.waits("work items", "the policy")
        self._shows_generating = generates

    async def _in_thread(self, threads: ThreadPoolExecutor, call: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(threads, call)
