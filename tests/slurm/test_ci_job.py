"""`dray slurm ci` on a virtual node: the command and its batch script."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(180)]

CHECKOUT = Path(__file__).parents[2]
SOURCES = CHECKOUT / "src"

GREEN = """
import os, pathlib, tempfile
import pytest

def test_scratch_is_where_temporary_files_and_caches_go(tmp_path, pytestconfig):
    scratch = pathlib.Path(os.environ["TMPDIR"]).parent
    for path in (tempfile.gettempdir(), tmp_path, os.environ["XDG_CACHE_HOME"], pytestconfig.cache.mkdir("x")):
        assert scratch in pathlib.Path(path).parents
    print("scratch is", scratch)

@pytest.mark.skip(reason="not today")
def test_skipped():
    pass
"""
GPU = """
import os

def test_gpus():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
"""
RED = """
def test_wrong():
    print("what was printed before")
    assert 1 + 1 == 3
"""
HANG = """
import threading

def wait_for_godot():
    threading.Event().wait()

def test_that_hangs():
    other = threading.Thread(target=wait_for_godot, daemon=True)
    other.start()
    threading.Event().wait()
"""
DEAF = """
import signal, subprocess, threading

def test_that_hangs_and_ignores_signals_and_has_a_daemon():
    subprocess.Popen(["sleep", "601"], start_new_session=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGABRT])
    print("now", flush=True)
    threading.Event().wait()
"""
SKIPPED = """
import pytest
pytest.skip("no such hardware", allow_module_level=True)
"""
CRASH = """
import os, signal

def test_that_kills_its_process():
    os.kill(os.getpid(), signal.SIGKILL)
"""
EMPTY = "import pytest\npytestmark = pytest.mark.long\ndef test_long(): pass\n"


@dataclass(frozen=True)
class Project:
    """A project with a folder of tests for each suite, and a folder for the node's temporary files."""

    folder: Path
    scratch: Path
    cluster: SlurmCluster
    environment: Mapping[str, str]

    @property
    def output(self) -> Path:
        return self.folder / "outputs" / "ci" / "001"

    def command(self, *options: str) -> subprocess.Popen[str]:
        """`dray slurm ci` in the project's folder."""
        return subprocess.Popen(
            [sys.executable, "-m", "dray.cli.app", "slurm", "ci", f"--scratch={self.scratch}", *options],
            cwd=self.folder,
            env={**self.cluster.environment, "PYTHONPATH": str(SOURCES), **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ci(self, *options: str) -> tuple[int, str]:
        """Exit code and output of `dray slurm ci`; checks that nothing is left on any node."""
        with self.command(*options) as process:
            try:
                printed, _ = process.communicate(timeout=120)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        assert self.cluster.jobs() == []
        assert self.cluster.processes() == []
        assert list(self.scratch.iterdir()) == []
        return process.returncode, printed

    def log(self, suite: str) -> str:
        return (self.output / "logs" / f"{suite}.log").read_text()

    def verdicts(self) -> dict[str, str]:
        """The verdict on each suite, as `report.txt` has it."""
        report = (self.output / "report.txt").read_text()
        return dict(re.findall(r"^([\w.-]+)  +(\w+(?: \w+)*)  ", report.partition("\n")[2], re.MULTILINE))

    def junit(self) -> dict[str, ElementTree.Element]:
        return {str(each.get("name")): each for each in ElementTree.parse(self.output / "junit.xml").getroot()}


def project_of(tmp_path: Path, cluster: SlurmCluster, **suites: str) -> Project:
    folder, scratch = tmp_path / "the project", tmp_path / "scratch"
    scratch.mkdir()
    for name, text in suites.items():
        (folder / "tests" / name).mkdir(parents=True)
        (folder / "tests" / name / f"test_{name}.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -m 'not long'\nmarkers = long: takes long\n")
    return Project(folder, scratch, cluster, {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})  # it starts faster


def test_green_suites_pass_and_leave_logs_and_reports(cluster: SlurmCluster, tmp_path: Path) -> None:
    project = project_of(tmp_path, cluster, green=GREEN, gpu=GPU, empty=EMPTY)

    code, printed = project.ci("--gpus=2", "--extra-sbatch-arg=--comment=it's a test")

    assert code == 0, printed
    assert project.verdicts() == {"empty": "empty", "gpu": "passed", "green": "passed"}
    assert "COMPLETED): passed" in printed
    assert "1 passed, 1 skipped" in project.log("green")
    # ci.log contains the logs of the suites, and all of it was shown.
    whole = (project.output / "ci.log").read_text()
    assert all(project.log(suite) in whole for suite in ("empty", "gpu", "green"))
    assert whole in "".join(line + "\n" for line in printed.splitlines() if not line.startswith("job "))
    assert [case.get("name") for case in project.junit()["gpu"]] == ["test_gpus"]
    number = int(re.findall(r"^job (\d+): empty, gpu, green", printed, re.MULTILINE)[0])
    job = cluster.job(number)
    assert (job["JobState"], job["TimeLimit"], job["NumNodes"]) == ("COMPLETED", "01:30:00", "1")
    assert (job["OverSubscribe"], job["NumCPUs"]) == ("NO", "4")  # the whole node


def test_tests_of_this_project_run_on_a_node(cluster: SlurmCluster, tmp_path: Path) -> None:
    project = replace(project_of(tmp_path, cluster, green=GREEN), environment={})  # these need plugins

    code, printed = project.ci(
        "tests/unit/protocol", "tests/process/test_segment_process.py", f"--project={CHECKOUT}"
    )

    assert code == 0, printed
    assert project.verdicts() == {"unit-protocol": "passed", "process-test_segment_process.py": "passed"}


def test_exit_code_is_that_of_a_failed_suite_and_the_other_suites_run(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    project = project_of(tmp_path, cluster, alpha=RED, green=GREEN)

    code, printed = project.ci()

    assert code == 1, printed
    assert project.verdicts() == {"alpha": "failed", "green": "passed"}
    assert "assert (1 + 1) == 3" in project.log("alpha")
    assert "passed" not in printed.splitlines()[-1]
    (failure,) = project.junit()["alpha"].iter("failure")
    assert "what was printed before" in (project.output / "ci.log").read_text()
    assert "(1 + 1) == 3" in str(failure.text)


def test_a_suite_that_hangs_is_ended_after_its_stacks_are_in_the_log(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    project = project_of(tmp_path, cluster, green=GREEN, hang=HANG, late=GREEN)

    code, printed = project.ci("--test-timeout=00:00:40")

    assert code == 124, printed
    assert project.verdicts() == {"green": "passed", "hang": "out of time", "late": "not run"}
    stacks = project.log("hang")
    assert "Fatal Python error: Aborted" in stacks
    assert "in wait_for_godot" in stacks
    assert "in test_that_hangs" in stacks
    (error,) = project.junit()["hang"].iter("error")
    assert "in test_that_hangs" in str(error.text)
    (error,) = project.junit()["late"].iter("error")
    assert error.get("message") == "not run"


def test_a_suite_that_ignores_sigabrt_is_killed_with_its_children(cluster: SlurmCluster, tmp_path: Path) -> None:
    project = project_of(tmp_path, cluster, deaf=DEAF)

    code, printed = project.ci("--test-timeout=00:00:25")

    assert code == 124, printed
    assert project.verdicts() == {"deaf": "out of time"}
    assert re.search(r"killing a process that was left running: \d+, sleep 601", printed)


def test_a_suite_whose_tests_are_all_skipped_has_not_passed(cluster: SlurmCluster, tmp_path: Path) -> None:
    project = project_of(tmp_path, cluster, green=GREEN, hardware=SKIPPED)

    code, printed = project.ci()

    assert code == 5, printed
    assert project.verdicts() == {"green": "passed", "hardware": "skipped"}
    assert printed.splitlines()[-1].endswith("hardware skipped; exit code 5")


def test_a_suite_that_kills_its_process_has_crashed(cluster: SlurmCluster, tmp_path: Path) -> None:
    project = project_of(tmp_path, cluster, crash=CRASH, green=GREEN)

    code, printed = project.ci()

    assert code == 137, printed
    assert project.verdicts() == {"crash": "crashed", "green": "passed"}
    assert [error.get("message") for error in project.junit()["crash"].iter("error")] == ["crashed"]


def test_the_setup_runs_first_and_no_suite_runs_after_its_failure(cluster: SlurmCluster, tmp_path: Path) -> None:
    project = project_of(tmp_path, cluster, green=GREEN)

    code, printed = project.ci("--setup", 'echo "in $PWD with $TMPDIR"; exit 9')

    assert code == 9, printed
    assert f"in {project.folder} with {project.scratch}/dray-ci." in project.log("setup")
    assert project.verdicts()["green"] == "not run"
    assert "the setup failed, exit code 9" in printed.splitlines()[-1]


def test_interrupting_the_command_cancels_the_job(cluster: SlurmCluster, tmp_path: Path) -> None:
    project = project_of(tmp_path, cluster, hang=HANG)
    with project.command() as process:
        log = project.output / "logs" / "hang.log"
        cluster.wait_until(lambda: log.exists() and "test_that_hangs" in log.read_text(), "the start of the suite")

        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=60)

    assert process.returncode == 128 + signal.SIGINT, printed
    assert "SIGINT: cancelling job" in printed
    assert "(CANCELLED): hang not run" in printed
    cluster.wait_until(lambda: cluster.jobs() == cluster.processes() == [], "the end of the job's processes")
    assert list(project.scratch.iterdir()) == []


def test_a_container_gets_project_output_and_scratch(cluster: SlurmCluster, tmp_path: Path) -> None:
    # This Slurm has no pyxis: a replacement of srun records the container's options and removes them.
    project = project_of(tmp_path, cluster, green=GREEN)
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "srun").write_text(
        "#!/bin/bash\n"
        "for option; do case $option in\n"
        f'--container-*) echo "$option" >>"{tmp_path}/seen";;\n'
        '*) kept+=("$option");;\n'
        "esac; done\n"
        f'PATH="{os.environ["PATH"]}" exec srun "${{kept[@]}}"\n'
    )
    (bin_folder / "srun").chmod(0o755)
    path = f"--extra-sbatch-arg=--export=ALL,PATH={bin_folder}:{os.environ['PATH']}"

    code, printed = project.ci(
        path, "--container=image.sqsh", "--container-mount=/data:/data", f"--python={sys.executable}"
    )

    assert code == 0, printed
    image, mounts, folder = (tmp_path / "seen").read_text().splitlines()
    assert image == "--container-image=image.sqsh"
    assert folder == f"--container-workdir={project.folder}"
    inside = [mount.split(":") for mount in mounts.removeprefix("--container-mounts=").split(",")]
    assert all(one == other for one, other in inside)
    assert [one for one, _ in inside][:2] == [str(project.folder), str(project.output)]
    assert inside[2][0].startswith(f"{project.scratch}/dray-ci.")
    assert inside[3] == ["/data", "/data"]


def test_a_dry_run_prints_the_script_and_creates_nothing(cluster: SlurmCluster, tmp_path: Path) -> None:
    project = project_of(tmp_path, cluster, green=GREEN)

    code, printed = project.ci("--dry-run", "--partition=short", "--time=02:00:00")

    assert code == 0
    assert printed.startswith("#!/bin/bash\n")
    assert "#SBATCH --partition=short\n" in printed
    assert "#SBATCH --time=02:00:00\n" in printed
    assert not project.output.exists()


def test_error_of_a_rejected_job_is_that_of_slurm(cluster: SlurmCluster, tmp_path: Path) -> None:
    project = project_of(tmp_path, cluster, green=GREEN)

    code, printed = project.ci("--partition=none-such")

    assert code == 1
    assert printed.startswith("error: sbatch failed: ")
    assert "invalid partition specified: none-such" in printed
