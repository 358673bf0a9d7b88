"""Runs on the virtual cluster: the batch script under Slurm, with processes on three nodes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import SlurmCluster
from slurm_run import GOAL, SlurmRun

from dray.jobs.exit_codes import ExitCode
from dray.jobs.slurm.plan import Plan
from dray.jobs.slurm.run_state import RunState

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")
CARTPOLE = Path(__file__).parents[2] / "examples" / "cartpole" / "job.toml"


@pytest.fixture
def run(cluster: SlurmCluster, tmp_path: Path) -> SlurmRun:
    return SlurmRun(cluster, tmp_path / "it is 100 % odd")


def test_cartpole_is_solved_by_a_policy_on_one_node_and_rollouts_on_two_others(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("gymnasium")
    run = SlurmRun(cluster, tmp_path / "cartpole", CARTPOLE)

    run.submit("--nodes=3", "--interface=lo", "--time=00:10:00", "--set=job.lane=tcp")

    assert run.end(240.0)["JobState"] == "COMPLETED", run.story()
    assert run.summary()["solved"]
    assert run.summary()["lane"] == "tcp"
    assert (run.record().state, run.ends()) == (RunState.FINISHED, [(1, 1, 0)])
    assert {path.name for path in (run.output / "latest" / "logs").iterdir()} >= {
        "controller.log",
        "policy-0.log",
        "rollout-0.log",
        "rollout-1.log",
        "head.out",
        "rollout-nodes.out",
    }


def test_job_writes_a_checkpoint_before_its_time_limit_and_continues_in_another_part(run: SlurmRun) -> None:
    # Slurm sends its signal up to a minute early: after 30 to 90 seconds here.
    goal = 2 * GOAL
    run.submit("--time=00:02:00", "--pre-timeout=30", f"--set=stop.at_least={goal}")
    run.wait_until(lambda: run.record().state is RunState.REQUEUED, "requeueing", 150.0)
    saved = run.checkpoint()["step"]
    assert saved == run.steps()[-1] > 0
    run.go()

    assert run.end()["Restarts"] == "1", run.story()
    assert run.ends() == [(1, 1, ExitCode.TIME_LIMIT), (2, 1, 0)]
    assert run.record().remaining_retries == 2
    assert run.steps() == list(range(1, goal + 1))
    assert run.summary()["steps_of_this_run"] == goal - saved
    assert f"resuming from step {saved}" in run.log("policy-0.log")


def test_job_continues_when_a_rollout_node_is_killed(run: SlurmRun) -> None:
    run.submit()
    run.wait_for_steps(3)
    run.cluster.kill_node("n3")
    before = len(run.steps())
    run.wait_for_steps(before + 3)
    run.go()

    assert run.end()["JobState"] == "COMPLETED", run.story()
    assert run.ends() == [(1, 1, 0)]
    assert run.summary()["solved"]
    assert run.summary()["replicas"]["rollout-1"].startswith("dead")


@pytest.mark.parametrize("parents_first", [False, True], ids=["at once", "parents first"])
def test_job_resumes_when_the_node_of_policy_and_script_is_killed(run: SlurmRun, parents_first: bool) -> None:
    run.submit("--nodes=2")
    saved = run.wait_for_checkpoint()
    run.cluster.kill_node("n1", parents_first=parents_first)
    run.go()

    assert run.end()["Restarts"] == "1", run.story()
    assert run.ends() == [(1, 1, None), (2, 1, 0)]
    assert run.record().remaining_retries == 1
    assert run.summary()["solved"]
    assert GOAL - run.summary()["steps_of_this_run"] >= saved > 0
    assert "n1" not in run.cluster.nodes_of(run.job)


def test_policy_that_spans_two_nodes_resumes_when_one_is_killed(run: SlurmRun) -> None:
    two = ["--set=policy.replicas=2", "--set=policy.readers=2", "--policy-nodes=2"]
    run.submit(*two, "--set=rollout.replicas=2", "--nodes=3")
    saved = run.wait_for_checkpoint()
    run.cluster.kill_node("n2")
    run.wait_until(lambda: run.record().state is RunState.REQUEUED, "requeueing")
    run.cluster.revive_node("n2")
    run.go()

    assert run.end()["Restarts"] == "1", run.story()
    assert [end[:2] for end in run.ends()] == [(1, 1), (2, 1)]
    assert run.summary()["solved"]
    assert GOAL - run.summary()["steps_of_this_run"] >= saved > 0


def test_failing_job_is_retried_n_times_and_then_failed(run: SlurmRun) -> None:
    run.submit("--retries=2", "--set=policy.args.raises=true", "--set=policy.restarts=0")

    ended = run.end(150.0)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "1:0"), run.story()
    assert run.record().state is RunState.FAILED
    assert [end[:2] for end in run.ends()] == [(1, 1), (1, 2), (1, 3)]
    for end in run.record().ends:
        assert end.exit_code == ExitCode.USER_CODE
        assert end.reason.startswith("no policy replica is left: policy-0: Trainer.train_step() raised ")
    assert "the trainer broke" in run.log("policy-0.log", "001.1")
    assert "state failed" in run.dray("status", str(run.output))
    assert "head.out: " in run.dray("status", str(run.output))


def test_finished_job_whose_controller_gets_sigterm_runs_once_and_exits_with_zero(run: SlurmRun) -> None:
    run.submit()
    run.wait_for_steps(1)
    # The controller waits for a replica to leave; the replica is blocked until the controller has its signal.
    held_by = run.output / "rollout-1-held"
    os.mkfifo(held_by)
    with held_by.open("w"):
        held_by.unlink()
        run.go()
        run.wait_until(lambda: run.checkpoint()["outcome"] == "solved", "the last checkpoint")
        run.only("dray.jobs.controller.app").send_signal(signal.SIGTERM)

    ended = run.end()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "0"), run.story()
    assert run.ends() == [(1, 1, 0)]


def test_finished_run_is_not_run_again_by_a_second_job(run: SlurmRun) -> None:
    run.submit()
    run.wait_for_steps(1)
    run.go()
    assert run.end()["JobState"] == "COMPLETED", run.story()
    steps = run.steps()

    assert "has already finished" in run.dray("submit", str(run.job_file), "--output", str(run.output), "--resume")
    run.job = int(run.cluster.command("sbatch", "--parsable", run.output / ".slurm" / "job.sh"))
    ended = run.end()
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0")
    assert run.ends() == [(1, 1, 0)]
    assert run.steps() == steps


def test_cancelled_job_is_not_retried_and_can_be_resumed(run: SlurmRun) -> None:
    run.submit()
    run.wait_for_steps(3)
    run.cluster.command("scancel", str(run.job))

    assert run.end()["JobState"] == "CANCELLED", run.story()
    assert run.record().state is RunState.CANCELLED
    assert [end[:2] for end in run.ends()] == [(1, 1)]
    assert run.record().remaining_retries == 2
    saved = run.checkpoint()["step"]
    assert saved >= run.steps()[-1] > 0, "the policy had time for a checkpoint"

    run.submit("--resume")
    run.go()
    assert run.end()["JobState"] == "COMPLETED", run.story()
    assert [end[:2] for end in run.ends()] == [(1, 1), (2, 1)]
    # Redis gets SIGTERM together with the policy, whose last step may have no line in the metrics.
    assert set(range(1, GOAL + 1)) - set(run.steps()) <= {saved}
    assert run.steps() == sorted(set(run.steps()))


def test_cancelled_job_leaves_no_secret_if_slurm_kills_its_head(run: SlurmRun) -> None:
    """A rollout replica does not end, so the head waits longer for it than Slurm waits before SIGKILL."""
    run.submit("--set=timeouts.shutdown=15")
    run.wait_for_steps(1)
    held_by = run.output / "rollout-1-held"
    os.mkfifo(held_by)
    with held_by.open("w"):  # opening succeeds once the replica reads it
        run.cluster.command("scancel", str(run.job))
        assert run.end()["JobState"] == "CANCELLED", run.story()

    assert not (run.output / ".run").exists()
    assert run.record().state is RunState.CANCELLED
    lines = (run.output / f"slurm-{run.job}.out").read_text().splitlines()
    assert all(STAMP.match(line) for line in lines if " == " in line)
    assert any(STAMP.match(line) for line in run.log("head.out").splitlines())


def test_waiting_run_can_be_cancelled_and_too_many_nodes_are_refused(
    run: SlurmRun,
) -> None:
    with pytest.raises(
        AssertionError, match="--nodes = 5 is not allowed: must be at most 3, the number of nodes of the default"
    ):
        run.submit("--nodes=5", "--set=rollout.replicas=4")
    run.submit("--nodes=1", "--sbatch-arg=--hold")
    assert "state submitted  in Slurm pending" in run.dray("status", str(run.output))
    run.cluster.command("scancel", str(run.job))
    assert run.end()["JobState"] == "CANCELLED"
    assert "state cancelled  in Slurm -" in run.dray("status", str(run.output))


def test_job_that_slurm_requeues_continues_and_uses_no_retry(run: SlurmRun) -> None:
    run.submit()
    saved = run.wait_for_checkpoint()
    run.cluster.command("scontrol", "requeue", str(run.job))
    run.go()

    assert run.end()["Restarts"] == "1", run.story()
    assert [end[:2] for end in run.ends()] == [(1, 1), (2, 1)]
    assert run.record().remaining_retries == 2
    assert GOAL - run.summary()["steps_of_this_run"] >= saved


def test_edits_after_the_submission_do_not_affect_the_job(run: SlurmRun) -> None:
    run.submit("--nodes=1", "--sbatch-arg=--hold")
    (run.folder / "small.py").write_text("raise RuntimeError('edited')\n")
    with pytest.raises(AssertionError, match="must be a run without a waiting or running job"):
        run.submit("--resume")
    run.cluster.command("scontrol", "release", str(run.job))
    run.wait_for_steps(1)
    run.go()
    assert run.end()["JobState"] == "COMPLETED", run.story()


def test_replicas_have_their_share_of_a_node_and_none_shows_the_secret(run: SlurmRun) -> None:
    words = "it's $HOME"
    run.submit("--nodes=2", "--gpus-per-node=2", f"--env=DRAY_WORDS={words}")
    run.wait_for_steps(1)
    seen = {name: run.environment(name) for name in ("policy-0", "rollout-0", "rollout-1")}
    devices = {name: found["CUDA_VISIBLE_DEVICES"] for name, found in seen.items()}
    assert devices == {"policy-0": "0,1", "rollout-0": "0", "rollout-1": "1"}
    nodes = {name: found["DRAY_REPLICA_NODES"] for name, found in seen.items()}
    assert nodes == {"policy-0": "n1", "rollout-0": "n2", "rollout-1": "n2"}
    assert {found["SLURMD_NODENAME"] for found in seen.values()} == {"n1", "n2"}
    assert {found["DRAY_WORDS"] for found in seen.values()} == {words}

    secret = Plan.read(run.output / ".slurm" / "plan.json").secret.hex()
    running = [process for process in run.cluster.processes() if process.name() != "slurmstepd"]
    shown = [" ".join([*process.cmdline(), *process.environ().values()]) for process in running]
    assert len(shown) > 10
    assert not any(secret in each for each in shown)
    run.go()
    assert run.end()["JobState"] == "COMPLETED", run.story()


def test_everything_of_a_container_job_runs_in_the_image(run: SlurmRun, tmp_path: Path) -> None:
    # This Slurm has no pyxis: a replacement of srun records its options and removes those of pyxis.
    real, recorded = run.cluster.command("which", "srun").strip(), tmp_path / "recorded"
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "srun").write_text(
        f"""#!/bin/bash
        echo "$@" >>{recorded}
        for each; do shift; [[ $each == --container-* ]] || set -- "$@" "$each"; done
        exec {real} "$@"
        """
    )
    (tools / "python3").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    run.environ["PATH"] = f"{tools}:{run.environ['PATH']}"

    run.submit("--nodes=2", "--container=registry#image", "--container-mount=/data:/data")
    run.wait_for_steps(1)
    run.cluster.command("scancel", str(run.job))
    assert run.end()["JobState"] == "CANCELLED", run.story()
    assert "state cancelled" in run.dray("status", str(run.output))
    run.submit("--resume", "--nodes=2", "--container=registry#image")
    run.go()
    assert run.end()["JobState"] == "COMPLETED", run.story()

    assert [end[:2] for end in run.ends()] == [(1, 1), (2, 1)]
    assert run.record().ends[0].reason == "cancelled"
    mounts = f"--container-mounts={run.output}:{run.output}"
    steps = [line for line in recorded.read_text().splitlines() if "dray.jobs.slurm" in line]
    assert {word for line in steps for word in line.split() if word.startswith("dray.jobs.slurm")} == {
        "dray.jobs.slurm.run_state",
        "dray.jobs.slurm.head",
        "dray.jobs.slurm.node",
    }
    assert all("--container-image=registry#image" in line and mounts in line for line in steps)


def test_status_follows_a_run_until_it_has_ended(run: SlurmRun) -> None:
    run.submit("--nodes=1")
    with subprocess.Popen(
        [sys.executable, "-m", "dray.cli.app", "slurm", "status", "--watch", "--interval=0.5"],
        cwd=run.folder,
        env=run.cluster.environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as watching:
        run.wait_for_steps(3)
        run.go()
        assert run.end()["JobState"] == "COMPLETED", run.story()
        shown, _ = watching.communicate(timeout=60)
    assert watching.returncode == 0
    assert "state running  in Slurm running  part 1.1" in shown
    assert f"state finished  in Slurm -  part 1.1  step {GOAL}/" in shown.splitlines()[-2]
