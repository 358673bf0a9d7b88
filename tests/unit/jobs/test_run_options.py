"""The options of a run, kept in its folder and applied when it is resumed."""

import json
from pathlib import Path

import pytest

from dray.cli.job_options import read_job
from dray.errors import ConfigError
from dray.jobs.folder import RunOptions

JOB = """
[job]
name = "small"
max_steps = 10
[rollout]
worker = "small.py:Worker"
[policy]
trainer = "small.py:Trainer"
batch_size = 8
"""


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(JOB)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    path.mkdir()
    return path


def test_options_are_kept_for_the_owner_only_and_read_as_they_were_written(root: Path) -> None:
    options = RunOptions(Path("/a/job.toml"), "text", ("redis.url=redis://:secret@h", "job.seed=7"), {"nodes": 3})
    options.write(root)
    assert (root / "options.json").stat().st_mode & 0o777 == 0o600
    assert RunOptions.read(root) == options
    assert "secret" not in repr(options)


def test_folder_without_options_has_none(root: Path) -> None:
    assert RunOptions.read(root) is None
    assert RunOptions.read(root / "missing") is None


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"job_file": 3, "job_text": "", "settings": [], "slurm": {}}']
)
def test_damaged_options_are_an_error_that_names_the_file(root: Path, content: str) -> None:
    (root / "options.json").write_text(content)
    (root / "options.json").chmod(0o600)
    with pytest.raises(ConfigError, match=r"options\.json.*the options of a run"):
        RunOptions.read(root)


def test_options_that_another_user_may_have_written_are_refused(root: Path) -> None:
    RunOptions(Path("/a/job.toml")).write(root)
    (root / "options.json").chmod(0o660)
    with pytest.raises(ConfigError, match="for its owner only"):
        RunOptions.read(root)


def test_kept_options_apply_under_those_given_again(job_file: Path, root: Path) -> None:
    first = read_job(job_file, ["job.seed=7", "job.max_steps=20", "rollout.args.depth=3"], None, "debug")
    assert first.config.job.log_level == "debug"
    first.options.write(root)

    again = read_job(job_file, ["job.max_steps=30"], None, None).resumed(root)
    assert (again.config.job.seed, again.config.job.max_steps, again.config.job.log_level) == (7, 30, "debug")
    assert again.config.rollout.args == {"depth": 3}
    assert again.config.job.output == str(root)
    assert again.lines == (
        "options kept from the start of the run: job.seed=7, rollout.args.depth, job.log_level=debug",
    )

    again.options.write(root)
    third = read_job(job_file, None, None, "error").resumed(root)
    assert (third.config.job.seed, third.config.job.max_steps, third.config.job.log_level) == (7, 30, "error")


def test_run_without_kept_options_resumes_with_those_given(job_file: Path, root: Path) -> None:
    again = read_job(job_file, ["job.seed=7"], None, None).resumed(root)
    assert (again.config.job.seed, again.config.job.output, again.lines) == (7, str(root), ())


def test_job_file_as_it_is_now_applies_and_a_line_reports_that_it_changed(job_file: Path, root: Path) -> None:
    read_job(job_file, None, None, None).options.write(root)
    job_file.write_text(JOB.replace("max_steps = 10", "max_steps = 11"))
    again = read_job(job_file, None, None, None).resumed(root)
    assert again.config.job.max_steps == 11
    assert again.lines == (f"{job_file} has changed since the start of the run; its new content applies",)


def test_lines_show_no_value_that_may_be_a_password(job_file: Path, root: Path) -> None:
    secret = "redis://:hunter2@127.0.0.1:6379"
    request = read_job(
        job_file,
        [f"redis.url={secret}", 'policy.args.key="hunter2"'],
        None,
        None,
        {"environment": {"KEY": "hunter2"}},
    )
    request.options.write(root)
    again = read_job(job_file, None, None, None).resumed(root)
    assert again.config.redis.url == secret
    assert again.lines == (
        "options kept from the start of the run: redis.url, policy.args.key, slurm.environment",
    )


def test_options_of_slurm_are_kept_under_those_given_again(job_file: Path, root: Path) -> None:
    given = {
        "partition": "gpu",
        "nodes": 3,
        "account": None,
        "sbatch_args": None,
        "environment": {},
        "snapshot": False,
    }
    read_job(job_file, None, None, None, given).options.write(root)
    document = json.loads((root / "options.json").read_text())
    assert document["slurm"] == {"partition": "gpu", "nodes": 3, "snapshot": False}
    again = read_job(job_file, None, None, None, {**given, "nodes": 4, "partition": None}).resumed(root)
    assert again.options.slurm == {"partition": "gpu", "nodes": 4, "snapshot": False}
    assert again.lines == ("options kept from the start of the run: slurm.partition=gpu",)
