"""The script, snapshot and folder that `dray slurm submit` writes, without Slurm."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dray.errors import ConfigError
from dray.jobs.config import JobConfig
from dray.jobs.folder import RunOptions
from dray.jobs.job_file import parse_job
from dray.jobs.slurm import submit as submission
from dray.jobs.slurm.plan import Plan, plan_path
from dray.jobs.slurm.run_state import RunRecord, RunState
from dray.jobs.slurm.scheduler import SlurmError
from dray.jobs.slurm.submit import prepare, submit, with_options

EVERYTHING = {
    "partition": "gpu",
    "account": "team a".replace(" ", "-"),
    "time": "1-12:00:00",
    "policy_nodes": 2,
    "rollout_nodes": 4,
    "gpus_per_node": 8,
    "pre_timeout": 300,
    "sbatch_args": ["--qos=high", "--comment=it's $HOME"],
    "container_image": "registry#team/image:1",
    "container_mounts": ["/data:/data:ro", "/a b:/c"],
    "environment": {"NCCL_DEBUG": "WARN", "WORDS": 'it\'s $HOME `id` "x" \\'},
}


def job(folder: Path, table: Mapping[str, Any] | None = None, **tables: Mapping[str, Any]) -> JobConfig:
    document = {
        "job": {"name": "small", "max_steps": 10, "output": str(folder / "out")},
        "rollout": {"worker": "small.py:Worker", "replicas": 4},
        "policy": {"trainer": "small.py:Trainer", "batch_size": 8, "replicas": 2},
        **tables,
    }
    return parse_job(document if table is None else {**document, "slurm": table})


def script(folder: Path, table: Mapping[str, Any] | None = None) -> str:
    return prepare(job(folder, table), folder / "job.toml", resume=False).script


def make_job_file(folder: Path) -> Path:
    (folder / "code").mkdir()
    (folder / "code" / "small.py").write_text("first = 1\n")
    (folder / "code" / "job.toml").write_text("")
    return folder / "code" / "job.toml"


# --- script ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "table", [None, {"rollout_nodes": 0, "policy_nodes": 1}, EVERYTHING], ids=["0", "1", "all"]
)
def test_script_passes_shellcheck(tmp_path: Path, table: Mapping[str, Any] | None) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    folder = tmp_path / "a folder, 100 % odd; $HOME & more"
    checked = subprocess.run(
        ["shellcheck", "--shell=bash", "-"],
        input=script(folder, table),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (checked.stdout, checked.stderr, checked.returncode) == ("", "", 0)


def test_script_contains_its_sbatch_options(tmp_path: Path) -> None:
    lines = script(tmp_path, EVERYTHING).splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert {
        "--nodes=6",
        "--exclusive",
        "--time=1-12:00:00",
        "--signal=B:USR1@300",
        "--requeue",
        "--no-kill",
        "--open-mode=append",
        "--partition=gpu",
        "--account=team-a",
        "--gpus-per-node=8",
        "--qos=high",
    } <= set(options)
    assert "policy_nodes=2" in lines


def test_environment_is_quoted_for_the_shell(tmp_path: Path) -> None:
    exports = [line for line in script(tmp_path, EVERYTHING).splitlines() if line.startswith("export WORDS=")]
    shown = subprocess.run(
        ["bash", "-c", f"{exports[0]}; printenv WORDS"], capture_output=True, text=True, timeout=60
    )
    assert shown.stdout == f"{EVERYTHING['environment']['WORDS']}\n"  # type: ignore[index]


def test_secret_is_in_the_plan_and_not_in_the_script(tmp_path: Path) -> None:
    prepared = prepare(job(tmp_path), tmp_path / "job.toml", resume=False)
    assert len(prepared.plan.secret) == 32
    assert prepared.plan.secret.hex() not in prepared.script
    assert prepare(job(tmp_path), tmp_path / "job.toml", resume=False).plan.secret != prepared.plan.secret


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"time": "00:02:00", "pre_timeout": 120}, "slurm.pre_timeout"),
        ({"pre_timeout": 8}, "slurm.pre_timeout"),
        ({"rollout_nodes": 3}, "slurm.rollout_nodes"),
    ],
)
def test_impossible_values_are_refused_before_anything_is_written(
    tmp_path: Path, table: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        script(tmp_path, table)
    assert caught.value.key == key
    assert list(tmp_path.iterdir()) == []


def test_folder_with_quotes_in_its_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a folder without quotes and backslashes"):
        script(tmp_path / "it's")


# --- options --------------------------------------------------------------------------------------------------


def test_options_replace_keys_and_extend_lists_and_tables(tmp_path: Path) -> None:
    config = job(tmp_path, {"partition": "cpu", "sbatch_args": ["--qos=a"], "environment": {"A": "1", "B": "1"}})
    options = {"partition": "gpu", "account": None, "sbatch_args": ["--qos=b"], "environment": {"B": "2"}}
    table = with_options(config, options).slurm
    assert table is not None
    assert (table.partition, table.account, table.sbatch_args) == ("gpu", None, ["--qos=a", "--qos=b"])
    assert table.environment == {"A": "1", "B": "2"}


def test_total_number_of_nodes_includes_those_of_the_policy(tmp_path: Path) -> None:
    table = with_options(job(tmp_path), {"policy_nodes": 2, "nodes": 6}).slurm
    assert table is not None
    assert (table.policy_nodes, table.rollout_nodes) == (2, 4)
    with pytest.raises(ConfigError, match=r"must be at least slurm\.policy_nodes, which is 2"):
        with_options(job(tmp_path), {"policy_nodes": 2, "nodes": 1})


def test_wrong_option_names_its_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="HH:MM:SS") as caught:
        with_options(job(tmp_path), {"time": "soon"})
    assert caught.value.key == "slurm.time"


# --- folder ---------------------------------------------------------------------------------------------------


def test_folder_of_an_earlier_run_is_refused_without_resume(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    RunRecord(RunState.FAILED, 0).write(tmp_path / "out")
    with pytest.raises(ConfigError, match="or go with --resume"):
        prepare(job(tmp_path), tmp_path / "job.toml", resume=False)


def test_nothing_to_resume_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(job(tmp_path), tmp_path / "job.toml", resume=True)
    assert caught.value.key == "--resume"


def test_finished_run_is_not_submitted_again(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    RunRecord(RunState.FINISHED, 2).write(tmp_path / "out")
    assert prepare(job(tmp_path), tmp_path / "job.toml", resume=True).record is None


def test_new_runs_get_numbered_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse_job(
        {
            "job": {"name": "small", "max_steps": 10},
            "rollout": {"worker": "small.py:Worker"},
            "policy": {"trainer": "small.py:Trainer", "batch_size": 8},
        }
    )
    assert prepare(config, tmp_path / "job.toml", resume=False).plan.run_folder == tmp_path / "outputs/small/001"
    (tmp_path / "outputs/small/003").mkdir(parents=True)
    assert prepare(config, tmp_path / "job.toml", resume=False).plan.run_folder == tmp_path / "outputs/small/004"


def test_submissions_that_are_prepared_before_either_is_made_have_different_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = job(tmp_path, job={"name": "small", "max_steps": 10})
    names = []
    for _ in range(2):
        prepared = prepare(config, tmp_path / "job.toml", resume=False, make=True)
        names.append(prepared.plan.run_folder.name)
        assert str(prepared.plan.run_folder) in prepared.script
    assert names == ["001", "002"]
    (tmp_path / "outputs" / "small" / "002").chmod(0o777)
    with pytest.raises(ConfigError, match="its mode is 777"):
        submit(prepared, make_job_file(tmp_path))


def test_failed_submission_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job_file = make_job_file(tmp_path)
    prepared = prepare(job(tmp_path), job_file, resume=False)
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch there
    with pytest.raises(SlurmError, match="sbatch is not installed here"):
        submit(prepared, job_file)
    assert not (tmp_path / "out").exists()


def test_job_runs_the_copy_of_the_code_and_its_options_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_file = make_job_file(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 12\n")
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    options = RunOptions(job_file, "", ("job.seed=7",), {"partition": "gpu"})
    assert submit(prepare(job(tmp_path), job_file, resume=False), job_file, options) == 12
    assert RunOptions.read(tmp_path / "out") == options
    (job_file.parent / "small.py").write_text("edited = 1\n")
    plan = Plan.read(plan_path(tmp_path / "out"))
    assert plan.job_file == tmp_path / "out" / ".slurm" / "code" / "job.toml"
    assert (plan.job_file.parent / "small.py").read_text() == "first = 1\n"
    assert RunRecord.read(tmp_path / "out").state is RunState.SUBMITTED


@pytest.mark.parametrize(
    ("table", "allowed"),
    [
        ({"rollout_nodes": 2}, "must be at most 2, the number of nodes of the default partition"),
        ({"rollout_nodes": 4, "partition": "big"}, "must be at most 3, the number of nodes of partition big"),
        (
            {"rollout_nodes": 4, "partition": "small,big"},
            "must be at most 3, the number of nodes of partition small,big",
        ),
        ({"rollout_nodes": 2, "partition": "big"}, None),
        ({"rollout_nodes": 8, "partition": "unknown"}, None),
        ({"rollout_nodes": 8, "sbatch_args": ["--partition=elsewhere"]}, None),
    ],
)
def test_job_of_more_nodes_than_the_partition_has_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: Mapping[str, Any], allowed: str | None
) -> None:
    job_file = make_job_file(tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    nodes = ["small*|n1", "small*|n2", "big|n1", "big|n2", "big|n3"]
    for name, printed in (("sbatch", "12"), ("sinfo", "\\n".join(nodes))):
        (tools / name).write_text(f"#!/bin/sh\nprintf '{printed}\\n'\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    prepared = prepare(job(tmp_path, table), job_file, resume=False, make=True)
    if allowed is None:
        assert submit(prepared, job_file) == 12
        return
    with pytest.raises(ConfigError) as raised:
        submit(prepared, job_file)
    assert (raised.value.key, raised.value.allowed) == ("--nodes", allowed)
    assert not (tmp_path / "out").exists()


def test_without_a_snapshot_the_job_runs_the_code_where_it_is(tmp_path: Path) -> None:
    prepared = prepare(job(tmp_path, {"snapshot": False}), tmp_path / "job.toml", resume=False)
    assert prepared.plan.job_file == tmp_path / "job.toml"


# --- snapshot -------------------------------------------------------------------------------------------------


def test_snapshot_has_code_and_neither_outputs_nor_hidden_files(tmp_path: Path) -> None:
    job_file = make_job_file(tmp_path)
    code = job_file.parent
    for name in (".git/config", "__pycache__/small.pyc", "outputs/small/001/x", "out/metrics.jsonl", "inner/b.py"):
        (code / name).parent.mkdir(parents=True, exist_ok=True)
        (code / name).write_text("")
    (tmp_path / "data").mkdir()
    (tmp_path / "shared.py").write_text("shared = 1\n")
    (code / "data").symlink_to(tmp_path / "data")
    (code / "shared.py").symlink_to(tmp_path / "shared.py")
    copied = submission.take_snapshot(job_file, tmp_path / "copy", code / "out")
    found = sorted(str(path.relative_to(copied.parent)) for path in copied.parent.rglob("*"))
    assert found == ["data", "inner", "inner/b.py", "job.toml", "shared.py", "small.py"]
    assert (copied.parent / "data").is_symlink()
    assert not (copied.parent / "shared.py").is_symlink()


def test_snapshot_replaces_an_earlier_one(tmp_path: Path) -> None:
    job_file = make_job_file(tmp_path)
    submission.take_snapshot(job_file, tmp_path / "copy", tmp_path / "out")
    (job_file.parent / "small.py").unlink()
    copied = submission.take_snapshot(job_file, tmp_path / "copy", tmp_path / "out")
    assert [path.name for path in copied.parent.iterdir()] == ["job.toml"]


def test_snapshot_with_too_many_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "MAX_SNAPSHOT_FILES", 1)
    with pytest.raises(ConfigError, match="move data to another folder") as caught:
        submission.take_snapshot(make_job_file(tmp_path), tmp_path / "copy", tmp_path / "out")
    assert caught.value.key == "slurm.snapshot"
    assert not (tmp_path / "copy").exists()


# --- the command ----------------------------------------------------------------------------------------------


def test_dry_run_shows_the_script_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(
        '[job]\nname = "small"\nmax_steps = 10\n[rollout]\nworker = "small.py:Worker"\n'
        '[policy]\ntrainer = "small.py:Trainer"\nbatch_size = 8\n'
    )
    shown = subprocess.run(
        [sys.executable, "-m", "dray.cli.app", "slurm", "submit", "job.toml", "--dry-run", "--nodes", "3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("#!/bin/bash\n")
    assert "#SBATCH --nodes=3" in shown.stdout
    assert shown.stderr == "node 0: controller, Redis, policy-0\nnode 1: rollout-0\nnode 2: rollout-1\n"
    assert [path.name for path in tmp_path.iterdir()] == ["job.toml"]
