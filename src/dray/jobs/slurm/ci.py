"""`dray slurm ci`: runs test suites as one job on an exclusive node, and follows the job until it has ended.

    Choices ──▶ SuitePlan ──▶ ci.sh ──▶ sbatch … follow ci.log … ended ──▶ report.txt, junit.xml, exit code

The batch script (`templates/ci.sh.j2`) runs the suites and records how each ended; the reports are made from its
files in the output folder.
"""

from __future__ import annotations

import re
import select
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from junitparser import TestSuite

from dray.clock import Deadline
from dray.errors import ConfigError
from dray.jobs.launch.output import make_run_folder
from dray.jobs.process import SignalInbox
from dray.jobs.slurm import ci_report
from dray.jobs.slurm.ci_report import INCOMPLETE, JOB, SETUP, JobReport, SuiteResult, SuiteVerdict, read_ends
from dray.jobs.slurm.scheduler import JobView, SlurmError, cancel, query_job, submit
from dray.jobs.slurm.script import format_duration, parse_duration, render

# --- ci follow ---------------------------------------------------------------------------------------------------

POLL_SECONDS = 2.0
UNREACHABLE_SECONDS = 300.0
"""Seconds without an answer of slurmctld, for example during its restart, after which following ends."""

CANCEL_SECONDS = 120.0
"""Seconds that a cancelled job has to end."""

RECORD_SECONDS = 15.0
"""Seconds after which the last output of a node is visible here, on any shared file system."""


def follow(
    number: int, output: Path, inbox: SignalInbox, show: Callable[[str], None]
) -> tuple[JobView, signal.Signals | None]:
    """Show the job's `ci.log` until the job has ended; returns its last view, and the signal that interrupted.

    The first signal cancels the job, a second one ends the wait.

    Raises:
        SlurmError: Slurm has not answered for `UNREACHABLE_SECONDS`, or does not cancel the job.
    """
    log = _Tail(output / "ci.log")
    unreachable, given_up, interrupted, state = Deadline.after(UNREACHABLE_SECONDS), Deadline.after(None), None, ""
    while True:
        try:
            view: JobView | None = query_job(number)
        except SlurmError:
            view = _recorded(number, output)
            if view is None and (unreachable.expired or given_up.expired):
                raise
        else:
            unreachable = Deadline.after(UNREACHABLE_SECONDS)
        if view is not None:
            if view.state != state:
                state = view.state
                show(f"job {number}: {state}{f', {view.reason}' if state == 'PENDING' else ''}\n")
            if view.ended or given_up.expired:
                break
        show(log.read_new())
        select.select([inbox], [], [], POLL_SECONDS)
        for received in inbox.receive():
            if interrupted is not None:
                given_up = Deadline.after(0.0)
                continue
            interrupted, given_up = received, Deadline.after(CANCEL_SECONDS)
            show(f"{received.name}: cancelling job {number}\n")
            cancel(number)
    if interrupted is None and view.state in ("COMPLETED", "FAILED"):
        _wait_for_record(output, inbox)
    show(log.read_new())
    return view, interrupted


def _recorded(number: int, output: Path) -> JobView | None:
    """The ended job as its script recorded it, for a slurmctld that is down or no longer has the job."""
    end = read_ends(output).get(JOB)
    if end is None:
        return None
    state = "FAILED" if end.exit_code else "COMPLETED"
    return JobView(number, state, "None", exit_code=end.exit_code, signal=0, restarts=0, nodes="")


def _wait_for_record(output: Path, inbox: SignalInbox) -> None:
    deadline = Deadline.after(RECORD_SECONDS)
    while JOB not in read_ends(output) and not deadline.expired:
        select.select([inbox], [], [], min(0.5, deadline.remaining))
        if inbox.receive():
            return


class _Tail:
    """Reads a growing file, which may not exist yet."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def read_new(self) -> str:
        """The lines that were added since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return ""
        content = content[: content.rfind(b"\n") + 1]  # whole lines, and so whole characters
        self._offset += len(content)
        return content.decode("utf-8", errors="replace")


# --- ci ----------------------------------------------------------------------------------------------------------

MARGIN_SECONDS = 30 * 60
"""Seconds that the job has beyond the tests' time limit, for its start, the setup and the cleanup."""

GRACE_SECONDS = 10
"""Seconds between the stack dump of a suite that has exceeded its time limit and SIGKILL."""

_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")


@dataclass(frozen=True, slots=True)
class Suite:
    """Tests that run in one pytest process: the name in logs and reports, and the path given to pytest."""

    name: str
    path: str


@dataclass(frozen=True, slots=True)
class Choices:
    """The options of the command; times as Slurm writes them, None for the default."""

    project: Path
    python: str
    suites: Sequence[str] = ()
    output_root: Path = Path("outputs/ci")
    partition: str | None = None
    account: str | None = None
    gpus: int = 0
    test_timeout: str = "01:00:00"
    time: str | None = None
    scratch: str | None = None
    setup: str | None = None
    container: str | None = None
    container_mounts: Sequence[str] = ()
    pytest_arguments: Sequence[str] = ()
    extra_arguments: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class SuitePlan:
    """A job to submit: its suites, its output folder, and its batch script."""

    suites: Sequence[Suite]
    output: Path
    script: str


def plan(choices: Choices, *, make: bool = False) -> SuitePlan:
    """The job for the options of the command.

    Args:
        make: create the output folder now, so that a run that starts at the same time gets another one.

    Raises:
        ConfigError: an option is not allowed.
    """
    project = choices.project.absolute()
    suites = find_suites(project, choices.suites)
    test_seconds = parse_duration("--test-timeout", choices.test_timeout)
    time = choices.time or format_duration(test_seconds + MARGIN_SECONDS)
    if parse_duration("--time", time) <= test_seconds:
        raise ConfigError("--time", time, f"must be more than --test-timeout, which is {choices.test_timeout}")
    _refuse_line_breaks(choices)
    root = choices.output_root.absolute()
    output = make_run_folder(lambda: _next_folder(root), new=True)[0] if make else _next_folder(root)
    script = render(
        "ci.sh.j2",
        job_name="dray-ci",
        job_name_in_ends=JOB,
        setup_name=SETUP,
        project=str(project),
        output=str(output),
        python=choices.python,
        suites=suites,
        partition=choices.partition,
        account=choices.account,
        gpus=choices.gpus,
        time=time,
        test_seconds=test_seconds,
        grace_seconds=GRACE_SECONDS,
        scratch=_in_double_quotes(choices.scratch) if choices.scratch else "${TMPDIR:-/tmp}",
        setup=choices.setup,
        container=choices.container,
        container_mounts=_mounts(choices, project, output),
        pytest_arguments=choices.pytest_arguments,
        extra_arguments=choices.extra_arguments,
    )
    return SuitePlan(suites, output, script)


def run(plan: SuitePlan, show: Callable[[str], None]) -> int:
    """Submit the job, show its log until it has ended, and write the reports; returns the exit code.

    A signal of `WATCHED` cancels the job; a second one ends the wait.

    Raises:
        SlurmError: Slurm rejected the job, or has not answered for `UNREACHABLE_SECONDS`.
    """
    for name in ("logs", "junit"):
        (plan.output / name).mkdir(parents=True, exist_ok=True)
    script = plan.output / "ci.sh"
    script.write_text(plan.script, encoding="utf-8")
    with SignalInbox() as inbox:
        number = submit(script)
        show(
            f"job {number}: {', '.join(suite.name for suite in plan.suites)}; the output folder is {plan.output}\n"
        )
        view, interrupted = follow(number, plan.output, inbox, show)
    report = read_report(plan, view)
    write_report(plan, report)
    show("\n".join(["", *report.lines(), ""]))
    return 128 + interrupted if interrupted else report.exit_code


def find_suites(project: Path, chosen: Sequence[str]) -> list[Suite]:
    """The chosen suites, or each folder in tests/ that contains tests.

    Raises:
        ConfigError: there are none, one does not exist, or two would have the same name.
    """
    if not chosen:
        folders = sorted({path.relative_to(project).parts[1] for path in project.glob("tests/*/**/test_*.py")})
        chosen = [f"tests/{folder}" for folder in folders]
    if not chosen:
        allowed = "must be named, or be folders in tests/ that contain tests"
        raise ConfigError("suites", str(project), allowed, f"not found in {project}")
    for path in chosen:
        if not (project / path.partition("::")[0]).exists():
            raise ConfigError("suites", path, f"must be a path in {project}")
    suites = [Suite(re.sub(r"[^\w.]+", "-", path.removeprefix("tests/")).strip("-"), path) for path in chosen]
    name, times = Counter([JOB, SETUP, *(suite.name for suite in suites)]).most_common(1)[0]
    if times > 1:
        raise ConfigError("suites", name, "must have different names, none of them job or setup")
    return suites


def read_report(plan: SuitePlan, view: JobView) -> JobReport:
    """The report of a job, from the files in its output folder."""
    ends = read_ends(plan.output)
    results = []
    for suite in plan.suites:
        found = ci_report.read_suite(plan.output / "junit" / f"{suite.name}.xml")
        counts = None if found is None else ci_report.count(found)
        results.append(SuiteResult(suite.name, ends.get(suite.name), counts))
    return JobReport(view.number, view.state, ends.get(SETUP), results)


def write_report(plan: SuitePlan, report: JobReport) -> None:
    """Write `report.txt` and `junit.xml` into the output folder."""
    (plan.output / "report.txt").write_text("\n".join([*report.lines(), ""]), encoding="utf-8")
    merged = {}
    for suite in report.suites:
        found = ci_report.read_suite(plan.output / "junit" / f"{suite.name}.xml")
        complete = found is not None and suite.verdict not in INCOMPLETE
        merged[suite.name] = TestSuite() if found is None else found
        if not complete and suite.verdict is not SuiteVerdict.EMPTY:
            log = plan.output / "logs" / f"{suite.name}.log"
            ci_report.add_error(merged[suite.name], suite.name, suite.verdict, log)
    ci_report.write_merged(plan.output / "junit.xml", merged)


# --- values -----------------------------------------------------------------------------------------------------


def _next_folder(root: Path) -> Path:
    numbers = [int(path.name) for path in root.glob("[0-9]*") if path.name.isdecimal()]
    return root / f"{max(numbers, default=0) + 1:03d}"


def _refuse_line_breaks(choices: Choices) -> None:
    """Raise `ConfigError` for a line break in a `#SBATCH` line, where it would end the comment."""
    values = {
        "--partition": choices.partition or "",
        "--account": choices.account or "",
        "--output-root": str(choices.output_root.absolute()),
        **{f"--extra-sbatch-arg {argument!r}": argument for argument in choices.extra_arguments},
    }
    for key, value in values.items():
        if "\n" in value or "\r" in value:
            raise ConfigError(key.split()[0], value, "must be text without line breaks")
    for argument in choices.extra_arguments:
        if not argument.startswith("-"):
            raise ConfigError(
                "--extra-sbatch-arg", argument, 'must be an option of sbatch with its value, as in "--qos=high"'
            )


def _in_double_quotes(text: str) -> str:
    """`text` escaped for double quotes, so that the shell expands only `$NAME` and `${NAME}` in it."""
    parts, at = [], 0
    for found in _VARIABLE.finditer(text):
        parts += [re.sub(r'([\\"`$])', r"\\\1", text[at : found.start()]), found.group()]
        at = found.end()
    return "".join([*parts, re.sub(r'([\\"`$])', r"\\\1", text[at:])])


def _mounts(choices: Choices, project: Path, output: Path) -> Sequence[str]:
    """The mounts besides project, output and scratch.

    Raises:
        ConfigError: there are mounts but no container, or a path cannot be mounted.
    """
    if choices.container is None:
        if choices.container_mounts:
            raise ConfigError(
                "--container-mount", list(choices.container_mounts), "must be used together with --container"
            )
        return ()
    for path in (project, output):
        if set(str(path)) & set(",:"):
            raise ConfigError(
                "--container", str(path), "must be used with mounted paths that contain neither , nor :"
            )
    return choices.container_mounts
