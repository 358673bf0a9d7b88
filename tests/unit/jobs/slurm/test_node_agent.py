"""The agent of a node over a scripted host and a real connection to a head in a thread: no process is started."""

import selectors
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from scripted_host import ScriptedHost
from waiting import wait_until

from dray.clock import Deadline
from dray.jobs.exit_codes import ExitCode
from dray.jobs.folder import JobFolder, JobSpec
from dray.jobs.job_file import parse_job
from dray.jobs.launch.processes import JobProcess
from dray.jobs.messages.models import HeirFigures, Role
from dray.jobs.process import DUMP_SIGNAL, SignalInbox
from dray.jobs.slurm.head import NodeConnections, RemoteHost
from dray.jobs.slurm.node import NodeAgent
from dray.jobs.slurm.placement import placements
from dray.jobs.slurm.plan import Plan, Task

CONFIG = parse_job(
    {
        "job": {"name": "small", "max_steps": 10},
        "rollout": {"worker": "small.py:Worker", "replicas": 2},
        "policy": {"trainer": "small.py:Trainer", "batch_size": 8},
        "controller": {"heartbeat_interval": 0.1, "dead_after": 5.0},
        "timeouts": {"shutdown": 0.5, "start": 10.0},
    }
)


class Head:
    """The head's end, whose loop runs in a thread."""

    def __init__(self, task: Task, folder: JobFolder) -> None:
        plan = task.plan
        away = [each for each in placements(plan.config, task.nodes) if each.node == task.node]
        self.nodes = NodeConnections(folder, task.name, plan.secret, away, "127.0.0.1", 10.0)
        self.host: RemoteHost = self.nodes.hosts[task.node]
        self.selector = selectors.DefaultSelector()
        self.ended: list[JobProcess] = []
        spec = JobSpec(plan.config, plan.job_file, folder, plan.secret, "", "small-1", False, 0)
        spec.write()
        self.nodes.open(self.selector, spec)
        for index in (0, 1):
            self.host.start(Role.ROLLOUT, index)

    def until(self, condition: Callable[[], object], awaited: str) -> None:
        def turn() -> bool:
            for key, _ in self.selector.select(0.02):
                key.data()
            self.ended += self.host.collect()
            return bool(condition())

        wait_until(turn, awaited, pause=0.0)

    def until_both_run(self) -> tuple[JobProcess, JobProcess]:
        self.until(lambda: len(self.host.processes) == 2, "the reports of their start")
        first, second = self.host.processes
        return first, second


class Node:
    """A node's agent, and the head."""

    def __init__(self, folder: Path) -> None:
        (folder / ".run").mkdir()
        plan = Plan(
            config=CONFIG,
            job_file=folder / "job.toml",
            run_folder=folder,
            secret=bytes(32),
        )
        task = Task(plan, 1, 1, ("a", "b"), "b")
        self.head = Head(task, JobFolder(folder, task.name))
        self.selector = selectors.DefaultSelector()
        self.inbox = SignalInbox()
        self.host = ScriptedHost(self.selector)
        self.inherited = HeirFigures()
        placed = [each for each in placements(plan.config, task.nodes) if each.node == task.node]
        self.agent = NodeAgent(
            task, placed, self.host, lambda: self.inherited, selector=self.selector, inbox=self.inbox
        )

    def run(self, head: Callable[[Head], object]) -> int:
        """Run the agent while `head` does in a thread what a head does; returns the agent's exit code."""
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(head, self.head)
            code = self.agent.run()
            done.result(30.0)
        return code


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    opened = Node(tmp_path)
    yield opened
    opened.head.nodes.close()
    opened.head.host.close(Deadline.after(0))
    opened.head.selector.close()
    opened.inbox.close()
    opened.selector.close()
    opened.host.release()


def test_agent_starts_what_the_head_asks_for_and_kills_what_is_left_at_the_shutdown(node: Node) -> None:
    def head(head: Head) -> None:
        first, second = head.until_both_run()
        assert (first.name, first.pid) == ("rollout-0", 100)
        first.kill_group()
        head.until(lambda: head.ended == [first], "the report of its end")
        assert first.exit_code == -signal.SIGKILL
        assert second.running
        head.host.request_shutdown()
        deadline = Deadline.after(10.0)
        head.host.close(deadline)
        assert not deadline.expired

    assert node.run(head) == ExitCode.OK
    assert [each.name for each in node.host.started] == ["rollout-0", "rollout-1"]
    assert node.host["rollout-1"].received == [signal.SIGKILL]
    assert node.host.closed


def test_head_knows_what_the_node_has_inherited_until_its_end(node: Node) -> None:
    inherited = HeirFigures(rings=1, payloads=5, bytes=500, consumed=2, left=3)
    at_the_end = inherited.model_copy(update={"consumed": 5, "left": 0})

    def head(head: Head) -> None:
        head.until_both_run()
        node.inherited = inherited
        head.until(lambda: head.nodes.heir_figures() == [inherited], "the report of what was inherited")
        node.inherited = at_the_end
        head.host.request_shutdown()
        head.host.close(Deadline.after(10.0))

    assert node.run(head) == ExitCode.OK
    assert node.head.nodes.heir_figures() == [at_the_end]


def test_replica_is_restarted_when_the_head_asks_for_it(node: Node) -> None:
    def head(head: Head) -> None:
        first, _ = head.until_both_run()
        first.kill_group()
        head.until(lambda: head.ended == [first], "the report of its end")
        head.host.start(Role.ROLLOUT, 0)
        head.until(lambda: head.host.processes[0] is not first, "the report of the new one")
        assert head.host.processes[0].running
        head.host.request_shutdown()

    assert node.run(head) == ExitCode.OK
    assert [each.name for each in node.host.started] == ["rollout-0", "rollout-1", "rollout-0"]


def test_replicas_whose_head_is_gone_are_asked_to_end_and_killed_in_time(node: Node) -> None:
    node.host.obeyed = {signal.SIGKILL}

    def head(head: Head) -> None:
        head.until_both_run()
        head.nodes.close()
        head.host.close(Deadline.after(0))

    assert node.run(head) == ExitCode.CONTROLLER_LOST
    for name in ("rollout-0", "rollout-1"):
        assert node.host[name].received == [signal.SIGTERM, DUMP_SIGNAL, signal.SIGKILL]


def test_agent_that_receives_a_signal_reports_to_the_head_that_it_has_ended_its_replicas(node: Node) -> None:
    def head(head: Head) -> None:
        head.until_both_run()
        signal.raise_signal(signal.SIGTERM)
        head.until(lambda: len(head.ended) == 2, "the reports of their ends")
        assert [each.ending for each in head.ended] == ["its node b was asked to end and sent it SIGTERM"] * 2

    assert node.run(head) == 128 + signal.SIGTERM
    assert node.host["rollout-0"].received == [signal.SIGTERM]
