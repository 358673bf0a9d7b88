"""The path of a new user, from `dray new` to a job that is solved, with whichever `dray` is installed."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

BOUND = 60.0
NAME = "my-first-job"
MISTAKES = {
    "job.sede": ("job.toml", "seed = 1 ", "sede = 1 ", "unknown key (did you mean seed?)"),
    "job.lane": ("job.toml", "\nplot =", '\nlane = "rdma"\nplot =', '"auto" or one of shm, ucx, tcp'),
    "rollout.slots": ("job.toml", "slots = 64", "slots = 8", "must be at least policy.batch_size, which is 16"),
    "rollout.worker": (
        "worker.py",
        "rollout(self, work_item: WorkItem)",
        "rollout(self)",
        "rollout(self) cannot be called",
    ),
    "policy.trainer": ("job.toml", "trainer.py:Trainer", "trainer.py:Trianer", "no class Trianer, but"),
}
"""The key in the line about a mistake: a file, what is replaced in it, by what, and words of the line."""


def errors(ended: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines about mistakes; on a busy machine there are others, about imports that take long."""
    lines = ended.stderr.splitlines()
    assert all(line.startswith(("error: ", "importing ")) for line in lines), ended.stderr
    return [line for line in lines if line.startswith("error: ")]


def walk_new_users_path(
    dray: Sequence[str], folder: Path, environment: Mapping[str, str], *, at_least: float = 60.0
) -> None:
    """Make a job in `folder`, check it with five mistakes, mend them, and run it until it is solved.

    Args:
        dray: the words of a command that is `dray`.
        environment: of each command.
        at_least: the return at which the job counts as solved.
    """

    def call(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*dray, *arguments], cwd=cwd, env=dict(environment), capture_output=True, text=True, timeout=BOUND
        )

    made = call("new", NAME, cwd=folder)
    assert (made.returncode, made.stderr) == (0, "")
    assert made.stdout.splitlines()[-1] == f"run it with: dray run {NAME}/job.toml"

    job = folder / NAME
    right = {path: path.read_text() for path in job.iterdir()}
    for file, text, mistake, _ in MISTAKES.values():
        content = (job / file).read_text()
        assert content.count(text) == 1, text
        (job / file).write_text(content.replace(text, mistake))
    checked = call("check", "job.toml", cwd=job)
    assert (checked.returncode, checked.stdout) == (2, "")
    lines = errors(checked)
    assert sorted(line.split()[1] for line in lines) == sorted(MISTAKES), checked.stderr
    for line in lines:
        assert MISTAKES[line.split()[1]][-1] in line
    refused = call("run", "job.toml", cwd=job)
    assert (refused.returncode, refused.stdout, errors(refused)) == (2, "", lines)

    for path, content in right.items():
        path.write_text(content)
    checked = call("check", "job.toml", cwd=job)
    started = "1 Redis server, 1 controller, 2 rollout and 1 policy replica"
    assert checked.stdout == f"job.toml: no mistakes found; would start {started}\n", checked.stderr
    assert checked.returncode == 0
    assert not (job / "outputs").exists()

    run = call("run", "job.toml", "--set", f"stop.at_least={at_least:g}", cwd=job)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "\nsolved: average_return " in run.stdout
    output = job / "outputs" / NAME / "001"
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert steps[0]["mean_return"] < 50 < at_least <= steps[-1]["metrics"]["average_return"]
    assert json.loads((output / "summary.json").read_text())["solved"] is True
