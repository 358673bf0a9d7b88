"""What a command does on an installation without an extra: one line, exit code 2, no traceback."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from dray import __version__
from dray.cli.extras import EXTRAS, remedy, require_extra

ROOT = Path(__file__).parents[3]
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
PROGRAM = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
sys.argv = ["dray", *sys.argv[2:]]
from dray.cli.__main__ import main
main()
"""


def dray_without(packages: Sequence[str], folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """The end of a `dray` command in an interpreter in which `packages` cannot be imported."""
    (folder / "job.toml").write_text(JOB)
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, ",".join(packages), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("missing", "extra", "command"),
    [
        *((package, "jobs", ["run", "job.toml"]) for package in EXTRAS["jobs"]),
        *((package, "jobs", ["--help"]) for package in ("psutil", "pydantic", "typer")),
        ("httpcore", "jobs", ["check", "job.toml"]),
        ("httpcore", "jobs", ["status", "."]),
        ("uvicorn", "jobs", ["slurm", "submit", "job.toml"]),
        ("jinja2", "slurm", ["slurm", "submit", "--dry-run", "job.toml"]),
        ("junitparser", "slurm", ["slurm", "ci", "--dry-run"]),
    ],
)
def test_command_without_its_extra_names_package_and_extra_in_one_line(
    tmp_path: Path, missing: str, extra: str, command: list[str]
) -> None:
    ended = dray_without([missing], tmp_path, *command)
    line = f"error: this command needs {missing}, which is not installed: pip install 'dray-rl[{extra}]'\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", line)
    assert [path.name for path in tmp_path.iterdir()] == ["job.toml"]


@pytest.mark.parametrize(
    "command",
    [["doctor", "--json"], ["slurm", "status", "."], ["run", "--help"], ["check", "--help"]],
)
def test_command_that_needs_no_other_extra_works_with_that_of_the_command_line(
    tmp_path: Path, command: list[str]
) -> None:
    others = [package for extra, packages in EXTRAS.items() if extra != "jobs" for package in packages]
    ended = dray_without(others, tmp_path, *command)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_version_is_printed_without_any_extra(tmp_path: Path) -> None:
    everything = [package for packages in EXTRAS.values() for package in packages]
    ended = dray_without(everything, tmp_path, "--version")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"dray {__version__}\n", "")


def test_module_that_no_extra_brings_is_an_internal_error(tmp_path: Path) -> None:
    ended = dray_without(["dray.jobs.launch.local"], tmp_path, "run", "job.toml")
    assert ended.returncode == 14
    assert "ModuleNotFoundError: import of dray.jobs.launch.local halted" in ended.stderr
    assert remedy(ModuleNotFoundError("a message alone")) is None


def test_submodule_counts_as_its_package() -> None:
    line = remedy(ModuleNotFoundError("No module named 'fastapi.routing'", name="fastapi.routing"))
    assert line == "this command needs fastapi, which is not installed: pip install 'dray-rl[jobs]'"


def test_missing_package_is_known_by_the_name_of_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    require_extra("jobs")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        require_extra("jobs")
    assert caught.value.name == "fastapi"


def distributions(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=;\[]", each)[0] for each in requirements}


def test_extras_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra, packages in EXTRAS.items():
        asked = distributions(project["optional-dependencies"][extra]) - {"dray-rl"}
        asked -= distributions(project["dependencies"])  # an extra may raise their bounds
        # The name of a distribution may end with the CUDA version that it is built for.
        names = {re.sub(r"-cu\d+$", "", each).replace("-", "_") for each in asked}
        assert names - {"libucx"} == set(packages), extra  # the library below ucxx, which nothing imports
