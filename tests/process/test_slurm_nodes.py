"""The processes of a job's nodes, on real processes without Slurm: all nodes are this machine's loopback."""

import json
import re
import signal
from pathlib import Path

import pytest
from node_runner import SECRET, nodes_running, two_machines

from dray.files import write_json
from dray.jobs.slurm.placement import choose_interface, interfaces
from dray.ring.direct import direct_problem

OUTSIDE = [each for each in interfaces() if not each.is_loopback]
FOREVER = "stop.at_least=1e9"


@pytest.mark.measured
def test_job_on_three_nodes_is_solved(tmp_path: Path) -> None:
    with nodes_running(tmp_path) as run:
        run.start()
        assert run.end() == [0, 0, 0], run.story()
        summary = run.summary()
        assert (summary["solved"], summary["steps"], summary["lane"]) == (True, 20, "tcp")
        assert summary["replicas"].keys() == {"policy-0", "rollout-0", "rollout-1"}
        assert {log.name for log in run.log_folder.iterdir()} >= {
            "controller.log", "policy-0.log", "rollout-0.log", "rollout-1.log", "supervisor.log",
        }  # fmt: skip
        assert (run.output / "latest").resolve() == run.log_folder.parent
        text = run.story()
        assert SECRET.hex() not in text
        assert "redis://:" not in text


def test_job_continues_when_a_rollout_node_dies(tmp_path: Path) -> None:
    settings = ("stop.at_least=40", "policy.args.pause=0.05", "policy.args.repeats=true")
    with nodes_running(tmp_path, *settings) as run:
        run.start()
        run.wait_for_steps(3)
        run.kill_node(3)
        assert run.end() == [0, 0, -signal.SIGKILL], run.story()
        assert "rollout-1 ended early: its node" in run.log("n1.out")
        assert run.summary()["solved"]
        assert run.summary()["replicas"]["rollout-1"].startswith("dead: its node")


@pytest.mark.skipif(bool(direct_problem()), reason=direct_problem() or "-")
def test_h1_payloads_of_a_killed_rollout_replica_come_from_the_heir_on_its_node(tmp_path: Path) -> None:
    settings = (
        "stop.at_least=12", "policy.args.pause=0.3", "policy.args.repeats=true", "rollout.work_items_in_flight=32",
    )  # fmt: skip
    with nodes_running(tmp_path, *settings, rollout_nodes=1) as run:
        run.start()
        run.wait_for_steps(1)
        run.rollout_with_payloads(12).kill()
        assert run.end() == [0, 0], run.story()
        summary, kept = run.summary(), re.findall(r"has died; (\d+) payloads", run.log("n2.out"))
        assert sum(each.startswith("dead: killed by signal 9") for each in summary["replicas"].values()) == 1
        assert summary["lost"] == summary["delivery"]["discarded"] == 0, run.story()
        assert summary["payloads"] == 12 * 8
        heirs = summary["heirs"]
        assert heirs["payloads"] == int(kept[0]) == heirs["consumed"] + heirs["left"], run.story()
        assert heirs["consumed"] >= 1, run.story()
        assert heirs["dropped"] == 0


def test_job_ends_when_no_rollout_node_is_left(tmp_path: Path) -> None:
    with nodes_running(tmp_path, FOREVER, rollout_nodes=1) as run:
        run.start()
        run.wait_for_steps(3)
        run.kill_node(2)
        assert run.end(bound=30.0) == [1, -signal.SIGKILL], run.story()
        assert "no rollout replica is left" in run.log("n1.out")


def test_policy_on_two_nodes_trains_in_step(tmp_path: Path) -> None:
    settings = ("policy.replicas=2", "policy.readers=2")
    with nodes_running(tmp_path, *settings, policy_nodes=2, rollout_nodes=1) as run:
        run.start()
        assert run.end() == [0, 0, 0], run.story()
        assert run.summary()["solved"]
        assert run.checkpoint()["ranks"] == 2
        parts = [json.loads((run.output / "checkpoint" / f"{name}/trainer.json").read_text()) for name in
                 ("trainer", "trainer-1")]  # fmt: skip
        assert parts[0] == parts[1]


@pytest.mark.measured
def test_lost_policy_node_ends_the_attempt_and_the_next_resumes_from_the_checkpoint(tmp_path: Path) -> None:
    settings = (
        "policy.replicas=2", "policy.readers=2", "policy.checkpoint_every=3", "stop.at_least=40",
        "policy.args.pause=0.05", "policy.args.restarts=true", "rollout.args.restarts=true",
        "policy.args.repeats=true",
    )  # fmt: skip
    with nodes_running(tmp_path, *settings, policy_nodes=2, rollout_nodes=1) as run:
        run.start()
        run.wait_for_steps(5)
        run.kill_node(2)
        codes = run.end(bound=30.0)
        assert codes[0] == 1, run.story()
        assert "policy-1 ended early: its node" in run.log("n1.out")
        run.start(attempt=2)
        assert run.end() == [0, 0, 0], run.story()
        assert "resuming from step" in run.log("policy-0.log")
        assert run.summary()["solved"]
        assert (run.output / "latest").resolve().name == "001.2"


def test_policy_on_one_node_is_restarted_in_place(tmp_path: Path) -> None:
    settings = (
        "policy.checkpoint_every=3", "stop.at_least=40", "policy.args.pause=0.05",
        "policy.args.restarts=true", "rollout.args.restarts=true", "policy.args.repeats=true",
    )  # fmt: skip
    with nodes_running(tmp_path, *settings, rollout_nodes=1) as run:
        run.start()
        run.wait_for_steps(5)
        for process in run.processes("dray.jobs.replica.policy"):
            process.kill()
        assert run.end() == [0, 0], run.story()
        assert "restarting the policy group (restart 1 of 3)" in run.log("n1.out")


def test_time_limit_leaves_a_checkpoint_that_the_next_part_resumes_from(tmp_path: Path) -> None:
    with nodes_running(tmp_path, "stop.at_least=40", "policy.args.pause=0.05") as run:
        run.start()
        run.wait_for_steps(5)
        run.tasks[1].send_signal(signal.SIGUSR2)
        assert run.end(bound=30.0) == [140, 0, 0], run.story()
        assert "the time limit is near" in run.log("n1.out")
        step = run.checkpoint()["step"]
        assert 5 <= step < 40
        run.start(part=2)
        assert run.end() == [0, 0, 0], run.story()
        assert f"resuming from step {step}" in run.log("policy-0.log")
        run.start(part=3, nodes=[1])
        run.tasks = {1: run.tasks[1]}
        assert run.end(bound=30.0) == [0], run.story()
        assert "solved already" in run.log("n1.out")


def test_everything_ends_when_the_head_dies(tmp_path: Path) -> None:
    with nodes_running(tmp_path, FOREVER) as run:
        run.start()
        run.wait_for_steps(3)
        run.kill_node(1)
        for number in (2, 3):
            assert run.tasks[number].wait(20.0) == 11, run.story()
            assert "the head is gone" in run.log(f"n{number}.out")
        assert not run.processes(), run.story()


def test_hanging_replica_is_killed_in_time_when_the_head_dies(tmp_path: Path) -> None:
    settings = (FOREVER, "rollout.args.hang_at=16", "rollout.args.hanging=[1]")
    with nodes_running(tmp_path, *settings) as run:
        run.start()
        run.wait_until((run.output / "rollout-1-hangs").exists, "a hanging rollout", 60.0)
        run.kill_node(1)
        # `timeouts.shutdown` is 6 s here.
        assert run.tasks[3].wait(12.0) == 11, run.story()
        assert "shutdown: rollout-1: kill" in run.log("n3.out")
        assert run.tasks[2].wait(12.0) == 11, run.story()
        assert not run.processes(), run.story()


def test_replicas_of_a_killed_node_supervisor_go_with_it(tmp_path: Path) -> None:
    with nodes_running(tmp_path, "stop.at_least=40", "policy.args.pause=0.05", "policy.args.repeats=true") as run:
        run.start()
        run.wait_for_steps(3)
        run.tasks[3].kill()
        run.tasks[3].wait()
        run.wait_until(lambda: not run.processes(node=3), "the end of its replicas", 10.0)
        assert run.end()[0] == 0, run.story()


@pytest.mark.parametrize("number", [1, 2])
def test_sigterm_to_a_node_ends_what_is_there_in_order(tmp_path: Path, number: int) -> None:
    with nodes_running(tmp_path, FOREVER, rollout_nodes=1) as run:
        run.start()
        run.wait_for_steps(3)
        run.tasks[number].send_signal(signal.SIGTERM)
        codes = run.end(bound=30.0)
        assert codes == ([143, 0] if number == 1 else [1, 143]), run.story()
        assert "killed" not in run.log("n1.out")
        if number == 2:
            assert "rollout-0 ended early: its node" in run.log("n1.out")
            assert "was asked to end and sent it SIGTERM" in run.log("n1.out")


def test_node_behind_a_dead_network_is_lost_on_both_sides(tmp_path: Path) -> None:
    with (
        two_machines() as (near, far),
        nodes_running(tmp_path, FOREVER, "policy.args.repeats=true", interface=near.interface) as run,
    ):
        run.start(nodes=[1, 2], within=near.command)
        run.start(nodes=[3], within=far.command)
        run.wait_for_steps(3)
        far.cut()
        # dead_after is 3 s here; the kernel counts in whole intervals of its own.
        run.wait_until(lambda: "rollout-1 ended early: its node" in run.log("n1.out"), "the head's notice", 10.0)
        assert run.tasks[3].wait(15.0) == 11, run.story()
        assert "the head is gone" in run.log("n3.out")
        assert not run.processes(node=3)
        run.wait_for_steps(run.step() + 3)
        run.tasks[1].send_signal(signal.SIGTERM)
        assert run.end(bound=30.0) == [143, 0, 11], run.story()


def test_policy_rank_behind_a_dead_network_ends_the_attempt(tmp_path: Path) -> None:
    settings = (FOREVER, "policy.replicas=2", "policy.readers=2")
    with (
        two_machines() as (near, far),
        nodes_running(tmp_path, *settings, policy_nodes=2, rollout_nodes=1, interface=near.interface) as run,
    ):
        run.start(nodes=[1, 3], within=near.command)
        run.start(nodes=[2], within=far.command)
        run.wait_for_steps(3)
        far.cut()
        assert run.end(bound=30.0) == [1, 11, 0], run.story()
        assert "policy-1 ended early: its node" in run.log("n1.out")


def test_hanging_replica_of_another_node_is_killed_in_time(tmp_path: Path) -> None:
    settings = (FOREVER, "rollout.args.hang_at=16", "rollout.args.hanging=[1]")
    with nodes_running(tmp_path, *settings) as run:
        run.start()
        run.wait_until((run.output / "rollout-1-hangs").exists, "a hanging rollout", 60.0)
        run.tasks[1].send_signal(signal.SIGTERM)
        assert run.end(bound=30.0) == [143, 0, 0], run.story()
        assert "rollout-1 (pid " in run.log("n1.out")
        assert ") did not end in time and was killed" in run.log("n1.out")
        assert "most recent call first" in run.log("rollout-1.log")


def test_replica_of_another_node_may_hold_the_interpreter_and_may_not_be_stopped(tmp_path: Path) -> None:
    (tmp_path / "holding.py").write_text(
        "import ctypes, small\n"
        "class Worker(small.Worker):\n"
        "    def rollout(self, work_item):\n"
        "        if self.hangs.with_name(f'hold-{self.index}').exists() and not self.hangs.exists():\n"
        "            self.hangs.touch()\n"
        "            ctypes.PyDLL(None).sleep(4)\n"
        "        return super().rollout(work_item)\n"
    )
    # Payloads that the stopped replica has published come with their references.
    settings = ("rollout.worker=holding.py:Worker", "rollout.inline_bytes=4096", "policy.args.repeats=true")
    with nodes_running(tmp_path, *settings, "stop.at_least=40", "timeouts.shutdown=3") as run:
        run.start()
        run.wait_for_steps(3)
        (run.output / "hold-0").touch()
        (stopped,) = run.processes("dray.jobs.replica.rollout", node=3)
        stopped.suspend()
        assert run.end() == [0, 0, 0], run.story()
        assert (run.output / "rollout-0-hangs").exists()
        replicas = run.summary()["replicas"]
        assert replicas["rollout-0"].startswith("left: ")
        assert replicas["rollout-1"].startswith("dead: silent for")


def test_stopped_node_is_done_without_and_holds_the_end_up_for_a_bounded_time(tmp_path: Path) -> None:
    settings = ("stop.at_least=60", "policy.args.pause=0.1", "policy.args.repeats=true", "timeouts.shutdown=3")
    with nodes_running(tmp_path, *settings) as run:
        run.start()
        run.wait_for_steps(3)
        for process in run.processes(node=3):
            process.suspend()
        assert run.tasks[1].wait(60.0) == 0, run.story()
        assert run.tasks[2].wait(10.0) == 0, run.story()
        assert "silent for" in run.summary()["replicas"]["rollout-1"]
        assert not run.processes(node=1)
        assert not run.processes(node=2)


def test_node_that_never_comes_is_done_without(tmp_path: Path) -> None:
    with nodes_running(tmp_path) as run:
        run.start(nodes=[1, 2])
        assert run.end() == [0, 0], run.story()
        assert run.summary()["solved"]


def test_job_whose_policy_node_never_comes_fails_within_the_time_to_start(tmp_path: Path) -> None:
    settings = ("policy.replicas=2", "policy.readers=2", "timeouts.start=8")
    with nodes_running(tmp_path, *settings, policy_nodes=2, rollout_nodes=1) as run:
        run.start(nodes=[1, 3])
        assert run.end(bound=40.0)[0] == 1, run.story()
        assert "not every replica registered within 8 s" in run.log("n1.out")


def test_loopback_of_another_machine_is_refused(tmp_path: Path) -> None:
    with nodes_running(tmp_path) as run:
        (run.output / ".run").mkdir(mode=0o700)
        address = {"host": "127.0.0.1", "port": 9, "attempt": "001.1", "job_id": "x", "boot_id": "another"}
        write_json(run.output / ".run" / "head.json", address, mode=0o600)
        run.start(nodes=[2])
        assert run.tasks[2].wait(30.0) == 2, run.story()
        assert "slurm.interface = '127.0.0.1' is not allowed" in run.log("n2.out")


@pytest.mark.skipif(not OUTSIDE, reason="this machine has no network interface but loopback")
def test_nodes_talk_over_the_interface_that_is_chosen_and_not_over_loopback(tmp_path: Path) -> None:
    with nodes_running(tmp_path, rollout_nodes=1, interface=None) as run:
        run.start()
        run.wait_until(lambda: run.processes("dray.jobs.replica.rollout"), "a rollout replica")
        chosen = choose_interface(None).address
        assert run.processes("dray.jobs.replica.rollout")[0].environ()["DRAY_ADDRESS"] == chosen
        for name in ("controller.json", "head.json", "job.json"):
            assert "127.0.0." not in (run.output / ".run" / name).read_text().replace('"host": "127.0.0.1"', "", 1)
        assert run.end() == [0, 0], run.story()
        assert run.summary()["solved"]


@pytest.mark.parametrize(
    ("setting", "key"),
    [("job.lane=shm", "job.lane"), ("redis.url=unix://:word@/tmp/none.sock", "redis.url")],
)
def test_what_is_for_one_machine_only_is_refused(tmp_path: Path, setting: str, key: str) -> None:
    with nodes_running(tmp_path, setting) as run:
        run.start(nodes=[1])
        assert run.tasks[1].wait(30.0) == 2, run.story()
        assert f"error: {key} = " in run.log("n1.out")
        assert "word" not in run.log("n1.out")


def test_node_without_a_head_gives_up(tmp_path: Path) -> None:
    with nodes_running(tmp_path, "timeouts.start=1") as run:
        run.start(nodes=[2])
        assert run.tasks[2].wait(30.0) == 11, run.story()
        assert "there is no head: it has not written" in run.log("n2.out")


def test_job_on_a_single_node_is_as_on_this_machine(tmp_path: Path) -> None:
    with nodes_running(tmp_path, rollout_nodes=0, interface=None, environment={"DRAY_TEST": "set"}) as run:
        run.start()
        run.wait_until(lambda: run.processes("dray.jobs.replica.rollout"), "a rollout replica")
        environment = run.processes("dray.jobs.replica.rollout")[0].environ()
        assert (environment["DRAY_TEST"], environment["DRAY_ADDRESS"]) == ("set", "127.0.0.1")
        assert environment["DRAY_REPLICA_NODES"] == run.nodes[0]
        assert run.end() == [0], run.story()
        assert run.summary()["solved"]
