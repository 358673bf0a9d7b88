"""The supervisor of a job over scripted hosts and a scripted controller: no process is started."""

import selectors
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from scripted_host import ScriptedHost

from dray.jobs.exit_codes import ExitCode
from dray.jobs.folder import JobFolder
from dray.jobs.job_file import parse_job
from dray.jobs.launch.processes import JobPlacement, JobProcesses
from dray.jobs.launch.supervisor import JobSupervisor
from dray.jobs.messages import models
from dray.jobs.messages.controller_client import ControllerLostError
from dray.jobs.messages.models import MemberState, MemberStatus, OutcomeReport, Phase, ProgressReport, Role
from dray.jobs.process import DUMP_SIGNAL, SignalInbox

CONFIG = parse_job(
    {
        "job": {"name": "small", "max_steps": 10},
        "rollout": {"worker": "small.py:Worker", "replicas": 2, "restarts": 1},
        "policy": {"trainer": "small.py:Trainer", "batch_size": 8, "replicas": 2, "readers": 2, "restarts": 1},
        "controller": {"heartbeat_interval": 0.01, "dead_after": 0.06},
        "timeouts": {"shutdown": 0.5},
    }
)


def status(
    phase: Phase = Phase.RUNNING, members: Sequence[MemberStatus] = (), outcome: OutcomeReport | None = None
) -> models.Status:
    return models.Status(
        job="small", phase=phase, seconds=1.0, outcome=outcome, members=list(members), work_items={}
    )


FINISHED = OutcomeReport(kind="finished", reason="all steps are done")


class ScriptedController:
    """Answers each request for the status by the next step of a script, and with the last answer after that.

    A step that returns None comes again.
    """

    def __init__(self, *script: Callable[[], models.Status | None]) -> None:
        self.script = list(script)
        self.newest = status()
        self.posted: list[models.Message] = []
        self.silences = 0

    def status(self) -> models.Status:
        if self.script and (newest := self.script[0]()) is not None:
            self.newest = newest
            del self.script[0]
        return self.newest

    def post(self, path: str, body: models.Message, reply: type[Any]) -> Any:
        self.posted.append(body)
        return reply(phase=self.newest.phase, stop=not self.newest.phase.gives_work)

    def page_url(self) -> str:
        if self.silences:
            self.silences -= 1
            raise ControllerLostError("no answer")
        return "http://127.0.0.1:1/?token=secret"

    def deaths(self) -> list[tuple[str, bool]]:
        """The replicas whose end was reported, and whether that was final."""
        return [(each.name, each.final) for each in self.posted if isinstance(each, models.Died)]


class Job:
    """A job whose processes are started, and its supervisor."""

    def __init__(self, folder: Path, *script: Callable[["Job"], models.Status | None]) -> None:
        self.selector = selectors.DefaultSelector()
        self.inbox = SignalInbox()
        self.host = ScriptedHost(self.selector)
        self.controller = ScriptedController(*((lambda step=step: step(self)) for step in script))
        self.lines: list[str] = []
        self.shown: list[str] = []
        job_folder = JobFolder(folder)
        placement = JobPlacement(job_folder, "127.0.0.1", ranks=2, rollouts=range(2))
        self.processes = JobProcesses(CONFIG, placement, self.host)
        self.processes.start_controller(socket.socket(), "token")
        self.processes.start_policy()
        for index in range(2):
            self.host.start(Role.ROLLOUT, index)
        self.supervisor = JobSupervisor(
            CONFIG,
            job_folder,
            self.processes,
            self.controller,
            selector=self.selector,
            inbox=self.inbox,
            report=self.lines.append,
            show=lambda _: None,
            show_line=self.shown.append,
        )

    def run(self) -> int:
        """Watch until the end; returns the exit code of the job."""
        self.supervisor.watch()
        return self.supervisor.ending().exit_code

    def finish(self) -> models.Status:
        """All replicas have done their work, and leave."""
        for process in self.host.processes:
            if process.role is not None and process.running:
                process.end(0)
        return status(Phase.DRAINING, outcome=FINISHED)


JobStarter = Callable[..., Job]


@pytest.fixture
def job(tmp_path: Path) -> Iterator[JobStarter]:
    opened: list[Job] = []

    def start(*script: Callable[[Job], models.Status | None]) -> Job:
        opened.append(Job(tmp_path, *script))
        return opened[-1]

    yield start
    for each in opened:
        each.processes.close()
        each.inbox.close()
        each.selector.close()
        each.host.release()


def ends(name: str, code: int) -> Callable[[Job], models.Status]:
    """A step of the script in which a process ends."""

    def step(job: Job) -> models.Status:
        job.host[name].end(code)
        return status()

    return step


def is_interrupted(_: Job) -> models.Status:
    """A step of the script in which Ctrl-C is pressed."""
    signal.raise_signal(signal.SIGINT)
    return status()


def runs(_: Job) -> models.Status:
    return status()


def test_job_that_finishes_ends_without_a_signal_but_to_its_controller_which_is_last(job: JobStarter) -> None:
    running = job(runs, Job.finish)
    assert running.run() == ExitCode.OK
    assert {each.name: list(dict.fromkeys(each.received)) for each in running.host.started} == {
        "controller": [signal.SIGTERM],
        "policy-0": [],
        "policy-1": [],
        "rollout-0": [],
        "rollout-1": [],
    }
    assert sorted(running.controller.deaths()) == [
        (name, True) for name in ("policy-0", "policy-1", "rollout-0", "rollout-1")
    ]
    assert running.lines == []


def test_url_of_the_page_is_shown_once_it_is_known_and_is_not_logged(
    job: JobStarter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    running = job(runs, runs, runs, Job.finish)
    running.controller.silences = 2
    assert running.run() == ExitCode.OK
    (line,) = running.shown
    assert line.startswith(
        "page: http://127.0.0.1:1/?token=secret (opens once; for another URL: dray status --page "
    )
    assert running.lines == []
    assert "secret" not in caplog.text


def test_lost_rank_restarts_the_whole_group_once_and_nothing_else(job: JobStarter) -> None:
    running = job(ends("policy-1", -signal.SIGSEGV), runs, Job.finish)
    assert running.run() == ExitCode.OK
    names = [each.name for each in running.host.started]
    assert names == ["controller", "policy-0", "policy-1", "rollout-0", "rollout-1", "policy-0", "policy-1"]
    assert running.host.started[1].received == [signal.SIGKILL]
    assert running.controller.deaths()[0] == ("policy-1", False)
    assert any("policy-1 ended early" in line for line in running.lines)


def test_group_that_may_not_be_restarted_any_more_ends_the_job(job: JobStarter) -> None:
    def restarted_rank_ends(job: Job) -> models.Status | None:
        if job.host["policy-0"] is job.host.started[1]:
            return None
        job.host["policy-0"].end(-signal.SIGSEGV)
        return status()

    running = job(ends("policy-1", -signal.SIGSEGV), restarted_rank_ends, runs)
    assert running.run() == ExitCode.FAILED
    assert ("policy-0", True) in running.controller.deaths()
    assert signal.SIGTERM in running.host["rollout-0"].received


def test_lost_rollout_replica_is_restarted_as_often_as_configured_and_then_done_without(job: JobStarter) -> None:
    def restarted_replica_ends(job: Job) -> models.Status | None:
        if job.host["rollout-1"] is job.host.started[4]:
            return None
        job.host["rollout-1"].end(10)
        return status()

    running = job(ends("rollout-1", 10), restarted_replica_ends, runs, Job.finish)
    assert running.run() == ExitCode.OK
    assert [each.name for each in running.host.started[5:]] == ["rollout-1"]
    assert running.controller.deaths()[:2] == [("rollout-1", False), ("rollout-1", True)]
    assert "restarting rollout-1 (restart 1 of 1)" in running.lines
    assert running.host["rollout-0"].received == []


@pytest.mark.parametrize("code", [0, 17, 143], ids=str)
def test_rollout_replica_that_would_end_the_same_way_is_not_restarted(job: JobStarter, code: int) -> None:
    running = job(ends("rollout-1", code), runs, Job.finish)
    assert running.run() == ExitCode.OK
    assert len(running.host.started) == 5


def test_rollout_replica_of_a_machine_that_is_gone_is_not_restarted(job: JobStarter) -> None:
    def node_is_gone(job: Job) -> models.Status:
        job.host.lost = True
        return ends("rollout-1", -signal.SIGKILL)(job)

    running = job(node_is_gone, runs, Job.finish)
    assert running.run() == ExitCode.OK
    assert len(running.host.started) == 5


def test_interrupted_job_is_reported_and_its_replicas_are_asked_to_end_at_once(job: JobStarter) -> None:
    running = job(runs, is_interrupted)
    assert running.run() == 128 + signal.SIGINT
    assert models.Stop(reason="interrupted by SIGINT") in running.controller.posted
    assert {each.name: list(dict.fromkeys(each.received)) for each in running.host.started} == {
        name: [signal.SIGTERM] for name in ("controller", "policy-0", "policy-1", "rollout-0", "rollout-1")
    }
    assert running.lines[0].startswith("SIGINT: ending the job")


def test_replica_that_hangs_gets_ever_firmer_means_in_order(job: JobStarter) -> None:
    running = job(runs, is_interrupted)
    running.host.obeyed = {signal.SIGKILL}
    assert running.run() == 128 + signal.SIGINT
    for name in ("policy-0", "policy-1", "rollout-0", "rollout-1"):
        assert running.host[name].received == [signal.SIGTERM, DUMP_SIGNAL, signal.SIGKILL]
    assert any("policy-0 (pid 101) did not end in time and was killed" in line for line in running.lines)


def test_replica_that_ends_while_the_controller_answers_slowly_is_not_killed(job: JobStarter) -> None:
    def answers_late(job: Job) -> models.Status:
        threading.Event().wait(CONFIG.timeouts.shutdown)  # every stage is due then
        return job.finish()

    running = job(runs, is_interrupted, answers_late)
    running.host.obeyed = {signal.SIGKILL}
    running.run()
    for name in ("policy-0", "policy-1", "rollout-0", "rollout-1"):
        assert signal.SIGKILL not in running.host[name].received
    killed = [line.partition(" ")[0] for line in running.lines if "was killed" in line]
    assert killed == ["controller"]


def test_second_signal_kills_what_is_left_at_once(job: JobStarter) -> None:
    running = job(runs, is_interrupted, is_interrupted)
    running.host.obeyed = {signal.SIGKILL}
    assert running.run() == 128 + signal.SIGINT
    for name in ("policy-0", "rollout-0"):
        assert DUMP_SIGNAL not in running.host[name].received
        assert running.host[name].received[-1] == signal.SIGKILL


def test_what_outlives_its_sigkill_is_named_and_left(job: JobStarter) -> None:
    running = job(runs, is_interrupted)
    running.host.obeyed = set()
    assert running.run() == 128 + signal.SIGINT
    assert running.lines[-1].endswith("is still alive after SIGKILL")
    assert "policy-0 (pid 101)" in running.lines[-1]


def test_rank_that_is_silent_and_stopped_is_killed_and_its_group_restarted(job: JobStarter) -> None:
    def rank_is_dead(job: Job) -> models.Status:
        progress = ProgressReport(doing="training", seconds=1.0)
        dead = MemberStatus(
            name="policy-0",
            role=Role.POLICY,
            state=MemberState.DEAD,
            reason="silent for 0.1 s",
            pid=job.host["policy-0"].pid,
            silence=0.1,
            progress=progress,
        )
        return status(members=[dead])

    running = job(rank_is_dead, runs, Job.finish)
    assert running.run() == ExitCode.OK
    assert "policy-0 is silent for 0.1 s and is killed" in running.lines
    assert [each.name for each in running.host.started].count("policy-0") == 2


def test_controller_that_ends_early_ends_the_job_which_has_failed(job: JobStarter) -> None:
    running = job(runs, ends("controller", 14))
    assert running.run() == ExitCode.FAILED
    assert running.supervisor.ending().reason.startswith("the controller ended early: exit code 14")
    assert running.host["policy-0"].received == [signal.SIGTERM]


def test_controller_that_stops_answering_does_not_hold_the_end_up(job: JobStarter) -> None:
    def lost(_: Job) -> models.Status:
        raise ControllerLostError("the controller does not answer")

    running = job(runs, is_interrupted, *[lost] * 100)
    assert running.run() == 128 + signal.SIGINT


def test_processes_are_released_on_every_close(job: JobStarter) -> None:
    running = job()
    running.processes.close()
    running.processes.close()
    assert running.host.closed == 2
