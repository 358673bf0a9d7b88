"""A job on this machine: starts its processes in order, watches them, and ends them in reverse order.

Everything happens in the main thread, which waits for children and signals at once and never polls.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import secrets
import selectors
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dray.clock import Deadline
from dray.config import JobConfig
from dray.control import REDIS_STOP_BOUND
from dray.errors import ConfigError, ControlPlaneError
from dray.launch.children import Child
from dray.launch.display import Display
from dray.launch.ending import Ending, ending, finished_checkpoint, recorded_status
from dray.launch.job_redis import job_redis
from dray.launch.log import supervisor_log
from dray.launch.output import open_output
from dray.launch.policy_group import PolicyGroup
from dray.launch.signals import SignalInbox
from dray.launch.teardown import ROLLOUT_SHARE, Means, Teardown
from dray.runtime import messages
from dray.runtime.address import advertise, bind
from dray.runtime.checkpoint import CheckpointState
from dray.runtime.controller_client import ControllerClient
from dray.runtime.descendants import child_pids, kill_orphans
from dray.runtime.exit_codes import ExitCode, meaning
from dray.runtime.job import JobFolder, JobSpec
from dray.runtime.membership import MemberState, Role
from dray.runtime.process import DUMP_SIGNAL, adopt_orphans
from dray.runtime.report import write_report
from dray.runtime.shutdown_step import ShutdownStep, closed_by_step

STATUS_INTERVAL = 0.5
_LOG = logging.getLogger("dray.launch.local")


def run_job(config: JobConfig, job_file: Path, *, resume: bool = False) -> int:
    """Run a job to its end and return the exit code of `dray run`. Main thread of the main interpreter only.

    Raises:
        ConfigError: before anything was started.
    """
    faulthandler.register(DUMP_SIGNAL, all_threads=True, chain=False)
    with SignalInbox() as inbox, Display(f"dray: job {config.job.name}", config.job.max_steps) as display:
        with open_output(config, resume=resume) as (folder, state):
            if state is not None and state.outcome:
                display.say(
                    f"{state.outcome} already, at step {state.step}: nothing is left to do in {folder.root}"
                )
                return ExitCode.OK
            return _Run(config, job_file, folder, state, inbox, display).run()


class _Run:
    def __init__(
        self,
        config: JobConfig,
        job_file: Path,
        folder: JobFolder,
        state: CheckpointState | None,
        inbox: SignalInbox,
        display: Display,
    ) -> None:
        self._config = config
        self._job_file = job_file
        self._folder = folder
        self._state = state
        self._inbox = inbox
        self._display = display
        self._job_id = f"{config.job.name[:40]}-{secrets.token_hex(4)}"
        self._began = Deadline.after(None)
        self._signals: list[signal.Signals] = []
        self._rollouts: list[Child] = []
        self._policy = PolicyGroup(folder, config.policy.replicas, config.policy.restarts)
        self._controller: Child | None = None
        self._teardowns: list[tuple[list[Child], Teardown]] = []
        self._asked = False
        self._end_began: Deadline | None = None
        self._status: messages.Status | None = None
        self._controller_silent = False
        self._heard = Deadline.after(None)
        self._silences = 0
        self._stalls = 0
        self._interrupted = False
        self._failure = ""
        self._unexpected: list[str] = []

    def run(self) -> int:
        folder = self._folder
        strangers = child_pids()
        adopt_orphans()
        with ExitStack() as resources, selectors.DefaultSelector() as selector:
            self._selector = selector
            selector.register(self._inbox, selectors.EVENT_READ)
            self._check_entry_points()
            if self._signals:
                stopped = self._ending()
                self._say(f"stopped: {stopped.reason} before anything was started")
                return stopped.exit_code
            listener = resources.enter_context(bind(self._config.controller.host, self._config.controller.port))
            step = ShutdownStep("end the use of Redis", "its answer, or its end", REDIS_STOP_BOUND)
            place = folder.run / "redis"
            server = job_redis(self._config, self._job_id, place, self._say, self._unexpected.append)
            redis = closed_by_step(resources, server, step)
            folder.logs.mkdir(exist_ok=True)
            resources.enter_context(supervisor_log(folder.logs))
            self._known = strangers | ({redis.pid} if redis.pid is not None else set())
            resources.callback(kill_orphans, self._known, 1.0)
            spec = self._write_spec(redis.url)
            # From here on there are children; they end before anything above does.
            resources.callback(self._kill_rest)
            self._start_controller(spec, listener)
            client = resources.enter_context(
                ControllerClient.of_address_file(folder.controller_address, spec.token, 1.0)
            )
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
        )
        for line in (*self._unexpected, summary):
            self._say(line)
        return ending.exit_code

    def _say(self, text: str) -> None:
        self._display.say(text)
        _LOG.info("%s", text)

    def _ending(self) -> Ending:
        status = recorded_status(self._folder) or self._status
        checkpoint = finished_checkpoint(self._folder)
        return ending(self._config.job.name, status, checkpoint, self._signals, self._failure)

    # --- start ------------------------------------------------------------------------------------------------

    def _check_entry_points(self) -> None:
        """Import the user's classes in a process of their own, so that nothing of them stays in this one.

        Raises:
            ConfigError: they cannot be imported.
        """
        report = self._folder.run / "entry_points.json"
        child = Child(
            "check",
            "dray.runtime.check_entry_points",
            [str(self._job_file.parent), self._config.rollout.worker, self._config.policy.trainer, str(report)],
            self._folder.run / "check.log",
        )
        deadline = Deadline.after(self._config.timeouts.start)
        with self._watching(child):
            while child.collect() is None:
                self._wait(deadline.remaining)
                if self._signals or deadline.expired:
                    child.kill_group()
                    child.collect(5.0)
        if self._signals:
            return
        try:
            answer = json.loads(report.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            what = (
                "in time" if deadline.expired else f"without ending the process ({meaning(child.exit_code or 0)})"
            )
            value = f"{self._config.rollout.worker}, {self._config.policy.trainer}"
            raise ConfigError("rollout.worker, policy.trainer", value, f"must be importable {what}") from error
        if answer:
            raise ConfigError(answer["key"], answer["value"], answer["allowed"])

    def _write_spec(self, redis_url: str) -> JobSpec:
        spec = JobSpec(
            config=self._config,
            job_file=self._job_file,
            folder=self._folder,
            secret=secrets.token_bytes(32),
            redis_url=redis_url,
            job_id=self._job_id,
            resume=self._state is not None,
            first_prompt=self._state.next_prompt if self._state is not None else 0,
        )
        spec.write()
        return spec

    @property
    def _replicas(self) -> list[Child]:
        return [*self._policy.children, *self._rollouts]

    def _start_controller(self, spec: JobSpec, listener: socket.socket) -> None:
        """Start it on `listener`, which is bound: whoever connects from now on waits until it accepts."""
        advertise(self._folder, listener)
        self._controller = Child(
            "controller",
            "dray.runtime.controller",
            [str(spec.folder.spec), str(listener.fileno())],
            self._folder.logs / "controller.log",
            pass_fds=[listener.fileno()],
        )
        listener.close()

    def _start_replicas(self) -> None:
        self._policy.start()
        for index in range(self._config.rollout.replicas):
            name = f"{Role.ROLLOUT.value}-{index}"
            log = self._folder.logs / f"{name}.log"
            arguments = [str(self._folder.spec), str(index)]
            self._rollouts.append(Child(name, "dray.runtime.rollout", arguments, log, role=Role.ROLLOUT))
        self._say(f"started controller and {len(self._replicas)} replicas; output in {_short(self._folder.root)}")

    # --- run and end ------------------------------------------------------------------------------------------

    def _watch(self, client: ControllerClient) -> None:
        """Wait for children and signals until every child has ended."""
        assert self._controller is not None
        for child in (*self._replicas, self._controller):
            self._selector.register(child.pidfd, selectors.EVENT_READ, child)
        next_status = Deadline.after(0)
        while any(child.running for child in (*self._replicas, self._controller)):
            children = [*self._replicas, self._controller]
            if self._teardowns and all(teardown.is_over for _, teardown in self._teardowns):
                left = ", ".join(f"{child.name} (pid {child.pid})" for child in children if child.running)
                self._say(f"{left} did not end although killed")
                return
            bound = next_status.remaining
            self._wait(min([bound, *(teardown.seconds_to_next for _, teardown in self._teardowns)]))
            for child in children:
                if child.running and child.collect() is not None:
                    self._ended(child, client)
            self._react(client)
            if next_status.expired and self._controller.running:
                self._look(client)
                self._end_silent()
                next_status = Deadline.after(STATUS_INTERVAL)

    def _wait(self, timeout: float) -> set[int]:
        """Wait for children and signals at most `timeout` seconds; returns what else is ready."""
        ready = set()
        for key, _ in self._selector.select(timeout):
            if key.fileobj is self._inbox:
                self._signals.extend(self._inbox.take())
            else:
                ready.add(key.fd)
        return ready

    @contextmanager
    def _watching(self, child: Child) -> Iterator[None]:
        pidfd = child.pidfd
        self._selector.register(pidfd, selectors.EVENT_READ)
        try:
            yield
        finally:
            self._selector.unregister(pidfd)

    def _ended(self, child: Child, client: ControllerClient) -> None:
        self._selector.unregister(child.pidfd)
        self._kill_orphans_of(child)
        code = child.exit_code
        assert code is not None
        since = "" if self._end_began is None else f", {self._end_began.elapsed:.2f} s after the end began"
        _LOG.info("%s ended with code %d (%s)%s", child.name, code, meaning(code), since)
        expected = self._asked or code in (ExitCode.OK, ExitCode.FAILED)
        if child is self._controller:
            recorded = recorded_status(self._folder)
            early = not self._signals and (recorded is None or not recorded.phase.is_final)
            if early:
                self._failure = f"the controller ended early: {meaning(code)}; see {_short(child.log)}"
            self._end(at_once=early)
            return
        again = (
            not self._teardowns
            and not self._signals
            and child in self._policy.children
            and self._policy.may_start_again()
        )
        if not expected:
            self._say(f"{child.name} ended early: {meaning(code)}; see {_short(child.log)}")
        # Who has left in order is not affected by it.
        reason = f"its process ended without leaving ({meaning(code)})" if expected else meaning(code)
        assert child.role is not None
        died = messages.Died(name=child.name, role=child.role, reason=reason, final=not again)
        answer = self._tell(client, "/died", died)
        again = again and not (answer is not None and answer.stop)
        if again:
            self._start_policy_again()
        elif child.role is Role.POLICY or not any(each.running for each in self._replicas):
            self._end()

    def _kill_orphans_of(self, child: Child) -> None:
        """What a replica leaves behind, the environments of a killed one say, is this process's now."""
        children = {each.pid for each in (*self._replicas, self._controller) if each is not None}
        killed = kill_orphans(self._known | children, 1.0)
        if killed:
            self._say(f"{killed} processes that {child.name} left behind were killed")

    def _start_policy_again(self) -> None:
        for child in self._policy.end():
            self._selector.unregister(child.pidfd)
        for child in self._policy.start():
            self._selector.register(child.pidfd, selectors.EVENT_READ, child)
        self._say(f"the policy starts again, {self._policy.life} of {self._policy.restarts} times")

    def _end_silent(self) -> None:
        """A policy replica that counts as dead, but is still there, goes: another life may begin then."""
        members = self._status.members if self._status is not None else []
        dead = {member.pid: member for member in members if member.state is MemberState.DEAD}
        for child in self._policy.children:
            if child.running and child.pid in dead and not self._teardowns:
                self._say(f"{child.name} is {dead[child.pid].reason} and is killed")
                child.kill_group()

    def _end(self, *, at_once: bool = False) -> None:
        """Begin to end the job, or do so more firmly; the controller goes last."""
        if not self._teardowns or (at_once and not self._asked):
            self._asked = at_once
            bound = self._config.timeouts.shutdown
            self._end_began = Deadline.after(None)
            others = [*self._policy.children, *([self._controller] if self._controller is not None else [])]
            self._teardowns = [
                (self._rollouts, Teardown(bound * ROLLOUT_SHARE, at_once=at_once)),
                (others, Teardown(bound, at_once=at_once)),
            ]
            names = ", ".join(child.name for child in (*self._rollouts, *others) if child.running)
            asked = "they are asked by signal" if at_once else "they know it from the controller"
            _LOG.info("shutdown: end the processes (%s), waiting for %s, at most %.1f s", asked, names, bound)
        if self._controller is not None and not any(each.running for each in self._replicas):
            # The last replica has unregistered, or is not going to: nothing is left to wait for.
            self._controller.signal(signal.SIGTERM)

    def _tell(self, client: ControllerClient, path: str, body: messages.Message) -> messages.Directive | None:
        """One call that may fail: a controller that does not answer costs its time limit once."""
        if self._controller is None or not self._controller.running or self._controller_silent:
            return None
        recorded = recorded_status(self._folder)
        if recorded is not None and recorded.phase.is_final:  # it listens no more
            return None
        try:
            return client.post(path, body, messages.Directive)
        except ControlPlaneError as error:
            self._controller_silent = True
            self._failure = self._failure or f"the controller did not answer: {error}"
            self._say(f"the controller could not be told: {error}")
            return None

    def _react(self, client: ControllerClient) -> None:
        """Do what signals and the deadline of the end ask for."""
        if self._signals and not self._interrupted:
            self._interrupted = True
            name, bound = self._signals[0].name, self._config.timeouts.shutdown
            self._say(f"{name}: ending the job, at most {bound:g} s")
            self._tell(client, "/stop", messages.Stop(reason=f"interrupted by {name}"))
            self._end(at_once=True)
        for children, teardown in self._teardowns:
            if len(self._signals) > 1:
                teardown.hurry()
            for means in teardown.take_due():
                for child in children:
                    if child.running:
                        self._apply(means, child)

    def _apply(self, means: Means, child: Child) -> None:
        _LOG.info("shutdown: %s: %s", child.name, means.name.lower().replace("_", " "))
        if means is Means.TERMINATE:
            if child is not self._controller:
                child.signal(signal.SIGTERM)
        elif means is Means.DUMP_STACKS:
            child.signal(DUMP_SIGNAL)
        else:
            child.kill_group()
            why = "was killed" if len(self._signals) > 1 else "did not end in time and was killed"
            self._say(f"{child.name} (pid {child.pid}) {why}; see {_short(child.log)}")

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
        self._controller_silent, self._heard, self._silences = False, Deadline.after(None), 0
        if not self._status.phase.gives_work and not self._teardowns:
            self._end()
        self._end_silent()
        stalled = self._status.stall
        if stalled is not None and stalled.reports > self._stalls:
            self._stalls = stalled.reports
            self._say(f"stall: {stalled.line}")
        self._display.update(self._status)

    def _kill_rest(self) -> None:
        """Nothing that was started outlives this, whatever happened."""
        for child in (*self._replicas, *([self._controller] if self._controller is not None else [])):
            if child.running:
                child.kill_group()
                child.collect(5.0)


def _short(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
