"""What rollout and policy replicas have in common: how they start, stay in touch with the job, and end."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from dray.errors import ConfigError, ControlPlaneError, DrayError, OutputError
from dray.jobs.api import PolicyGroup, ReplicaContext
from dray.jobs.exit_codes import ExitCode
from dray.jobs.folder import JobSpec
from dray.jobs.messages import models
from dray.jobs.messages.channel import GroupLostError
from dray.jobs.messages.controller_client import ControllerClient, ControllerLostError
from dray.jobs.messages.models import MAX_SENTENCE, MembershipError, Role
from dray.jobs.process import (
    StopFlag,
    begin_process,
    closed_by_step,
    exit_at_once,
    finish_process,
    own_address,
    set_log_level,
    shutdown_step,
    stop_on_signals,
)
from dray.jobs.queue import JobKeys, OldEpochError, RedisAddress, RedisConnection, RedisUnavailableError
from dray.jobs.replica.heartbeat import Activity, EndBounds, Heartbeat, Member
from dray.jobs.replica.stages import StageLog, limit_of
from dray.jobs.replica.user_code import UserCodeError, described_error
from dray.streams.registry import SCOPE_VARIABLE
from dray.text import printable

_LOG = logging.getLogger("dray.jobs.replica.base")
UNREGISTER_BOUND = 2.0
_ANSWER_SHARE = 0.3
"""Of `timeouts.shutdown`: what a command may wait for a Redis that is stopped."""


@dataclass(slots=True)
class Unreported:
    """Work items that were handed on, and failed attempts, of which the controller does not know yet."""

    published: list[int] = field(default_factory=list)
    failed: list[models.FailedAttempt] = field(default_factory=list)


class Replica:
    """A replica's place in the job. As a context manager it registers, and unregisters last.

    Attributes:
        stop: set when the replica must end; every wait ends with it.
        activity: what the replica does, for the status page.
        stages: where the time of its payloads is written.
        bounds: of the waits of its end.
        leaving_reason: the reason that the controller gets when the replica leaves; by default why it was to stop.
        exit_code: with which it will end, as far as that is known.
        unreported: what the controller gets with the next request for work, or when the replica leaves.
    """

    def __init__(self, spec: JobSpec, role: Role, index: int, stop: StopFlag) -> None:
        self.spec = spec
        self.role = role
        self.index = index
        self.name = f"{role.value}-{index}"
        self.stop = stop
        self.activity = Activity()
        self.bounds = EndBounds.of(spec.config.timeouts.shutdown)
        self.leaving_reason = ""
        self.exit_code = ExitCode.OK
        self.unreported = Unreported()
        self._left = False
        self._resources = ExitStack()

    def __enter__(self) -> Replica:
        config = self.spec.config
        with self._resources as starting:
            client = starting.enter_context(
                ControllerClient.of_address_file(
                    self.spec.folder.controller_address,
                    self.spec.token,
                    config.timeouts.http,
                    hurried=self.bounds.answer,
                )
            )
            self.stop.on_set(client.hurry)
            self.member = Member(client, self.name)
            # The controller itself may be starting: it has the same time for that as every replica.
            self.member.post(
                "/register",
                models.Register,
                models.Directive,
                config.timeouts.start,
                role=self.role,
                pid=os.getpid(),
            )
            starting.callback(self._unregister)
            heartbeat = Heartbeat(
                self.member,
                self.activity,
                self.stop,
                interval=config.controller.heartbeat_interval,
                lost_after=config.timeouts.controller_lost,
                bounds=self.bounds,
            )
            self.heartbeat = starting.enter_context(
                closed_by_step(heartbeat, "send the last heartbeat", "the controller", 2 * self.bounds.answer)
            )
            self.redis = starting.enter_context(
                RedisConnection(
                    RedisAddress(self.spec.redis_url),
                    shutdown=self.stop.event,
                    answer_timeout=min(3.0, config.timeouts.shutdown * _ANSWER_SHARE),
                    patience=config.timeouts.redis,
                )
            )
            self.keys = JobKeys(self.spec.job_id)
            self.stages = starting.enter_context(
                StageLog(
                    self.spec.folder.trace,
                    self.name,
                    every=config.job.trace,
                    max_bytes=limit_of(config, self.role),
                    warn=self.activity.warn,
                )
            )
            # Streams of the user's classes: two jobs on one host do not meet.
            os.environ.setdefault(SCOPE_VARIABLE, f"dray job {self.spec.job_id}")
            self._resources = starting.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def context(self, args: dict[str, object], group: PolicyGroup | None = None) -> ReplicaContext:
        """What the user's class is given at `setup`; every rollout replica has another seed."""
        offset = 0 if self.role is Role.POLICY else 1 + self.index
        return ReplicaContext(
            args=args,
            seed=(self.spec.config.job.seed * 10_007 + offset) % 2**31,
            index=self.index,
            name=self.name,
            output=self.spec.folder.root,
            group=group or PolicyGroup(),
            address=own_address(),
        )

    def failed(self, error: BaseException) -> None:
        """`error` ends this replica: the controller gets it as the reason."""
        self.leaving_reason = reason_of(error)
        self.exit_code = exit_code_of(error, self.stop)

    def leave_at_once(self, error: BaseException) -> None:
        """Report to the controller that `error` ends this replica before others notice that it is gone.

        What they end with is a consequence then, and known to be one.
        """
        self.failed(error)
        self.heartbeat.close()
        self._unregister()

    def _unregister(self) -> None:
        if self._left or self.stop.exit_code in (ExitCode.CONTROLLER_LOST, ExitCode.NOT_A_MEMBER):
            return
        self._left = True
        try:
            with shutdown_step("unregister", "the controller", UNREGISTER_BOUND):
                self.member.post(
                    "/unregister",
                    models.Unregister,
                    models.Directive,
                    UNREGISTER_BOUND,
                    reason=printable(self.leaving_reason or self.stop.reason or "done", MAX_SENTENCE),
                    exit_code=self.exit_code,
                    published=self.unreported.published[: models.MAX_REPORTED],
                    failed=self.unreported.failed[: models.MAX_FAILED],
                )
        except ControlPlaneError as error:
            _LOG.warning("could not unregister: %s", error)


def run_replica(role: Role, work: Callable[[Replica], ExitCode]) -> ExitCode:
    """The main function of a replica's process: ``SPEC INDEX …`` on the command line, `work` in between."""
    index = int(sys.argv[2])
    begin_process(f"{role.value}-{index}")
    spec = JobSpec.read(Path(sys.argv[1]))
    set_log_level(spec.config.job.log_level)
    stop = StopFlag()

    def on_signal(number: signal.Signals) -> None:
        if stop.disposable:  # perhaps in the middle of a long import, which checks nothing
            exit_at_once(128 + number)
        stop.set(f"received {number.name}", ExitCode(128 + number))

    stop_on_signals(on_signal)
    try:
        with Replica(spec, role, index, stop) as replica:
            try:
                replica.exit_code = code = work(replica)
            except BaseException as error:
                replica.failed(error)
                raise
    except _EXPECTED as error:
        # The traceback of the user's class is what its user looks for.
        _LOG.error("%s", reason_of(error), exc_info=error.__cause__ if isinstance(error, UserCodeError) else None)
        return exit_code_of(error, stop)
    finally:
        finish_process()
    _LOG.info("ends with exit code %d (%s)", code, code.name)
    return code


_EXIT_CODES: dict[type[Exception], ExitCode] = {
    ConfigError: ExitCode.CONFIGURATION,
    MembershipError: ExitCode.NOT_A_MEMBER,
    ControllerLostError: ExitCode.CONTROLLER_LOST,
    RedisUnavailableError: ExitCode.REDIS_LOST,
    OldEpochError: ExitCode.OLD_EPOCH,
    GroupLostError: ExitCode.GROUP_LOST,
    OutputError: ExitCode.FAILED,
}
"""What a replica ends with by the error that ended it, beside the user's own; any other is an internal one."""

_EXPECTED: tuple[type[Exception], ...] = (UserCodeError, *_EXIT_CODES)

_WHATEVER_WAS_ASKED = frozenset((ExitCode.CONFIGURATION, ExitCode.OLD_EPOCH))
"""These are reported even if the replica was to stop for another reason."""


def exit_code_of(error: BaseException, stop: StopFlag) -> ExitCode:
    """The exit code of a replica that `error` ends."""
    if isinstance(error, UserCodeError):
        return error.exit_code
    found = next((code for kind, code in _EXIT_CODES.items() if isinstance(error, kind)), ExitCode.INTERNAL)
    return found if found in _WHATEVER_WAS_ASKED or found is ExitCode.INTERNAL else stop_code(stop, found)


def reason_of(error: BaseException) -> str:
    """Why a replica ends that `error` ends, in one line."""
    if isinstance(error, UserCodeError | DrayError):
        return printable(str(error), MAX_SENTENCE)
    return f"internal error: {described_error(error, None)}"


def stop_code(stop: StopFlag, otherwise: ExitCode) -> ExitCode:
    """The exit code that came with the request to stop, if there was one."""
    return ExitCode(stop.exit_code) if stop.exit_code is not None else otherwise
