"""The rows of `user_mistakes.MISTAKES`: some as whole jobs, the others by what a job's processes do with the
classes, in their order."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from user_mistakes import MISTAKES, Mistake, run_job, write_job

from dray.errors import ConfigError, error_lines
from dray.jobs.api import ReplicaContext, Trajectory, WorkItem
from dray.jobs.exit_codes import ExitCode
from dray.jobs.job_file import load_job
from dray.jobs.replica.entry_points import check_entry_points, load_entry_point
from dray.jobs.replica.user_code import (
    UserCodeError,
    call_user,
    carried,
    make_user_object,
    returned_arrays,
    returned_metrics,
    returned_payloads,
    save_into,
)
from dray.payload import pack

BY_NAME = {mistake.name: mistake for mistake in MISTAKES}
AS_JOBS = [
    "rollout returns {'x': np.ones(131072)}",
    "rollout returns {'x': np.zeros(50_000_000)}",
    "rollout raises text with escape sequences",
    "weights returns {'w': np.array([None])}",
    "weights returns None in a policy group of two",
    "both classes have mistakes",
    "several keys are wrong",
]


@pytest.fixture
def _imports() -> Iterator[None]:
    modules, path = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - modules:
        del sys.modules[name]
    sys.path[:] = path


@pytest.mark.parametrize("mistake", [BY_NAME[name] for name in AS_JOBS], ids=lambda mistake: mistake.name)
def test_job_names_the_mistake_in_terminal_summary_and_exit_code(mistake: Mistake, tmp_path: Path) -> None:
    run = run_job(mistake, tmp_path)
    assert run.exit_code == mistake.exit_code, run.text
    assert [words for words in mistake.words if words not in run.text] == [], run.text
    assert "Traceback" not in run.text
    assert "internal error" not in run.text
    assert all(line.isprintable() for line in run.text.splitlines())
    if run.exit_code == ExitCode.CONFIGURATION:
        assert not run.output.exists()
        return
    early = re.search(r"^(\S+) ended early: (\w+\.\w+\(\) .+); see .+\.log$", run.text, re.MULTILINE)
    warned = re.search(r"^(\S+): (\w+\.\w+\(\) .+); work item \d+ has failed", run.text, re.MULTILINE)
    named = early or warned
    assert named is not None, run.text
    replica, reason = named.groups()
    assert reason in (run.output / "logs" / f"{replica}.log").read_text()
    summary = json.loads((run.output / "summary.json").read_text())
    assert summary["exit_code"] == mistake.exit_code
    assert summary["exit_reason"].endswith(f": {replica}: {reason}")
    if early is not None:
        assert summary["replicas"][replica] == f"left: {reason}"
    assert f"failed: {summary['exit_reason']}, after " in run.text
    assert "restarting " not in run.text


@pytest.mark.parametrize(
    "mistake", [each for each in MISTAKES if each.name not in AS_JOBS], ids=lambda mistake: mistake.name
)
@pytest.mark.usefixtures("_imports")
def test_mistake_is_named_where_the_classes_are_checked_and_called(mistake: Mistake, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, UserCodeError)) as caught:
        _use(mistake, tmp_path)
    error = caught.value
    lines = error_lines(error) if isinstance(error, ConfigError) else [str(error)]
    code = ExitCode.CONFIGURATION if isinstance(error, ConfigError) else error.exit_code
    assert [words for words in mistake.words if words not in "\n".join(lines)] == [], lines
    assert code == mistake.exit_code
    assert all(line.isprintable() for line in lines)


def _use(mistake: Mistake, folder: Path) -> None:
    """Read the job file, check the classes and call them, as the processes of a job do."""
    config = load_job(write_job(mistake, folder), mistake.settings)
    concurrency = config.rollout.concurrency
    check_entry_points(config.rollout.worker, config.policy.trainer, folder, concurrency=concurrency)
    context = ReplicaContext(args={}, seed=0, index=0, name="rollout-0", output=folder)
    trainer = make_user_object(load_entry_point("policy.trainer", config.policy.trainer, folder))
    call_user(trainer, "setup", context)
    weights = returned_arrays(trainer, "weights", call_user(trainer, "weights"))
    with carried(trainer, "weights"):
        pack(weights)
    worker = make_user_object(load_entry_point("rollout.worker", config.rollout.worker, folder))
    call_user(worker, "setup", context)
    call_user(worker, "load_weights", weights, 0)
    for payload in returned_payloads(worker, call_user(worker, "rollout", WorkItem(0, 0)), None, 0, 0):
        with carried(worker, "rollout"):
            pack(payload.arrays)
    trajectories = [Trajectory({"rewards": np.ones(8, np.float32)}, 0)]
    returned_metrics(trainer, "train_step", call_user(trainer, "train_step", trajectories))
    (folder / "trainer").mkdir()
    save_into(trainer, folder / "trainer")
