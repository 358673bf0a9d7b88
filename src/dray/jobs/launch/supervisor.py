"""The supervisor of a job: starts its processes in order, watches them, and ends them in reverse order.

Everything happens in the main thread, which waits for children and signals at once and never polls.
"""

from __future__ import annotations

import logging
import secrets
import selectors
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol, TypeVar

from dray.clock import Deadline, Stopwatch
from dray.errors import ControlPlaneError
from dray.jobs.config import JobConfig
from dray.jobs.controller.listener import bind
from dray.jobs.controller.state import THE_JOB_HAS
from dray.jobs.exit_codes import USER_CODES, ExitCode
from dray.jobs.folder import JobSpec, short_path
from dray.jobs.launch.display import Display
from dray.jobs.launch.job_processes import Crew, Site
from dray.jobs.launch.output import attempt_folder, supervisor_log
from dray.jobs.launch.processes import Child, EndRequest, JobProcess, replica_end
from dray.jobs.launch.redis import job_redis
from dray.jobs.launch.report import write_report
from dray.jobs.launch.shutdown import (
    ROLLOUT_SHARE,
    Ending,
    KillStage,
    ShutdownEscalation,
    ending,
    finished_checkpoint,
    newest_status,
    reason_of,
    recorded_status,
)
from dray.jobs.messages import models
from dray.jobs.messages.controller_client import ControllerClient, ControllerLostError
from dray.jobs.messages.models import MemberState, Role
from dray.jobs.process import DUMP_SIGNAL, ShutdownStep, SignalInbox, adopt_orphans, child_pids, closed_by_step
from dray.jobs.queue import REDIS_STOP_BOUND
from dray.jobs.replica.checkpoint import CheckpointState
from dray.text import printable

# --- reports -----------------------------------------------------------------------------------------------------

Report = models.Died | models.Stop


class Controller(Protocol):
    """What reports are sent to; see `ControllerClient`."""

    def post(self, path: str, body: models.Message, reply: type[models.Directive]) -> models.Directive:
        """Send `body` and return the answer."""
        ...


class Reports:
    """The reports that wait. There is at most one of each kind about each replica: the newest."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._waiting: dict[tuple[str, str], Report] = {}

    def add(self, report: Report) -> None:
        """Have `report` sent after all others."""
        key = ("/died", report.name) if isinstance(report, models.Died) else ("/stop", "")
        self._waiting.pop(key, None)
        self._waiting[key] = report

    def send(self) -> models.Directive | None:
        """Send what waits; returns the answer to the last report, or None if there was none.

        Raises:
            ControllerLostError: no answer came in time; the report and all after it wait on.
            ControlPlaneError: the controller refused a report, which is dropped.
        """
        answer = None
        while self._waiting:
            key, report = next(iter(self._waiting.items()))
            try:
                answer = self._controller.post(key[0], report, models.Directive)
            except ControllerLostError:
                raise
            except ControlPlaneError:
                del self._waiting[key]
                raise
            del self._waiting[key]
        return answer

    def __len__(self) -> int:
        return len(self._waiting)


# --- supervisor --------------------------------------------------------------------------------------------------

STATUS_INTERVAL = 0.5
_LOG = logging.getLogger("dray.jobs.launch.supervisor")
_Answer = TypeVar("_Answer")


def supervise(
    config: JobConfig,
    job_file: Path,
    site: Site,
    state: CheckpointState | None,
    inbox: SignalInbox,
    display: Display,
) -> int:
    """Run a job to its end and return the exit code of `dray run`. Main thread of the main interpreter only.

    The user's classes have been checked.

    Args:
        state: of the checkpoint to go on from.
        inbox: signals that end the job.

    Raises:
        ConfigError: before anything was started.
    """
    if state is not None and state.outcome:
        display.say(f"{state.outcome} already, at step {state.step}: nothing is left to do in {site.folder.root}")
        return ExitCode.OK
    return Supervisor(config, job_file, site, state, inbox, display).run()


class Supervisor:
    """See the module."""

    def __init__(
        self,
        config: JobConfig,
        job_file: Path,
        site: Site,
        state: CheckpointState | None,
        inbox: SignalInbox,
        display: Display,
    ) -> None:
        self._config = config
        self._job_file = job_file
        self._site = site
        self._folder = site.folder
        self._elsewhere = site.elsewhere
        self._crew = Crew(config, site)
        self._state = state
        self._inbox = inbox
        self._display = display
        self._job_id = f"{config.job.name[:40]}-{secrets.token_hex(4)}"
        self._began = Stopwatch()
        self._signals: list[signal.Signals] = []
        self._teardowns: list[tuple[Callable[[], Sequence[JobProcess]], ShutdownEscalation]] = []
        self._asked = False
        self._end_began: Stopwatch | None = None
        self._status: models.Status | None = None
        self._answered = False
        self._controller_silent = True  # until it has answered for the first time
        self._silences = 0
        self._stalls = 0
        self._interrupted = False
        self._failure = ""
        self._unexpected: list[str] = []
        self._requests: dict[JobProcess, EndRequest] = {}
        self._asked_members: dict[tuple[str, int], str] = {}
        self._controller_request = ""

    def run(self) -> int:
        folder = self._folder
        strangers = child_pids()
        adopt_orphans()
        with selectors.DefaultSelector() as selector, ExitStack() as resources:
            self._selector = selector
            selector.register(self._inbox, selectors.EVENT_READ)
            listener = resources.enter_context(bind(self._site.host, self._config.controller.port))
            step = ShutdownStep("end the use of Redis", "its answer, or its end", REDIS_STOP_BOUND)
            place, host = folder.run / "redis", self._site.redis_host
            server = job_redis(self._config, self._job_id, place, host, self._say, self._unexpected.append)
            redis = closed_by_step(resources, server, step)
            attempt_folder(folder)
            if self._site.options is not None:
                self._site.options.write(folder.root)
            resources.enter_context(supervisor_log(folder.logs, self._config.job.log_level))
            self._crew.keep(frozenset(strangers | ({redis.pid} if redis.pid is not None else set())))
            resources.callback(self._crew.kill_orphans)
            spec = self._write_spec((redis.tcp_address or redis.address).url)
            # From here on there are processes; they end before anything above does.
            resources.callback(self._crew.kill_rest)
            resources.callback(self._elsewhere.close)
            self._crew.start_controller(listener, spec.token)
            self._heard = Stopwatch()
            client = resources.enter_context(
                ControllerClient.of_address_file(folder.controller_address, spec.token, 1.0)
            )
            self._reports = Reports(client)
            self._elsewhere.open(selector, spec)
            self._start_replicas()
            self._watch(client)
            ending = self._ending()
            if ending.status is not None:
                self._display.update(ending.status)
        self._display.freeze()
        summary = write_report(
            self._folder,
            self._config,
            ending.status,
            seconds=self._began.elapsed,
            exit_code=ending.exit_code,
            reason=ending.reason,
            first_step=self._state.step if self._state is not None else 0,
            age=None if ending.complete else self._heard.elapsed,
        )
        for line in (*self._unexpected, summary):
            self._say(line)
        return ending.exit_code

    def _say(self, text: str) -> None:
        self._display.say(text)
        _LOG.info("%s", text)

    def _ending(self) -> Ending:
        status = newest_status(recorded_status(self._folder), self._status)
        if status is not None:
            status = _with_reasons(status, self._asked_members)
        return ending(
            self._config.job.name,
            status,
            finished_checkpoint(self._folder),
            self._signals,
            self._failure,
            controller_request=self._controller_request,
            on_slurm=self._folder.attempt is not None,
        )

    # --- start ------------------------------------------------------------------------------------------------

    def _write_spec(self, redis_url: str) -> JobSpec:
        spec = JobSpec(
            config=self._config,
            job_file=self._job_file,
            folder=self._folder,
            secret=self._site.secret,
            redis_url=redis_url,
            job_id=self._job_id,
            resume=self._state is not None,
            first_work_item=self._state.next_work_item if self._state is not None else 0,
            chosen_token=self._site.token,
        )
        spec.write()
        return spec

    def _start_replicas(self) -> None:
        self._start_policy()
        for child in (*self._crew.start_rollouts(), self._crew.controller):
            assert child is not None
            self._selector.register(child.pidfd, selectors.EVENT_READ)
        away = self._elsewhere.expected
        more = f", {away} more start on other nodes" if away else ""
        count = len(self._crew.replicas)
        self._say(f"started controller and {count} replicas{more}; output in {short_path(self._folder.root)}")

    def _start_policy(self) -> None:
        """Start the policy, or let it wait for its ranks of other machines."""
        for child in self._crew.start_policy():
            self._selector.register(child.pidfd, selectors.EVENT_READ)

    # --- run and end ------------------------------------------------------------------------------------------

    def _watch(self, client: ControllerClient) -> None:
        """Wait for children and signals until every child has ended."""
        controller = self._crew.controller
        assert controller is not None
        next_status = Deadline.after(0)
        while any(process.running for process in self._crew.processes):
            if self._teardowns and all(teardown.is_over for _, teardown in self._teardowns):
                left = [process for process in self._crew.processes if process.running]
                names = ", ".join(f"{process.name} (pid {process.pid})" for process in left)
                self._say(f"{names} did not end although killed")
                return
            bound = next_status.remaining
            self._wait(min([bound, *(teardown.seconds_to_next for _, teardown in self._teardowns)]))
            self._elsewhere.look()
            for process in self._crew.processes:
                if process.running and process.collect() is not None:
                    self._ended(process, client)
            self._react()
            if not self._teardowns:
                self._start_policy()
            if next_status.expired:
                # The end of the job waits for no controller that has stopped answering.
                if controller.running and not (self._teardowns and self._answered and self._controller_silent):
                    self._look(client)
                    self._end_silent()
                next_status = Deadline.after(min(STATUS_INTERVAL, self._config.controller.dead_after / 6))

    def _wait(self, timeout: float) -> None:
        """Wait for children, other machines and signals at most `timeout` seconds."""
        for key, _ in self._selector.select(timeout):
            if key.fileobj is self._inbox:
                self._signals.extend(self._inbox.receive())
            elif key.data is not None:
                key.data()

    def _ended(self, child: JobProcess, client: ControllerClient) -> None:
        if isinstance(child, Child):
            self._selector.unregister(child.pidfd)
            if killed := self._crew.kill_orphans():
                self._say(f"{killed} processes that {child.name} left behind were killed")
        code = child.exit_code
        assert code is not None
        if child is self._crew.controller:
            self._log_end(child, child.ending)
            recorded = recorded_status(self._folder)
            early = not self._signals and (recorded is None or not recorded.phase.is_final)
            if early:
                self._failure = f"the controller ended early: {child.ending}; see {short_path(child.log)}"
            self._end(at_once=early)
            return
        if code in USER_CODES and not self._answered:
            self._controller_silent = False  # the replica has told it why, so it answers
        status = self._newest_status(client)
        outcome = None if status is None or status.outcome is None else status.outcome.kind
        request = self._requests.get(child)
        end = replica_end(code, child.ending, request, _member_of(status, child), outcome)
        self._log_end(child, end.reason)
        if request is not None and request.number == signal.SIGTERM and request.explains(code):
            self._asked_members[child.name, child.pid] = end.reason
        again = (
            not self._teardowns
            and not self._signals
            and outcome is None
            and child in self._crew.policy.children
            and self._crew.policy.may_start_again()
        )
        # A process is named when it is killed.
        told = self._asked or end.killed or (not end.early and code in (ExitCode.OK, ExitCode.FAILED))
        if not told:
            self._say(end.line(child.name) + (f"; see {short_path(child.log)}" if end.early else ""))
        assert child.role is not None
        # A member that has left in order is not affected by it.
        reason = printable(end.reason, models.MAX_SENTENCE)
        answer = self._report(
            models.Died(
                name=child.name, role=child.role, pid=child.pid, reason=reason, final=not again, exit_code=code
            )
        )
        again = again and not (answer is not None and answer.stop)
        if again:
            self._start_policy_again()
        elif child.role is Role.POLICY or not self._replicas_run:
            self._end()

    def _log_end(self, child: JobProcess, reason: str) -> None:
        since = "" if self._end_began is None else f", {self._end_began.elapsed:.2f} s after the end began"
        _LOG.info("%s ended with code %s (%s)%s", child.name, child.exit_code, reason, since)

    def _start_policy_again(self) -> None:
        policy = self._crew.policy
        for child in policy.end():
            self._selector.unregister(child.pidfd)
        for child in policy.start():
            self._selector.register(child.pidfd, selectors.EVENT_READ)
        self._say(f"the policy starts again, {policy.life} of {policy.restarts} times")

    def _end_silent(self) -> None:
        """A policy replica that counts as dead, but is still there, goes: another life may begin then."""
        members = self._status.members if self._status is not None else []
        dead = {(member.name, member.pid): member for member in members if member.state is MemberState.DEAD}
        for process in self._crew.others():
            member = dead.get((process.name, process.pid))
            request = self._requests.get(process)
            killed = request is not None and request.number == signal.SIGKILL
            if member is not None and process.running and not killed and not self._teardowns:
                self._say(f"{process.name} is {member.reason} and is killed")
                why = f"the controller had declared it dead ({member.reason})"
                self._request_end(process, signal.SIGKILL, why)

    def _end(self, *, at_once: bool = False) -> None:
        """Begin to end the job, or do so more firmly; the controller goes last."""
        if not self._teardowns or (at_once and not self._asked):
            self._asked = at_once
            bound = self._config.timeouts.shutdown
            self._end_began = Stopwatch()
            self._elsewhere.refuse()
            self._teardowns = [
                (self._crew.rollouts, ShutdownEscalation(bound * ROLLOUT_SHARE, at_once=at_once)),
                (self._crew.others, ShutdownEscalation(bound, at_once=at_once)),
            ]
            names = ", ".join(process.name for process in self._crew.processes if process.running)
            asked = "they are asked by signal" if at_once else "they know it from the controller"
            _LOG.info("shutdown: end the processes (%s), waiting for %s, at most %.1f s", asked, names, bound)
        controller = self._crew.controller
        if controller is not None and self._answered and not self._replicas_run:
            # The last replica has unregistered, or is not going to: nothing is left to wait for. A controller that
            # is starting hears first what became of them.
            if not self._controller_request and not self._has_outcome():
                self._controller_request = self._failure or "no replica was left"
            controller.signal(signal.SIGTERM)

    @property
    def _replicas_run(self) -> bool:
        return any(each.running for each in self._crew.replicas)

    def _request_end(self, process: JobProcess, number: signal.Signals, why: str) -> None:
        """Send SIGTERM to a process, or SIGKILL to its group."""
        self._requests[process] = EndRequest(number, why)
        if number == signal.SIGKILL:
            process.kill_group()
        else:
            process.signal(number)

    def _why_it_ends(self) -> str:
        """Why the processes of the job are asked to end."""
        status = recorded_status(self._folder) or self._status
        if status is not None and status.outcome is not None:
            return f"the job had {THE_JOB_HAS[status.outcome.kind]}"
        if self._signals:
            return f"the job had {THE_JOB_HAS['interrupted']}"
        return self._failure or "no policy replica was left"

    def _has_outcome(self) -> bool:
        """Whether the controller is known to have an outcome of the job."""
        statuses = (recorded_status(self._folder), self._status)
        return any(status is not None and status.outcome is not None for status in statuses)

    def _newest_status(self, client: ControllerClient) -> models.Status | None:
        """What the controller answers now; else what it has recorded; else its last answer."""
        answered = self._ask(client.status)
        if answered is None:
            return recorded_status(self._folder) or self._status
        self._status = answered
        return answered

    def _report(self, report: Report) -> models.Directive | None:
        """What the controller answers to a report; None if it does not answer now, and gets the report later."""
        self._reports.add(report)
        return self._ask(self._reports.send)

    def _ask(self, call: Callable[[], _Answer]) -> _Answer | None:
        """One call that may fail: a controller that does not answer costs its time limit once."""
        controller = self._crew.controller
        if controller is None or not controller.running or self._controller_silent or self._is_over():
            return None
        try:
            return call()
        except ControlPlaneError as error:
            if self._is_over():  # it has ended in order meanwhile
                return None
            self._controller_silent = True
            self._failure = self._failure or str(error)
            self._say(str(error))
            return None

    def _is_over(self) -> bool:
        """Whether the controller has recorded the last phase: it listens no more."""
        recorded = recorded_status(self._folder)
        return recorded is not None and recorded.phase.is_final

    def _react(self) -> None:
        """Do what signals and the deadline of the end ask for."""
        if self._signals and not self._interrupted:
            self._interrupted = True
            name, bound = self._signals[0].name, self._config.timeouts.shutdown
            self._say(f"{name}: ending the job, at most {bound:g} s")
            reason = reason_of(self._signals[0], on_slurm=self._folder.attempt is not None)
            self._report(models.Stop(reason=reason))
            self._end(at_once=True)
        for processes, teardown in self._teardowns:
            if len(self._signals) > 1:
                teardown.hurry()
            for means in teardown.take_due():
                for process in processes():
                    if process.running:
                        self._apply(means, process)

    def _apply(self, means: KillStage, child: JobProcess) -> None:
        _LOG.info("shutdown: %s: %s", child.name, means.name.lower().replace("_", " "))
        if means is KillStage.TERMINATE:
            if child is not self._crew.controller:
                self._request_end(child, signal.SIGTERM, self._why_it_ends())
        elif means is KillStage.DUMP_STACKS:
            child.signal(DUMP_SIGNAL)
        else:
            hurried = len(self._signals) > 1
            why = f"another signal came ({self._signals[-1].name})" if hurried else "it did not end in time"
            self._request_end(child, signal.SIGKILL, why)
            how = "was killed" if hurried else "did not end in time and was killed"
            self._say(f"{child.name} (pid {child.pid}) {how}; see {short_path(child.log)}")

    def _report_alive(self, client: ControllerClient, status: models.Status) -> None:
        """Tell the controller of silent replicas whose processes run."""
        seen = _seen_alive(status, self._crew.replicas, self._config.controller.dead_after)
        if seen:
            self._ask(lambda: client.post("/alive", models.Alive(seen=seen), models.Directive))

    def _look(self, client: ControllerClient) -> None:
        try:
            self._status = client.status()
        except ControlPlaneError:  # its end is noticed elsewhere
            stall = self._config.timeouts.stall * 2**self._silences
            if self._heard.elapsed > stall:
                self._silences += 1
                waited = f"{self._heard.elapsed:.1f} s"
                self._say(f"stall: dray run waits for the controller, for its status, since {waited}")
            return
        self._answered, self._controller_silent = True, False
        self._heard, self._silences = Stopwatch(), 0
        self._ask(self._reports.send)
        self._report_alive(client, self._status)
        if self._teardowns:
            if not self._replicas_run:
                self._end()
        elif not self._status.phase.gives_work:
            self._end()
        stalled = self._status.stall
        if stalled is not None and stalled.reports > self._stalls:
            self._stalls = stalled.reports
            self._say(f"stall: {stalled.line}")
        self._display.update(self._status)


def _seen_alive(status: models.Status, processes: Sequence[JobProcess], dead_after: float) -> list[models.Seen]:
    """The members that are silent, and could soon count as dead, although their processes run."""
    silent = {
        (member.name, member.pid)
        for member in status.members
        if member.state is MemberState.ACTIVE and member.silence > dead_after / 3
    }
    found = [
        models.Seen(name=process.name, pid=process.pid, seconds=process.seconds_unseen())
        for process in processes
        if process.running and (process.name, process.pid) in silent
    ]
    return [each for each in found if each.seconds < dead_after][: models.MAX_MEMBERS]


def _member_of(status: models.Status | None, process: JobProcess) -> tuple[MemberState, str] | None:
    """What the controller counts a process as, and why; None if it has not registered."""
    for member in [] if status is None else status.members:
        if (member.name, member.pid) == (process.name, process.pid):
            return member.state, member.reason
    return None


def _with_reasons(status: models.Status, reasons: Mapping[tuple[str, int], str]) -> models.Status:
    """`status`, in which members have the reasons that the supervisor knows, by name and pid."""
    members = [
        member.model_copy(update={"reason": reasons.get((member.name, member.pid), member.reason)})
        for member in status.members
    ]
    return status.model_copy(update={"members": members})
