"""The work items of a rollout replica: where they come from, and what is reported of them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection
from dataclasses import dataclass

from dray.jobs.api import WorkItem
from dray.jobs.messages import models
from dray.jobs.messages.models import FailedAttempt
from dray.jobs.replica.base import Replica
from dray.jobs.replica.rows import WorkItemRows
from dray.jobs.replica.user_code import UserCodeError
from dray.resources import Closing
from dray.text import printable

_LOG = logging.getLogger("dray.jobs.replica.work_source")
_REMEMBERED = 100
"""Different errors of rollouts after which each one counts as known."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """A work item that the replica was given.

    Attributes:
        attempt: which attempt at it this is, from 1.
    """

    item: WorkItem
    attempt: int


class WorkSource(Closing):
    """Asks the controller for work items, and reports the ends of those before. Thread-safe."""

    def __init__(self, replica: Replica) -> None:
        config = replica.spec.config
        self._replica = replica
        self._rows = WorkItemRows(config.work, replica.spec.job_file.parent, config.job.seed)
        self._max_attempts = config.rollout.max_attempts
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
        replica = self._replica
        with self._lock:
            published = replica.published[: models.MAX_REPORTED]
            failed = replica.failed_attempts[: models.MAX_FAILED]
        answer = replica.client.post(
            "/work-items",
            models.TakeWork(
                name=replica.name,
                incarnation=replica.incarnation,
                want=want,
                wait=wait,
                published=published,
                failed=failed,
                working=sorted(working),
            ),
            models.WorkList,
        )
        with self._lock:
            del replica.published[: len(published)]
            del replica.failed_attempts[: len(failed)]
        if answer.stop:
            replica.heartbeat.job_over.set()
            replica.stop.set(f"the job is {answer.phase.value}")
        return [
            Assignment(WorkItem(index, seed, self._rows.row(index)), attempt)
            for (index, seed), attempt in zip(answer.work_items, answer.attempts, strict=True)
        ]

    def close(self) -> None:
        """Close the data set; twice is fine."""
        self._rows.close()

    def published(self, assignment: Assignment) -> None:
        """All payloads of the work item were handed on."""
        with self._lock:
            self._replica.published.append(assignment.item.index)

    def failed(self, assignment: Assignment, error: UserCodeError) -> None:
        """The rollout has failed. A new error is a warning on the terminal, and its traceback is logged."""
        index, attempt = assignment.item.index, assignment.attempt
        text = printable(str(error), models.MAX_ERROR)
        with self._lock:
            self._replica.failed_attempts.append(FailedAttempt(index=index, attempt=attempt, error=text))
            new = text not in self._errors and len(self._errors) < _REMEMBERED
            if new:
                self._errors.add(text)
        line = f"{text}; work item {index} has failed (attempt {attempt} of {self._max_attempts})"
        if new:
            self._replica.activity.warn(line)
            _LOG.warning("the traceback of this error", exc_info=error.__cause__)
        else:
            _LOG.warning("%s", line)
