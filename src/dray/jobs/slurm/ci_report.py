"""The report of `dray slurm ci`: JUnit files of the suites, and what became of each of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from junitparser import Error, JUnitXml, JUnitXmlError, TestCase, TestSuite

# --- ci junit ----------------------------------------------------------------------------------------------------

# What XML 1.0 cannot hold, not even escaped: most control characters, lone surrogates, two non-characters.
_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_LOG_CHARACTERS = 20_000


@dataclass(frozen=True, slots=True)
class Counts:
    """How many tests ended in which way; those that were expected to fail, and did, have passed."""

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
    """The first suite of a report; None where there is no whole report, as after a crash."""
    try:
        return next(iter(JUnitXml.fromstring(path.read_bytes())), None)
    except (FileNotFoundError, SyntaxError, JUnitXmlError):  # XML parsers have subclasses of SyntaxError
        return None


def count(suite: TestSuite) -> Counts:
    """The tests of a suite."""
    return Counts(**Counter(map(_outcome, suite)))


def _outcome(case: TestCase) -> str:
    if case.is_failure:
        return "failed"
    if case.is_error:
        return "errors"
    return "skipped" if any(each.type != "pytest.xfail" for each in case.result) else "passed"


def add_error(suite: TestSuite, name: str, what: str, log: Path) -> None:
    """Add to a suite that its process went wrong as a whole, with the end of its log."""
    case, error = TestCase("the suite as a whole", name), Error(what)
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    error.text = _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text[-_LOG_CHARACTERS:])
    case.result = [error]
    suite.add_testcase(case)


def write_merged(path: Path, suites: Mapping[str, TestSuite]) -> None:
    """Write one report with a suite for each name, in order."""
    report = JUnitXml()
    for name, suite in suites.items():
        suite.name = name
        report.add_testsuite(suite)
    report.write(str(path))


# --- ci report ---------------------------------------------------------------------------------------------------

# What became of the suites of a CI job, judged from their exit codes and JUnit reports.
#
# A suite has passed only if a test of it ran and none failed. One in which every test was skipped is "skipped".

JOB = "job"
"""The name under which the batch script records its own end."""

SETUP = "setup"
"""The name of the command that runs before the suites."""

OUT_OF_TIME = 124
"""Exit code of `timeout` when the time was over."""

NOTHING_TESTED = 5
"""Exit code of a run that tested nothing; pytest's own for "no tests"."""

_ENDED_BY_SLURM = {"TIMEOUT": OUT_OF_TIME, "DEADLINE": OUT_OF_TIME, "CANCELLED": 143}


class Verdict(StrEnum):
    """What became of one suite.

    | verdict | meaning |
    |---|---|
    | passed | at least one test ran, and none failed |
    | skipped | every test was skipped: nothing was tested |
    | empty | the markers select no test of it |
    | failed | tests failed, or pytest could not run them |
    | out of time | it was ended by `--test-timeout`; its log has the stacks |
    | crashed | its process was ended by a signal, or left no report |
    | not run | the job ended, or the time was over, before its turn or in the middle of it |
    """

    PASSED = "passed"
    SKIPPED = "skipped"
    EMPTY = "empty"
    FAILED = "failed"
    OUT_OF_TIME = "out of time"
    CRASHED = "crashed"
    NOT_RUN = "not run"


GOOD = frozenset({Verdict.PASSED, Verdict.EMPTY})
"""Verdicts that leave the exit code of the whole 0, as long as some suite has passed."""

BROKEN_OFF = frozenset({Verdict.CRASHED, Verdict.OUT_OF_TIME, Verdict.NOT_RUN})
"""Verdicts on the suite as a whole, whatever its tests were until then."""


@dataclass(frozen=True, slots=True)
class End:
    """How a suite's process ended, as the batch script recorded it."""

    exit_code: int
    seconds: int


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """One suite: how it ended (None: the job did not get there), its tests (None: no report), the verdict."""

    name: str
    end: End | None
    counts: Counts | None

    @property
    def verdict(self) -> Verdict:
        return judge(self.end, self.counts)


@dataclass(frozen=True, slots=True)
class Report:
    """A whole job.

    Attributes:
        job: its number.
        state: the last one that Slurm told, e.g. ``"COMPLETED"``.
        setup: how the command before the suites ended; None if there was none.
        suites: in the order in which they were to run.
    """

    job: int
    state: str
    setup: End | None
    suites: Sequence[SuiteResult]

    @property
    def exit_code(self) -> int:
        """0 if something was tested and nothing is wrong; else that of the first suite that is not good.

        A suite that was skipped counts only if no other is worse; it and a job in which nothing passed give
        `NOTHING_TESTED`. Where there is no exit code, it is that of what Slurm did with the job.
        """
        if self.setup is not None and self.setup.exit_code != 0:
            return self.setup.exit_code
        for suite in self.suites:
            if suite.verdict not in GOOD and suite.verdict is not Verdict.SKIPPED:
                return self._code_of(suite)
        verdicts = {suite.verdict for suite in self.suites}
        tested = Verdict.PASSED in verdicts and Verdict.SKIPPED not in verdicts
        return 0 if tested else NOTHING_TESTED

    def _code_of(self, suite: SuiteResult) -> int:
        if suite.end is None:
            return _ENDED_BY_SLURM.get(self.state, 1)
        return suite.end.exit_code or 1  # 0 without a report

    def lines(self) -> Iterator[str]:
        """A table, and one line on the whole."""
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
        """The whole in one phrase; "passed" if and only if the exit code is 0."""
        if self.exit_code == 0:
            return "passed"
        if self.setup is not None and self.setup.exit_code != 0:
            return f"the setup failed, exit code {self.exit_code}"
        wrong = [f"{suite.name} {suite.verdict}" for suite in self.suites if suite.verdict not in GOOD]
        return f"{', '.join(wrong) or 'nothing was tested'}; exit code {self.exit_code}"


def judge(end: End | None, counts: Counts | None) -> Verdict:
    """The verdict on a suite from its end and the tests in its report."""
    if end is None:
        return Verdict.NOT_RUN
    if end.exit_code == OUT_OF_TIME:
        return Verdict.OUT_OF_TIME
    if end.exit_code == NOTHING_TESTED:
        # Modules that are skipped as a whole have no tests for pytest, but are in its report.
        return Verdict.SKIPPED if counts is not None and counts.skipped else Verdict.EMPTY
    if end.exit_code >= 128 or (end.exit_code == 0 and counts is None):
        return Verdict.CRASHED
    if end.exit_code != 0 or counts is None or counts.wrong:
        return Verdict.FAILED
    return Verdict.PASSED if counts.passed else Verdict.SKIPPED


def read_ends(output: Path) -> Mapping[str, End]:
    """What the batch script recorded in the output folder until now, by name."""
    try:
        lines = (output / "ends.tsv").read_text(encoding="utf-8").split("\n")[:-1]  # whole lines only
    except FileNotFoundError:
        return {}
    fields = [line.split("\t") for line in lines]
    return {name: End(int(exit_code), int(seconds)) for name, exit_code, seconds in fields}
