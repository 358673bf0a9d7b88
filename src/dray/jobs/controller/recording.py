"""The order to record a running job, from `dray record` to the first policy replica, and what that reports.

An order stands until its caller ends it, or has not sent it again for `ORDER_SECONDS`: a recording ends with a
command that was killed. The policy replica is handed the order until it reports that the recording has ended, also
after the order has: so the caller learns when everything is on the disk.
"""

from __future__ import annotations

from dray.clock import MONOTONIC, Clock, Deadline
from dray.jobs.config import JobConfig
from dray.jobs.controller.state import FIRST_POLICY, Membership
from dray.jobs.messages.models import (
    MemberState,
    RecordingOrder,
    RecordingRefusedError,
    RecordingReport,
    RecordingState,
)

ORDER_SECONDS = 10.0
"""After which an order ends that was not sent again."""

ANSWER_SECONDS = 1.0
"""For which the answer to an order is held back as long as its recording has not ended."""

_LAPSED = f"the command that records the job was silent for {ORDER_SECONDS:g} s"


class JobRecording:
    """The newest order to record the job. No I/O."""

    def __init__(self, config: JobConfig, membership: Membership, clock: Clock = MONOTONIC) -> None:
        self._config = config
        self._membership = membership
        self._clock = clock
        self._order: RecordingOrder | None = None
        self._report: RecordingReport | None = None
        self._deadline = Deadline.after(0.0, clock)
        self._lapsed = False

    def follow(self, order: RecordingOrder) -> None:
        """Begin a recording, or keep the one of this order going, or end it.

        Raises:
            RecordingRefusedError: the job cannot be recorded, or not now.
        """
        current = self.order()
        if self._order is None or self._order.id != order.id:
            self._check(order)
            self._order, self._report, self._lapsed = order, None, False
        elif current is not None and not current.end:
            self._order = current.model_copy(update={"end": order.end})
        self._deadline = Deadline.after(ORDER_SECONDS, self._clock)

    def note(self, report: RecordingReport) -> None:
        """The policy replica has reported this."""
        if self._order is not None and report.id == self._order.id:
            self._report = report

    def order(self) -> RecordingOrder | None:
        """What the policy replica is to follow now; None if nothing is to be recorded, and nothing is."""
        if self._order is None or (self._report is not None and self._report.ended):
            return None
        if not self._order.end and self._deadline.expired:
            self._lapsed = True
            self._order = self._order.model_copy(update={"end": True})
        first = None if self._report is None else self._report.first
        return self._order.model_copy(update={"first": first})

    def state(self) -> RecordingState:
        """How far the recording of the newest order is; there is one."""
        order, report = self.order(), self._report
        policy = self._membership.members.get(FIRST_POLICY)
        active = policy is not None and policy.state is MemberState.ACTIVE
        phase = self._membership.phase
        # Without a policy replica it continues only if one may come.
        ended = order is None or (not active and (order.end or not phase.gives_work))
        return RecordingState(
            phase=phase,
            doing=policy.progress.doing if policy is not None and active else "not running",
            began=report is not None and report.first is not None,
            payloads=0 if report is None else report.payloads,
            removed=0 if report is None else report.removed,
            ended=ended,
            confirmed=order is None,
            problem=_LAPSED if self._lapsed else "" if report is None else report.problem,
        )

    def line(self) -> str:
        """The newest recording in words, for people who watch the job; empty if there was no order to record."""
        if self._order is None:
            return ""
        state = self.state()
        written = "nothing yet" if not state.began else f"{state.payloads} payloads"
        if not state.ended:
            return f"into {self._order.folder}: {written}"
        why = f"; {state.problem}" if state.problem else ""
        return f"into {self._order.folder} has ended: {written if state.began else 'nothing'}{why}"

    def _check(self, order: RecordingOrder) -> None:
        policy, phase = self._config.policy, self._membership.phase
        if policy.record is not None:
            raise RecordingRefusedError(f"a job without policy.record, which is {policy.record!r}")
        if policy.replicas > 1:
            raise RecordingRefusedError(f"a job with policy.replicas = 1, not {policy.replicas}")
        if not phase.gives_work:
            raise RecordingRefusedError(f"a job that runs; this one is {phase.value}")
        if self._order is not None and not self.state().ended:
            raise RecordingRefusedError(
                f"a job that is not being recorded; this one is, into {self._order.folder}"
            )
