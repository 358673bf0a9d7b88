"""The supervisor of a job: starts its processes in order, watches them, and ends them in reverse order."""

from __future__ import annotations

import logging
import secrets
import selectors
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from dray.clock import Deadline, Stopwatch
from dray.errors import ControlPlaneError
from dray.jobs.config import JobConfig
from dray.jobs.controller.listener import bind, token_from_file
from dray.jobs.controller.state import THE_JOB_HAS
from dray.jobs.exit_codes import USER_CODES, ExitCode
from dray.jobs.folder import JobFolder, JobSpec, short_path
from dray.jobs.launch.display import Display
from dray.jobs.launch.heirs import rollout_heir, total
from dray.jobs.launch.output import attempt_folder, supervisor_log, write_run_record
from dray.jobs.launch.process_supervisor import ProcessSupervisor
from dray.jobs.launch.processes import JobPlacement, JobProcess, JobProcesses, LocalHost, replica_end
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
from dray.jobs.process import SignalInbox, closed_by_step
from dray.jobs.queue import REDIS_STOP_BOUND
from dray.jobs.queue.redis_server import job_redis
from dray.jobs.replica.checkpoint import CheckpointState
from dray.text import as_argument, path_of, printable

# --- reports -----------------------------------------------------------------------------------------------------

Report = models.Died | models.Stop


class Reports:
    """The reports that wait. There is at most one of each kind about each replica: the newest."""

    def __init__(self, controller: ControllerClient) -> None:
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


# --- supervisor --------------------------------------------------------------------------------------------------

STATUS_INTERVAL = 0.5
_LOG = logging.getLogger("dray.jobs.launch.supervisor")
_Answer = TypeVar("_Answer")


def supervise(
    config: JobConfig,
    job_file: Path,
    placement: JobPlacement,
    state: CheckpointState | None,
    inbox: SignalInbox,
    display: Display,
) -> int:
    """Run a job to its end and return the exit code of `dray run`. Main thread of the main interpreter only.

    The user's classes have been checked.

    Args:
        state: of the checkpoint from which the job is resumed.
        inbox: signals that end the job.

    Raises:
        ConfigError: before anything was started.
    """
    folder = placement.folder
    if state is not None and state.outcome:
        display.show_line(f"{state.outcome} already, at step {state.step}: nothing is left to do in {folder.root}")
        return ExitCode.OK

    def report(text: str) -> None:
        display.show_line(text)
        _LOG.info("%s", text)

    began, later = Stopwatch(), list[str]()
    token_file = config.controller.token_file
    chosen_token = None if token_file is None else token_from_file(path_of(token_file))
    job_id = f"{config.job.name[:40]}-{secrets.token_hex(4)}"
    with selectors.DefaultSelector() as selector, ExitStack() as resources:
        listener = resources.enter_context(bind(placement.address, config.controller.port))
        redis = job_redis(config, job_id, folder.run / "redis", placement.redis_host, report, later.append)
        redis_address = resources.enter_context(
            closed_by_step(redis, "end the use of Redis", "its answer, or its end", REDIS_STOP_BOUND)
        )
        attempt_folder(folder)
        if placement.options is not None:
            placement.options.write(folder.root)
        resources.enter_context(supervisor_log(folder.logs, config.job.log_level))
        # The children of this process are Redis and those of the caller.
        heir = resources.enter_context(rollout_heir(config, report))
        local = LocalHost(folder, lambda name: {**placement.environment(name), **heir.variables}, selector, report)
        spec = JobSpec(
            config=config,
            job_file=job_file,
            folder=folder,
            secret=placement.secret,
            redis_url=redis_address.url,
            job_id=job_id,
            resume=state is not None,
            first_work_item=state.next_work_item if state is not None else 0,
            chosen_token=chosen_token,
        )
        spec.write()
        # From here on there are processes; they end before anything above does.
        processes = resources.enter_context(JobProcesses(config, placement, local))
        processes.start_controller(listener, spec.token)
        client = resources.enter_context(
            ControllerClient.of_address_file(folder.controller_address, spec.token, 1.0)
        )
        supervisor = JobSupervisor(
            config,
            folder,
            processes,
            client,
            selector=selector,
            inbox=inbox,
            report=report,
            show=display.update,
            show_line=display.show_line,
        )
        processes.start_replicas(selector, spec)
        write_run_record(folder, config, job_file)  # it takes a while, in which the processes start
        more = f", {len(placement.remote)} more start on other nodes" if placement.remote else ""
        count = sum(1 for each in local.processes if each.role is not None)
        report(f"started controller and {count} replicas{more}; output in {short_path(folder.root)}")
        supervisor.watch()
        ending = supervisor.ending()
        inherited = heir.figures()
        if ending.status is not None:
            display.update(ending.status)
    display.close()
    summary = write_report(
        folder,
        config,
        ending.status,
        seconds=began.elapsed,
        exit_code=ending.exit_code,
        reason=ending.reason,
        first_step=state.step if state is not None else 0,
        age=None if ending.complete else supervisor.seconds_since_status,
        heirs=total([inherited, *placement.listener.heir_figures()]),
    )
    for line in (*later, *summary):
        report(line)
    return ending.exit_code


class JobSupervisor(ProcessSupervisor):
    """Watches the processes of a job, restarts the policy, and ends all in order, the controller last.

    Args:
        show: shows a status of the job.
        show_line: shows a line that may hold a secret, and is not to be logged.
    """

    def __init__(
        self,
        config: JobConfig,
        folder: JobFolder,
        processes: JobProcesses,
        controller: ControllerClient,
        *,
        selector: selectors.BaseSelector,
        inbox: SignalInbox,
        report: Callable[[str], None],
        show: Callable[[models.Status], None],
        show_line: Callable[[str], None],
    ) -> None:
        super().__init__(inbox, selector, processes.hosts, report)
        self._config = config
        self._folder = folder
        self._job = processes
        self._client = controller
        self._reports = Reports(controller)
        self._show = show
        self._show_line = show_line
        self._next_status = Deadline.after(0)
        self._answered_at = Stopwatch()
        self._asked = False
        self._end_began: Stopwatch | None = None
        self._status: models.Status | None = None
        self._page_shown = False
        self._answered = False
        self._controller_silent = True  # until it has answered for the first time
        self._silences = 0
        self._stalls = 0
        self._interrupted = False
        self._failure = ""
        self._asked_members: dict[tuple[str, int], str] = {}
        self._controller_request = ""

    @property
    def seconds_since_status(self) -> float:
        """Seconds since the controller last answered, or was started."""
        return self._answered_at.elapsed

    def ending(self) -> Ending:
        """How the job has ended, once `watch` has returned."""
        status = newest_status(recorded_status(self._folder), self._status)
        if status is not None:
            # The supervisor knows why the members ended that it has asked to.
            members = [
                member.model_copy(
                    update={"reason": self._asked_members.get((member.name, member.pid), member.reason)}
                )
                for member in status.members
            ]
            status = status.model_copy(update={"members": members})
        return ending(
            self._config.job.name,
            status,
            finished_checkpoint(self._folder),
            self.signals,
            self._failure,
            controller_request=self._controller_request,
            on_slurm=self._folder.attempt is not None,
        )

    # --- watch ------------------------------------------------------------------------------------------------

    def _is_needed(self) -> bool:
        return any(process.running for process in self.processes)

    def _seconds_to_next(self) -> float:
        return self._next_status.remaining

    def _react(self) -> None:
        self._job.listener.apply_timeouts()
        if self.signals and not self._interrupted:
            self._interrupted = True
            name, bound = self.signals[0].name, self._config.timeouts.shutdown
            self._report(f"{name}: ending the job, at most {bound:g} s")
            reason = reason_of(self.signals[0], on_slurm=self._folder.attempt is not None)
            self._send(models.Stop(reason=reason))
            self._end(at_once=True)
        if not self._is_ending:
            self._job.start_policy()
        if self._next_status.expired:
            # The end of the job waits for no controller that has stopped answering.
            if self._controller_runs and not (self._is_ending and self._answered and self._controller_silent):
                self._refresh_status()
                self._kill_silent()
            self._next_status = Deadline.after(min(STATUS_INTERVAL, self._config.controller.dead_after / 6))

    def _on_end(self, process: JobProcess) -> None:
        code = process.exit_code
        assert code is not None
        if process is self._job.controller:
            self._log_end(process, process.ending)
            early = not self.signals and not self._has_ended()
            if early:
                self._failure = f"the controller ended early: {process.ending}; see {short_path(process.log)}"
            self._end(at_once=early)
            return
        if code in USER_CODES and not self._answered:
            self._controller_silent = False  # the replica has reported the reason to it, so it answers
        status = self._newest_status()
        outcome = None if status is None or status.outcome is None else status.outcome.kind
        request = self.requests.get(process)
        member = _members(status).get((process.name, process.pid))
        counted = None if member is None else (member.state, member.reason)
        end = replica_end(code, process.ending, request, counted, outcome)
        self._log_end(process, end.reason)
        if request is not None and request.number == signal.SIGTERM and request.explains(code):
            self._asked_members[process.name, process.pid] = end.reason
        again = not self._is_ending and not self.signals and outcome is None and self._job.may_restart(process)
        # A process is named when it is killed.
        reported = self._asked or end.killed or (not end.early and code in (ExitCode.OK, ExitCode.FAILED))
        if not reported:
            self._report(end.line(process.name) + (f"; see {short_path(process.log)}" if end.early else ""))
        assert process.role is not None
        # A member that has left in order is not affected by it.
        reason = printable(end.reason, models.MAX_SENTENCE)
        name, role, pid = process.name, process.role, process.pid
        died = models.Died(name=name, role=role, pid=pid, reason=reason, final=not again, exit_code=code)
        answer = self._send(died)
        if again and not (answer is not None and answer.stop):
            self._report(self._job.restart(process))
        elif process.role is Role.POLICY or not self._replicas_run:
            self._end()

    def _log_end(self, process: JobProcess, reason: str) -> None:
        since = "" if self._end_began is None else f", {self._end_began.elapsed:.2f} s after the end began"
        _LOG.info("%s ended with code %s (%s)%s", process.name, process.exit_code, reason, since)

    def _kill_silent(self) -> None:
        """A policy replica that counts as dead, but is still there, is killed: the group may be restarted then."""
        members = _members(self._status)
        for process in self._others():
            member = members.get((process.name, process.pid))
            dead = member is not None and member.state is MemberState.DEAD
            request = self.requests.get(process)
            killed = request is not None and request.number == signal.SIGKILL
            if member is not None and dead and process.running and not killed and not self._is_ending:
                self._report(f"{process.name} is {member.reason} and is killed")
                why = f"the controller had declared it dead ({member.reason})"
                self._request_end(process, signal.SIGKILL, why)

    def _end(self, *, at_once: bool = False) -> None:
        """Begin to end the job, or do so more firmly; the controller goes last."""
        if not self._is_ending or (at_once and not self._asked):
            self._asked = at_once
            bound = self._config.timeouts.shutdown
            self._end_began = Stopwatch()
            self._job.listener.stop_accepting()
            self._escalations = [
                (self._rollouts, ShutdownEscalation(bound * ROLLOUT_SHARE, at_once=at_once)),
                (self._others, ShutdownEscalation(bound, at_once=at_once)),
            ]
            names = ", ".join(process.name for process in self.processes if process.running)
            asked = "they are asked by signal" if at_once else "they know it from the controller"
            _LOG.info("shutdown: end the processes (%s), waiting for %s, at most %.1f s", asked, names, bound)
        controller = self._job.controller
        if controller is not None and self._answered and not self._replicas_run:
            # The last replica has unregistered, or is not going to: nothing is left to wait for. A controller that
            # is starting is notified of their ends first.
            if not self._controller_request and self._last_outcome() is None:
                self._controller_request = self._failure or "no replica was left"
            controller.signal(signal.SIGTERM)

    @property
    def _controller_runs(self) -> bool:
        return self._job.controller is not None and self._job.controller.running

    @property
    def _replicas(self) -> Sequence[JobProcess]:
        return [each for each in self.processes if each is not self._job.controller]

    @property
    def _replicas_run(self) -> bool:
        return any(each.running for each in self._replicas)

    def _rollouts(self) -> Sequence[JobProcess]:
        return [each for each in self.processes if each.role is Role.ROLLOUT]

    def _others(self) -> Sequence[JobProcess]:
        return [each for each in self.processes if each.role is not Role.ROLLOUT]

    def _why_it_ends(self, stage: KillStage) -> str:
        if stage is KillStage.KILL:
            hurried = len(self.signals) > 1
            return f"another signal came ({self.signals[-1].name})" if hurried else "it did not end in time"
        outcome = self._last_outcome()
        if outcome is not None:
            return f"the job had {THE_JOB_HAS[outcome.kind]}"
        if self.signals:
            return f"the job had {THE_JOB_HAS['interrupted']}"
        return self._failure or "no policy replica was left"

    def _apply(self, stage: KillStage, process: JobProcess) -> None:
        if stage is KillStage.TERMINATE and process is self._job.controller:
            return  # it goes last
        super()._apply(stage, process)
        if stage is KillStage.KILL:
            how = "was killed" if len(self.signals) > 1 else "did not end in time and was killed"
            self._report(f"{process.name} (pid {process.pid}) {how}; see {short_path(process.log)}")

    def _last_outcome(self) -> models.OutcomeReport | None:
        """What the controller has recorded or answered last as the outcome of the job."""
        status = recorded_status(self._folder) or self._status
        return None if status is None else status.outcome

    def _newest_status(self) -> models.Status | None:
        """What the controller answers now; else what it has recorded; else its last answer."""
        answered = self._ask(self._client.status)
        if answered is None:
            return recorded_status(self._folder) or self._status
        self._status = answered
        return answered

    def _send(self, report: Report) -> models.Directive | None:
        """What the controller answers to a report; None if it does not answer now, and gets the report later."""
        self._reports.add(report)
        return self._ask(self._reports.send)

    def _ask(self, call: Callable[[], _Answer]) -> _Answer | None:
        """One call that may fail: a controller that does not answer costs its time limit once."""
        if not self._controller_runs or self._controller_silent or self._has_ended():
            return None
        try:
            return call()
        except ControlPlaneError as error:
            if self._has_ended():  # it has ended in order meanwhile
                return None
            self._controller_silent = True
            self._failure = self._failure or str(error)
            self._report(str(error))
            return None

    def _has_ended(self) -> bool:
        """Whether the controller has recorded the last phase: it listens no more."""
        recorded = recorded_status(self._folder)
        return recorded is not None and recorded.phase.is_final

    def _report_running(self, status: models.Status) -> None:
        """Report members that are silent, and could soon count as dead, although their processes run."""
        dead_after = self._config.controller.dead_after
        silent = {
            identity
            for identity, member in _members(status).items()
            if member.state is MemberState.ACTIVE and member.silence > dead_after / 3
        }
        found = [
            models.Seen(name=process.name, pid=process.pid, seconds=process.seconds_unseen())
            for process in self._replicas
            if process.running and (process.name, process.pid) in silent
        ]
        seen = [each for each in found if each.seconds < dead_after][: models.MAX_MEMBERS]
        if seen:
            self._ask(lambda: self._client.post("/alive", models.Alive(seen=seen), models.Directive))

    def _show_page(self) -> None:
        """Show a URL of the page, except on Slurm, where what is shown is kept in a file of the job."""
        if self._folder.attempt is None:
            try:
                url = self._client.page_url()
            except ControlPlaneError:  # the controller is asked again with the next status
                return
            folder = as_argument(short_path(self._folder.root))
            self._show_line(f"page: {url} (opens once; for another URL: dray status --page {folder})")
        self._page_shown = True

    def _refresh_status(self) -> None:
        try:
            self._status = self._client.status()
        except ControlPlaneError:  # its end is noticed elsewhere
            stall = self._config.timeouts.stall * 2**self._silences
            if self._answered_at.elapsed > stall:
                self._silences += 1
                waited = f"{self._answered_at.elapsed:.1f} s"
                self._report(f"stall: dray run waits for the controller, for its status, since {waited}")
            return
        self._answered, self._controller_silent = True, False
        self._answered_at, self._silences = Stopwatch(), 0
        self._ask(self._reports.send)
        self._report_running(self._status)
        ended = not self._replicas_run if self._is_ending else not self._status.phase.gives_work
        if ended:
            self._end()
        stalled = self._status.stall
        if stalled is not None and stalled.reports > self._stalls:
            self._stalls = stalled.reports
            self._report(f"stall: {stalled.line}")
        self._show(self._status)
        if not self._page_shown and not self._is_ending:
            self._show_page()


def _members(status: models.Status | None) -> dict[tuple[str, int], models.MemberStatus]:
    """The members that have registered, by name and pid."""
    return {} if status is None else {(member.name, member.pid): member for member in status.members}
