from dataclasses import replace
from pathlib import Path

import pytest

from dray.errors import ConfigError
from dray.jobs.job_file import parse_job
from dray.jobs.slurm.plan import Plan

JOB = {
    "job": {"name": "small", "max_steps": 10},
    "rollout": {"worker": "small.py:Worker"},
    "policy": {"trainer": "small.py:Trainer", "batch_size": 8},
    "slurm": {"partition": "gpu", "environment": {"NCCL_DEBUG": "WARN"}},
}


def a_plan(folder: Path) -> Plan:
    config = parse_job(JOB)
    return Plan(
        config=config,
        job_file=folder / "job.toml",
        run_folder=folder / "out",
        secret=b"s" * 32,
    )


def test_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    plan = a_plan(tmp_path)
    assert Plan.read(plan.write()) == plan
    assert plan.node_count == 2


def test_only_the_owner_can_read_the_plan(tmp_path: Path) -> None:
    (tmp_path / "out" / ".slurm").mkdir(parents=True, mode=0o755)
    path = a_plan(tmp_path).write()
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_plan_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = a_plan(tmp_path).write()
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="its mode is 640"):
        Plan.read(path)


def test_secret_is_neither_in_the_repr_of_a_plan_nor_in_errors(tmp_path: Path) -> None:
    plan = replace(a_plan(tmp_path), secret=bytes.fromhex("ab" * 32))
    assert "ab" * 32 not in repr(plan)
    assert repr(plan.secret) not in repr(plan)
    path = plan.write()
    path.write_text(path.read_text().replace('"job_file"', '"file"'))
    with pytest.raises(ConfigError, match="a plan of this version") as caught:
        Plan.read(path)
    assert "ab" * 32 not in str(caught.value)
    assert caught.value.__cause__ is None


def test_missing_plan_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        Plan.read(tmp_path / "plan.json")
