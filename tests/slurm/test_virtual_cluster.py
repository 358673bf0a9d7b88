"""The virtual cluster behaves as the tests of this folder need."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from cluster import ClusterFailed, SlurmCluster
from slurm_conf import NODE_TIMEOUT

pytestmark = pytest.mark.slurm


def batch_script(folder: Path, *lines: str) -> Path:
    script = folder / "job.sh"
    script.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    return script


def test_a_job_runs_on_three_nodes_and_each_task_sees_its_own(cluster: SlurmCluster, tmp_path: Path) -> None:
    script = batch_script(tmp_path, "srun bash -c 'echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES'")

    job = cluster.submit(script, "--nodes=3", "--gpus-per-node=1")

    assert cluster.wait_for_end(job)["JobState"] == "COMPLETED"
    assert cluster.nodes_of(job) == list(cluster.nodes)
    assert sorted(Path(f"{script}.out").read_text().split("\n")[:-1]) == ["n1 0", "n2 0", "n3 0"]
    assert cluster.processes() == []


def test_a_killed_node_loses_its_processes_and_can_be_revived(cluster: SlurmCluster, tmp_path: Path) -> None:
    step = "srun --overlap --nodes=1 --ntasks=1 --nodelist={} bash -c 'setsid sleep 600 & sleep 600' &"
    script = batch_script(tmp_path, step.format("n1"), step.format("n2"), "wait")
    job = cluster.submit(script, "--nodes=2", "--no-kill", "--no-requeue")
    cluster.wait_for_job(job, "RUNNING")
    cluster.wait_until(lambda: _sleeping(cluster, "n1") == _sleeping(cluster, "n2") == 2, "two processes each")

    cluster.kill_node("n2")

    assert cluster.processes("n2") == []
    assert cluster.dead_nodes() == ["n2"]
    assert cluster.node("n2")["State"].startswith("DOWN")
    assert cluster.job(job)["JobState"] == "RUNNING"
    assert _sleeping(cluster, "n1") == 2
    cluster.cancel_all()
    assert cluster.processes("n1") == []
    cluster.revive_node("n2")
    assert cluster.wait_for_end(cluster.submit(batch_script(tmp_path, "true"), "-w", "n2"))["BatchHost"] == "n2"


def test_a_node_that_dies_unreported_is_noticed(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = cluster.submit(batch_script(tmp_path, "sleep 600"), "--no-requeue")
    name = cluster.wait_for_job(job, "RUNNING")["BatchHost"]

    cluster.kill_node(name, reported=False)

    assert cluster.wait_for_end(job, bound=6 * NODE_TIMEOUT)["JobState"] == "NODE_FAIL"


def test_a_requeued_job_runs_again_within_seconds(cluster: SlurmCluster, tmp_path: Path) -> None:
    script = batch_script(
        tmp_path,
        'echo "start ${SLURM_RESTART_COUNT:-0}"',
        '[ "${SLURM_RESTART_COUNT:-0}" = 1 ] || { scontrol requeue "$SLURM_JOB_ID"; sleep 600; }',
    )

    job = cluster.submit(script, "--requeue", "--open-mode=append")

    cluster.wait_for_job(job, "PENDING", restarts=1)
    ended = cluster.wait_for_job(job, "COMPLETED", bound=cluster.requeue_seconds + 20.0)
    assert ended["Restarts"] == "1"
    assert "start 0\n" in Path(f"{script}.out").read_text()
    assert "start 1\n" in Path(f"{script}.out").read_text()


def test_waiting_for_a_state_that_can_no_longer_be_reached_fails_at_once(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    job = cluster.submit(batch_script(tmp_path, "exit 3"))

    with pytest.raises(ClusterFailed, match=r"ended.*ExitCode.*3:0"):
        cluster.wait_for_job(job, "COMPLETED")


def test_nothing_is_left_of_a_cluster_that_stops_with_running_jobs(tmp_path: Path) -> None:
    with SlurmCluster.started() as another:
        job = another.submit(batch_script(tmp_path, "trap '' TERM; sleep 600; sleep 600"))
        another.wait_for_job(job, "RUNNING")
        another.wait_until(lambda: len(another.processes()) >= 2, "the script's processes")
        running = [*another.processes(), *another.daemons()]
    assert len(running) >= 7  # five daemons, a step and its script
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in running)
    assert not another.folder.exists()


def _sleeping(cluster: SlurmCluster, node: str) -> int:
    return [process.name() for process in cluster.processes(node)].count("sleep")
