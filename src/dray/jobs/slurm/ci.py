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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from junitparser import Error, JUnitXml, JUnitXmlError, TestCase, TestSuite

from dray.clock import Deadline
from dray.errors import ConfigError
from dray.jobs.launch.output import make_run_folder
from dray.jobs.process import SignalInbox
from dray.jobs.slurm.scheduler import (
    JobView,
    SlurmError,
    cancel,
    format_duration,
    parse_duration,
    query_job,
    render,
    submit,
)

JOB = "job"
"""The name of the batch script in `ends.tsv`."""

SETUP = "setup"
"""The name of the setup command in `ends.tsv`."""

# --- run ---------------------------------------------------------------------------------------------------------

MARGIN_SECONDS = 30 * 60
"""Seconds that the job has beyond the tests' time limit, for its start, the setup and the cleanup."""

GRACE_SECONDS = 10
"""Seconds between the stack dump of a suite that has exceeded its time limit and SIGKILL."""

_NOT_VARIABLE = re.compile(r'[\\"`]|\$(?!\w|\{\w+\})')
"""Special characters within double quotes of the shell, but for those of `$NAME` and `${NAME}`."""


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
    """A job to submit: its suites (see `find_suites`), its output folder, and its batch script."""

    suites: Mapping[str, str]
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
    root = choices.output_root.absolute()
    _check_values(choices, project, root)
    output = make_run_folder(lambda: _next_folder(root), new=True)[0] if make else _next_folder(root)
    script = render(
        "ci.sh.j2",
        choices=choices,
        job_name_in_ends=JOB,
        setup_name=SETUP,
        project=str(project),
        output=str(output),
        suites=suites,
        time=time,
        test_seconds=test_seconds,
        grace_seconds=GRACE_SECONDS,
        scratch=_NOT_VARIABLE.sub(r"\\\g<0>", choices.scratch) if choices.scratch else "${TMPDIR:-/tmp}",
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
        show(f"job {number}: {', '.join(plan.suites)}; the output folder is {plan.output}\n")
        view, interrupted = follow(number, plan.output, inbox, show)
    report = write_report(plan, view)
    show("\n".join(["", *report.lines(), ""]))
    return 128 + interrupted if interrupted else report.exit_code


def find_suites(project: Path, chosen: Sequence[str]) -> dict[str, str]:
    """The chosen suites, or each folder in tests/ that contains tests: the path given to pytest by name.

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
    names = [re.sub(r"[^\w.]+", "-", path.removeprefix("tests/")).strip("-") for path in chosen]
    name, times = Counter([JOB, SETUP, *names]).most_common(1)[0]
    if times > 1:
        raise ConfigError("suites", name, "must have different names, none of them job or setup")
    return dict(zip(names, chosen, strict=True))


def _next_folder(root: Path) -> Path:
    numbers = [int(path.name) for path in root.glob("[0-9]*") if path.name.isdecimal()]
    return root / f"{max(numbers, default=0) + 1:03d}"


def _check_values(choices: Choices, project: Path, root: Path) -> None:
    """Raise `ConfigError` for what an `#SBATCH` line or a mount cannot have."""
    values = {
        "--partition": choices.partition or "",
        "--account": choices.account or "",
        "--output-root": str(root),
        **{f"--extra-sbatch-arg {argument!r}": argument for argument in choices.extra_arguments},
    }
    for key, value in values.items():
        if "\n" in value or "\r" in value:  # it would end the comment
            raise ConfigError(key.split()[0], value, "must be text without line breaks")
    for argument in choices.extra_arguments:
        if not argument.startswith("-"):
            allowed = 'must be an option of sbatch with its value, as in "--qos=high"'
            raise ConfigError("--extra-sbatch-arg", argument, allowed)
    if choices.container is None:
        if choices.container_mounts:
            allowed = "must be used together with --container"
            raise ConfigError("--container-mount", list(choices.container_mounts), allowed)
        return
    for path in (project, root):
        if set(str(path)) & set(",:"):
            allowed = "must be used with mounted paths that contain neither , nor :"
            raise ConfigError("--container", str(path), allowed)


# --- follow ------------------------------------------------------------------------------------------------------

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
    log = _added_lines(output / "ci.log")
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
        show(next(log))
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
    show(next(log))
    return view, interrupted


def _recorded(number: int, output: Path) -> JobView | None:
    """The ended job as its script recorded it, for a slurmctld that is down or no longer has the job."""
    end = read_ends(output).get(JOB)
    if end is None:
        return None
    return JobView(number, "FAILED" if end.exit_code else "COMPLETED")


def _wait_for_record(output: Path, inbox: SignalInbox) -> None:
    deadline = Deadline.after(RECORD_SECONDS)
    while JOB not in read_ends(output) and not deadline.expired:
        select.select([inbox], [], [], min(0.5, deadline.remaining))
        if inbox.receive():
            return


def _added_lines(path: Path) -> Iterator[str]:
    """Yields the lines that were added to a growing file, which may not exist yet, since the last time."""
    offset = 0
    while True:
        content = b""
        with suppress(FileNotFoundError), path.open("rb") as file:
            file.seek(offset)
            content = file.read()
        content = content[: content.rfind(b"\n") + 1]  # whole lines, and so whole characters
        offset += len(content)
        yield content.decode("utf-8", errors="replace")


# --- report ------------------------------------------------------------------------------------------------------

OUT_OF_TIME = 124
"""Exit code of the command `timeout` after a timeout."""

NOTHING_TESTED = 5
"""Exit code of a run without tests, the same as pytest's."""

_LOG_CHARACTERS = 20_000

# Characters that XML 1.0 excludes, even escaped: most control characters, lone surrogates, two non-characters.
_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")

_ENDED_BY_SLURM = {"TIMEOUT": OUT_OF_TIME, "DEADLINE": OUT_OF_TIME, "CANCELLED": 143}


class SuiteVerdict(StrEnum):
    """The result of one suite."""

    PASSED = "passed"  # at least one test ran, and none failed
    SKIPPED = "skipped"  # every test was skipped
    EMPTY = "empty"  # the markers select no test of the suite
    FAILED = "failed"  # tests failed, or pytest could not run them
    OUT_OF_TIME = "out of time"  # `--test-timeout` expired; the log has the stack traces
    CRASHED = "crashed"  # a signal ended the process, or there is no JUnit file
    NOT_RUN = "not run"  # the job ended, or the time limit was reached, before or during the suite


GOOD = frozenset({SuiteVerdict.PASSED, SuiteVerdict.EMPTY})
"""Verdicts with which the exit code is 0, if at least one suite has passed."""

INCOMPLETE = frozenset({SuiteVerdict.CRASHED, SuiteVerdict.OUT_OF_TIME, SuiteVerdict.NOT_RUN})
"""Verdicts on suites whose process did not complete, whatever the results of its tests are."""


@dataclass(frozen=True, slots=True)
class End:
    """The end of a process, as the batch script recorded it."""

    exit_code: int
    seconds: int


@dataclass(frozen=True, slots=True)
class Counts:
    """The numbers of tests by result; expected failures count as passed."""

    passed: int = 0
    failed: int = 0
    errors: int = 0
    skipped: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{count} {name}" for name, count in asdict(self).items() if count) or "none"


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """The result of a suite: its end (None: not recorded), and its tests (None: no JUnit file)."""

    name: str
    end: End | None
    counts: Counts | None

    @property
    def verdict(self) -> SuiteVerdict:
        """The verdict on the suite, from its end and the tests in its JUnit file."""
        end, counts = self.end, self.counts
        if end is None:
            return SuiteVerdict.NOT_RUN
        if end.exit_code == OUT_OF_TIME:
            return SuiteVerdict.OUT_OF_TIME
        if end.exit_code == NOTHING_TESTED:
            # A module that is skipped as a whole counts as no test for pytest, but is in its JUnit file.
            return SuiteVerdict.SKIPPED if counts is not None and counts.skipped else SuiteVerdict.EMPTY
        if end.exit_code >= 128 or (end.exit_code == 0 and counts is None):
            return SuiteVerdict.CRASHED
        if end.exit_code != 0 or counts is None or counts.failed or counts.errors:
            return SuiteVerdict.FAILED
        return SuiteVerdict.PASSED if counts.passed else SuiteVerdict.SKIPPED


@dataclass(frozen=True, slots=True)
class JobReport:
    """The report of a job.

    Attributes:
        job: Slurm's number of the job.
        state: Slurm's last state of the job, e.g. ``"COMPLETED"``.
        setup: the end of the setup command; None if there was none.
        suites: the results of the suites, in their order.
    """

    job: int
    state: str
    setup: End | None
    suites: Sequence[SuiteResult]

    @property
    def exit_code(self) -> int:
        """0 if a suite has passed and every other is good, else the exit code of the first suite that is not good.

        It is `NOTHING_TESTED` if no suite is worse than skipped, and one was skipped or none passed. For a suite
        without an exit code, the job's state decides.
        """
        if self.setup is not None and self.setup.exit_code != 0:
            return self.setup.exit_code
        for suite in self.suites:
            if suite.verdict not in GOOD and suite.verdict is not SuiteVerdict.SKIPPED:
                return self._code_of(suite)
        verdicts = {suite.verdict for suite in self.suites}
        tested = SuiteVerdict.PASSED in verdicts and SuiteVerdict.SKIPPED not in verdicts
        return 0 if tested else NOTHING_TESTED

    def _code_of(self, suite: SuiteResult) -> int:
        if suite.end is None:
            return _ENDED_BY_SLURM.get(self.state, 1)
        return suite.end.exit_code or 1  # 0 without a report

    def lines(self) -> Iterator[str]:
        """The table of suites, and a line with the conclusion."""
        width = max([len("suite"), *(len(suite.name) for suite in self.suites)])
        yield f"{'suite':{width}}  {'verdict':11}  {'exit':>4}  {'seconds':>7}  tests"
        for suite in self.suites:
            code, seconds = ("-", "-") if suite.end is None else (str(suite.end.exit_code), str(suite.end.seconds))
            tests = "no report" if suite.counts is None else str(suite.counts)
            yield f"{suite.name:{width}}  {suite.verdict:11}  {code:>4}  {seconds:>7}  {tests}"
        if self.setup is not None:
            yield f"setup: exit code {self.setup.exit_code} after {self.setup.seconds} s"
        yield f"job {self.job} ({self.state}): {self.conclusion}"

    @property
    def conclusion(self) -> str:
        """The result of the job in one phrase: "passed" if and only if the exit code is 0."""
        if self.exit_code == 0:
            return "passed"
        if self.setup is not None and self.setup.exit_code != 0:
            return f"the setup failed, exit code {self.exit_code}"
        wrong = [f"{suite.name} {suite.verdict}" for suite in self.suites if suite.verdict not in GOOD]
        return f"{', '.join(wrong) or 'nothing was tested'}; exit code {self.exit_code}"


def write_report(plan: SuitePlan, view: JobView) -> JobReport:
    """Write `report.txt` and `junit.xml` of an ended job from its output folder; returns the report."""
    ends, results, merged = read_ends(plan.output), [], JUnitXml()
    for name in plan.suites:
        found = read_suite(plan.output / "junit" / f"{name}.xml")
        result = SuiteResult(name, ends.get(name), None if found is None else count(found))
        results.append(result)
        tests = TestSuite() if found is None else found
        broken_off = result.verdict in INCOMPLETE or (found is None and result.verdict is not SuiteVerdict.EMPTY)
        if broken_off:
            log = plan.output / "logs" / f"{name}.log"
            tests.add_testcase(_process_error(name, result.verdict, log))
        tests.name = name
        merged.add_testsuite(tests)
    report = JobReport(view.number, view.state, ends.get(SETUP), results)
    (plan.output / "report.txt").write_text("\n".join([*report.lines(), ""]), encoding="utf-8")
    merged.write(str(plan.output / "junit.xml"))
    return report


def read_ends(output: Path) -> Mapping[str, End]:
    """The ends that the batch script has recorded in the output folder so far, by name."""
    try:
        lines = (output / "ends.tsv").read_text(encoding="utf-8").split("\n")[:-1]  # complete lines only
    except FileNotFoundError:
        return {}
    fields = [line.split("\t") for line in lines]
    return {name: End(int(exit_code), int(seconds)) for name, exit_code, seconds in fields}


def read_suite(path: Path) -> TestSuite | None:
    """The first suite of a JUnit file; None if the file is missing or incomplete, as after a crash."""
    try:
        return next(iter(JUnitXml.fromstring(path.read_bytes())), None)
    except (FileNotFoundError, SyntaxError, JUnitXmlError):  # XML parsers have subclasses of SyntaxError
        return None


def count(suite: TestSuite) -> Counts:
    """The numbers of a suite's tests by result."""
    return Counts(**Counter(map(_outcome, suite)))


def _outcome(case: TestCase) -> str:
    if case.is_failure:
        return "failed"
    if case.is_error:
        return "errors"
    return "skipped" if any(each.type != "pytest.xfail" for each in case.result) else "passed"


def _process_error(name: str, what: str, log: Path) -> TestCase:
    """An error about the process of a suite, with the end of its log."""
    case, error = TestCase("process of the suite", name), Error(what)
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    error.text = _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text[-_LOG_CHARACTERS:])
    case.result = [error]
    return case
