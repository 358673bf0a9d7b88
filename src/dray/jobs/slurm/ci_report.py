"""The report of `dray slurm ci`: the verdict on each suite, and the merged JUnit file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from junitparser import Error, JUnitXml, JUnitXmlError, TestCase, TestSuite

# --- ci junit ----------------------------------------------------------------------------------------------------

# Characters that XML 1.0 excludes, even escaped: most control characters, lone surrogates, two non-characters.
_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_LOG_CHARACTERS = 20_000


@dataclass(frozen=True, slots=True)
class Counts:
    """The numbers of tests by result; expected failures count as passed."""

    passed: int = 0
    failed: int = 0
    errors: int = 0
    skipped: int = 0

    @property
    def wrong(self) -> int:
        return self.failed + self.errors

    def __str__(self) -> str:
        named = (
            ("passed", self.passed),
            ("failed", self.failed),
            ("errors", self.errors),
            ("skipped", self.skipped),
        )
        return ", ".join(f"{count} {name}" for name, count in named if count) or "none"


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


def add_error(suite: TestSuite, name: str, what: str, log: Path) -> None:
    """Add to a suite an error about its process, with the end of its log."""
    case, error = TestCase("process of the suite", name), Error(what)
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    error.text = _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text[-_LOG_CHARACTERS:])
    case.result = [error]
    suite.add_testcase(case)


def write_merged(path: Path, suites: Mapping[str, TestSuite]) -> None:
    """Write one JUnit file with all suites, in order."""
    report = JUnitXml()
    for name, suite in suites.items():
        suite.name = name
        report.add_testsuite(suite)
    report.write(str(path))


# --- ci report ---------------------------------------------------------------------------------------------------

# A suite has passed only if at least one test ran and none failed.

JOB = "job"
"""The name of the batch script in `ends.tsv`."""

SETUP = "setup"
"""The name of the setup command in `ends.tsv`."""

OUT_OF_TIME = 124
"""Exit code of the command `timeout` after a timeout."""

NOTHING_TESTED = 5
"""Exit code of a run without tests, the same as pytest's."""

_ENDED_BY_SLURM = {"TIMEOUT": OUT_OF_TIME, "DEADLINE": OUT_OF_TIME, "CANCELLED": 143}


class SuiteVerdict(StrEnum):
    """The result of one suite.

    | verdict | meaning |
    |---|---|
    | passed | at least one test ran, and none failed |
    | skipped | every test was skipped |
    | empty | the markers select no test of the suite |
    | failed | tests failed, or pytest could not run them |
    | out of time | `--test-timeout` expired; the log has the stack traces |
    | crashed | a signal ended the process, or there is no JUnit file |
    | not run | the job ended, or the time limit was reached, before or during the suite |
    """

    PASSED = "passed"
    SKIPPED = "skipped"
    EMPTY = "empty"
    FAILED = "failed"
    OUT_OF_TIME = "out of time"
    CRASHED = "crashed"
    NOT_RUN = "not run"


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
class SuiteResult:
    """The result of a suite: its end (None: not recorded), its tests (None: no JUnit file), the verdict."""

    name: str
    end: End | None
    counts: Counts | None

    @property
    def verdict(self) -> SuiteVerdict:
        return judge(self.end, self.counts)


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


def judge(end: End | None, counts: Counts | None) -> SuiteVerdict:
    """The verdict on a suite, from its end and the tests in its JUnit file."""
    if end is None:
        return SuiteVerdict.NOT_RUN
    if end.exit_code == OUT_OF_TIME:
        return SuiteVerdict.OUT_OF_TIME
    if end.exit_code == NOTHING_TESTED:
        # A module that is skipped as a whole counts as no test for pytest, but is in its JUnit file.
        return SuiteVerdict.SKIPPED if counts is not None and counts.skipped else SuiteVerdict.EMPTY
    if end.exit_code >= 128 or (end.exit_code == 0 and counts is None):
        return SuiteVerdict.CRASHED
    if end.exit_code != 0 or counts is None or counts.wrong:
        return SuiteVerdict.FAILED
    return SuiteVerdict.PASSED if counts.passed else SuiteVerdict.SKIPPED


def read_ends(output: Path) -> Mapping[str, End]:
    """The ends that the batch script has recorded in the output folder so far, by name."""
    try:
        lines = (output / "ends.tsv").read_text(encoding="utf-8").split("\n")[:-1]  # complete lines only
    except FileNotFoundError:
        return {}
    fields = [line.split("\t") for line in lines]
    return {name: End(int(exit_code), int(seconds)) for name, exit_code, seconds in fields}
