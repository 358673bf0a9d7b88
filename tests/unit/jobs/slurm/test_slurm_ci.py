from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer import Typer
from typer.main import get_command

from dray.cli.slurm import ci as ci_command
from dray.errors import ConfigError
from dray.jobs.process import SignalInbox
from dray.jobs.slurm import ci as following
from dray.jobs.slurm.ci import (
    Choices,
    Counts,
    End,
    JobReport,
    SuitePlan,
    SuiteResult,
    SuiteVerdict,
    count,
    find_suites,
    plan,
    read_ends,
    read_suite,
    write_report,
)
from dray.jobs.slurm.scheduler import JobView, SlurmError, format_duration, parse_duration, submit

PAGE = Path(__file__).parents[4] / "docs" / "reference" / "slurm-ci.md"


@pytest.fixture
def choices(tmp_path: Path) -> Choices:
    project = tmp_path / "it's a 100% $project"
    for suite in ("unit", "system/deep"):
        (project / "tests" / suite).mkdir(parents=True)
        (project / "tests" / suite / "test_x.py").touch()
    (project / "tests" / "data").mkdir()
    return Choices(project=project, python="python3", output_root=project / "out")


# --- suites and options ------------------------------------------------------------------------------------------


def test_suites_are_the_folders_that_hold_tests(choices: Choices) -> None:
    found = find_suites(choices.project, ())
    assert list(found.items()) == [("system", "tests/system"), ("unit", "tests/unit")]


def test_names_of_chosen_suites_are_valid_file_names(choices: Choices) -> None:
    chosen = ["tests/unit/test_x.py::test_one[a/b]", "tests/system/deep"]
    assert list(find_suites(choices.project, chosen)) == ["unit-test_x.py-test_one-a-b", "system-deep"]


@pytest.mark.parametrize(
    ("chosen", "allowed"),
    [
        (["tests/none"], "must be a path in"),
        (["tests/unit", "tests/unit/"], "must have different names"),
        (["job"], "must have different names"),
    ],
)
def test_suites_that_do_not_exist_or_share_a_name_are_refused(
    choices: Choices, chosen: list[str], allowed: str
) -> None:
    (choices.project / "job").mkdir()
    with pytest.raises(ConfigError, match=allowed):
        find_suites(choices.project, chosen)


def test_a_project_without_tests_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"suites not found in .*: must be named, or be folders in tests/"):
        plan(Choices(project=tmp_path, python="python3"))


@pytest.mark.parametrize(
    ("key", "changed"),
    [
        ("--test-timeout", {"test_timeout": "90"}),
        ("--test-timeout", {"test_timeout": "00:00:00"}),
        ("--time", {"test_timeout": "02:00:00", "time": "02:00:00"}),
        ("--partition", {"partition": "a\nrm"}),
        ("--extra-sbatch-arg", {"extra_arguments": ["--comment=a\nb"]}),
        ("--extra-sbatch-arg", {"extra_arguments": ["script.sh"]}),
        ("--container-mount", {"container_mounts": ["/a:/b"]}),
    ],
)
def test_error_about_an_option_names_the_option(choices: Choices, key: str, changed: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as refused:
        plan(replace(choices, **changed), make=True)
    assert refused.value.key == key
    assert not choices.output_root.exists()


def test_time_limit_of_the_job_is_that_of_the_tests_plus_30_minutes(choices: Choices) -> None:
    assert "#SBATCH --time=1-01:29:59\n" in plan(replace(choices, test_timeout="1-00:59:59")).script


@pytest.mark.parametrize(
    ("text", "seconds"), [("00:00:01", 1), ("01:30:00", 5400), ("100:00:00", 360_000), ("2-00:00:10", 172_810)]
)
def test_durations_are_read_and_written_as_slurm_does(text: str, seconds: int) -> None:
    assert parse_duration("time", text) == seconds
    assert parse_duration("time", format_duration(seconds)) == seconds


def test_runs_that_are_planned_before_either_begins_have_different_folders(choices: Choices) -> None:
    assert [plan(choices, make=True).output.name for _ in range(2)] == ["001", "002"]


def test_a_new_run_gets_the_next_folder(choices: Choices) -> None:
    assert plan(choices).output.name == "001"
    (choices.output_root / "017").mkdir(parents=True)
    assert plan(choices).output.name == "018"


# --- the batch script -------------------------------------------------------------------------------------------

FULL = {
    "partition": "a b",
    "account": "x",
    "gpus": 8,
    "scratch": '/local/$USER/a `b` "c" $(d)',
    "setup": "echo 'it''s' $HOME",
    "container": "registry#image:1",
    "container_mounts": ["/data:/data:ro", "/with space:/x"],
    "pytest_arguments": ["-k", "not $slow"],
    "extra_arguments": ["--qos=high", "--comment=it's # not a comment"],
}


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck on this machine")
@pytest.mark.parametrize("changed", [{}, FULL], ids=["plain", "everything"])
def test_the_script_passes_shellcheck(choices: Choices, changed: dict[str, str]) -> None:
    script = plan(replace(choices, **changed)).script
    checked = subprocess.run(["shellcheck", "-"], input=script, capture_output=True, text=True, timeout=60)
    assert (checked.returncode, checked.stdout) == (0, "")


def test_values_are_quoted_for_the_shell(choices: Choices) -> None:
    made = plan(replace(choices, **FULL))
    lines = made.script.splitlines()
    assert shlex.split(next(line for line in lines if line.startswith("run_suite unit"))) == [
        "run_suite",
        "unit",
        "-k",
        "not $slow",
        "tests/unit",
    ]
    assignment = next(line for line in lines if line.startswith("project="))
    shown = subprocess.run(["bash", "-c", f'{assignment}; echo "$project"'], capture_output=True, text=True)
    assert shown.stdout == f"{choices.project}\n"
    options = [shlex.split(line)[1] for line in lines if line.startswith("#SBATCH")]
    assert f"--output={made.output}/ci.log".replace("%", "%%") in options
    assert "--comment=it's # not a comment" in options


def test_variables_in_scratch_are_expanded_and_commands_are_not_run(choices: Choices) -> None:
    script = plan(replace(choices, **FULL)).script
    (line,) = re.findall(r'mktemp -d (".*")\) \|\| exit 1', script)
    shown = subprocess.run(["bash", "-c", f"echo {line}"], capture_output=True, text=True, env={"USER": "me"})
    assert shown.stdout == '/local/me/a `b` "c" $(d)/dray-ci.XXXXXX\n'


# --- reports ----------------------------------------------------------------------------------------------------

GOOD, SKIPS, BAD = Counts(passed=3, skipped=1), Counts(skipped=4), Counts(passed=1, failed=1)


@pytest.mark.parametrize(
    ("end", "counts", "verdict"),
    [
        (End(0, 1), GOOD, SuiteVerdict.PASSED),
        (End(0, 1), SKIPS, SuiteVerdict.SKIPPED),
        (End(5, 1), SKIPS, SuiteVerdict.SKIPPED),
        (End(5, 1), Counts(), SuiteVerdict.EMPTY),
        (End(5, 1), None, SuiteVerdict.EMPTY),
        (End(1, 1), BAD, SuiteVerdict.FAILED),
        (End(0, 1), BAD, SuiteVerdict.FAILED),
        (End(4, 1), None, SuiteVerdict.FAILED),
        (End(124, 1), None, SuiteVerdict.OUT_OF_TIME),
        (End(124, 1), GOOD, SuiteVerdict.OUT_OF_TIME),
        (End(139, 1), None, SuiteVerdict.CRASHED),
        (End(0, 1), None, SuiteVerdict.CRASHED),
        (End(0, 1), Counts(), SuiteVerdict.SKIPPED),
        (None, None, SuiteVerdict.NOT_RUN),
        (None, GOOD, SuiteVerdict.NOT_RUN),
    ],
)
def test_verdict_on_a_suite_depends_on_its_exit_code_and_its_tests(
    end: End | None, counts: Counts | None, verdict: SuiteVerdict
) -> None:
    assert SuiteResult("a", end, counts).verdict is verdict


PASSED, SKIPPED = SuiteResult("a", End(0, 1), GOOD), SuiteResult("b", End(0, 1), SKIPS)
EMPTY, FAILED = SuiteResult("c", End(5, 1), None), SuiteResult("d", End(3, 1), BAD)
LOST, SILENT = SuiteResult("e", None, None), SuiteResult("f", End(0, 1), None)


@pytest.mark.parametrize(
    ("state", "setup", "suites", "code"),
    [
        ("COMPLETED", None, [PASSED], 0),
        ("COMPLETED", End(0, 1), [EMPTY, PASSED], 0),
        ("COMPLETED", None, [EMPTY], 5),
        ("COMPLETED", None, [PASSED, SKIPPED], 5),
        ("FAILED", None, [SKIPPED, FAILED, PASSED], 3),
        ("FAILED", End(9, 1), [LOST], 9),
        ("COMPLETED", None, [SILENT, PASSED], 1),
        ("NODE_FAIL", None, [PASSED, LOST], 1),
        ("TIMEOUT", None, [PASSED, LOST], 124),
        ("CANCELLED", None, [LOST, PASSED], 143),
    ],
)
def test_the_exit_code_is_that_of_the_first_suite_that_is_not_good(
    state: str, setup: End | None, suites: list[SuiteResult], code: int
) -> None:
    report = JobReport(7, state, setup, suites)
    assert report.exit_code == code
    assert (report.conclusion == "passed") == (code == 0)


JUNIT = """<testsuites><testsuite name="pytest">
<testcase name="a"/>
<testcase name="b"><failure message="m">t</failure></testcase>
<testcase name="c"><error message="m">t</error></testcase>
<testcase name="d"><skipped type="pytest.skip" message="m"/></testcase>
<testcase name="e"><skipped type="pytest.xfail" message="m"/></testcase>
</testsuite></testsuites>"""


def test_tests_are_counted_and_expected_failures_have_passed(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text(JUNIT)
    suite = read_suite(tmp_path / "a.xml")
    assert suite is not None
    assert count(suite) == Counts(passed=2, failed=1, errors=1, skipped=1)


@pytest.mark.parametrize("text", ["", JUNIT[:80], None])
def test_missing_or_incomplete_junit_file_is_ignored(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "a.xml").write_text(text)
    assert read_suite(tmp_path / "a.xml") is None


def test_incomplete_line_of_the_record_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "ends.tsv").write_text("unit\t0\t12\nsystem\t1")
    assert read_ends(tmp_path) == {"unit": End(0, 12)}
    assert read_ends(tmp_path / "none") == {}


def test_a_crash_is_an_error_with_the_end_of_the_log_in_the_merged_report(tmp_path: Path) -> None:
    for folder in ("logs", "junit"):
        (tmp_path / folder).mkdir()
    (tmp_path / "logs" / "unit.log").write_bytes(b"stack \x1b[31m \xff of thread")
    (tmp_path / "ends.tsv").write_text("unit\t139\t12\njob\t139\t13\n")
    suites = find_suites(Path(__file__).parents[4], ["tests/unit", "tests/fault"])
    (tmp_path / "junit" / "fault.xml").write_text(JUNIT)
    made = SuitePlan(suites, tmp_path, "")
    write_report(made, JobView(4, "FAILED"))

    merged = {each.get("name"): each for each in ElementTree.parse(tmp_path / "junit.xml").getroot()}
    (error,) = merged["unit"].iter("error")
    assert (error.get("message"), error.text) == ("crashed", "stack �[31m � of thread")
    assert [error.get("message") for error in merged["fault"].iter("error")] == ["m", "not run"]
    assert "job 4 (FAILED): unit crashed, fault not run; exit code 139" in (tmp_path / "report.txt").read_text()


def test_a_job_is_read_from_the_output_of_scontrol() -> None:
    line = (
        "JobId=12 JobName=a b UserId=x(1) JobState=RUNNING Reason=None Dependency=(null) Requeue=0 Restarts=2 "
        "ExitCode=0:15 NodeList=n[1-3] BatchHost=n1 Comment=JobState=FAILED"
    )
    view = JobView.parse(line)
    assert (view.number, view.state, view.reason, view.ended) == (12, "RUNNING", "None", False)
    assert JobView.parse("JobId=1 JobState=TIMEOUT ExitCode=0:0 NodeList=(null)").ended


def test_verdicts_of_the_page_are_those_of_the_code() -> None:
    listed = [line.split("|")[1].strip() for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert [verdict for verdict in listed if verdict in set(SuiteVerdict)] == list(SuiteVerdict)


# --- following --------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm_without_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `scontrol` that has no job any more, as some time after its end."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho 'Invalid job id specified' >&2\nexit 1\n")
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


@pytest.mark.usefixtures("slurm_without_jobs")
def test_end_of_a_job_that_slurm_no_longer_has_is_read_from_the_record(tmp_path: Path) -> None:
    (tmp_path / "ends.tsv").write_text("unit\t3\t1\njob\t3\t2\n")
    (tmp_path / "ci.log").write_text("first\nlast\nhalf a li")
    shown: list[str] = []
    with SignalInbox() as inbox:
        view, interrupted = following.follow(4, tmp_path, inbox, shown.append)
    assert (view.number, view.state, interrupted) == (4, "FAILED", None)
    assert "".join(shown) == "job 4: FAILED\nfirst\nlast\n"


@pytest.mark.usefixtures("slurm_without_jobs")
def test_a_slurm_that_does_not_answer_for_minutes_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "UNREACHABLE_SECONDS", 0.0)
    with SignalInbox() as inbox, pytest.raises(SlurmError, match="scontrol failed: Invalid job id specified"):
        following.follow(4, tmp_path, inbox, str)


def test_missing_slurm_command_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match="sbatch is not installed here"):
        submit(tmp_path / "ci.sh")


def test_options_of_the_page_are_those_of_the_command() -> None:
    group = Typer(add_completion=False)
    group.command()(ci_command)
    options = {name for parameter in get_command(group).params for name in parameter.opts if name.startswith("--")}
    table = PAGE.read_text().partition("## Options")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")]
    listed = {option for cell in cells for option in re.findall(r"`(--[a-z-]+)`", cell)}
    assert listed == options
