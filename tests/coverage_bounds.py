"""Coverage by package, at the end of a whole run; too little of it fails the run.

`make test` asks for coverage when it runs every test, and `tests/conftest.py` registers this plugin then. What is
measured is set in `pyproject.toml`.
"""

import collections
import json
import tempfile
from pathlib import Path

import coverage
import pytest

MIN_DATA_PLANE = (95.0, 90.0)
MIN_JOBS = (90.0, 80.0)
"""Per cent of the lines and of the branches."""

JOB_PACKAGES = frozenset(("dray.jobs",))
SOURCE = Path("src", "dray")


class CoverageBounds:
    """Compares what pytest-cov has measured with the bounds, and prints it as a table."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, float, float]] = []

    @property
    def _too_little(self) -> list[str]:
        return [
            f"{name}: at least {min_lines:g} % of the lines and {min_branches:g} % of the branches are required"
            for name, lines, branches in self._rows
            for min_lines, min_branches in [MIN_JOBS if name in JOB_PACKAGES else MIN_DATA_PLANE]
            if name != "all" and (lines < min_lines or branches < min_branches)
        ]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            return  # an interrupted run has measured too little for a result
        self._rows = _percentages()
        if session.exitstatus == pytest.ExitCode.OK and self._too_little:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self._rows:
            return
        terminalreporter.section("coverage")
        terminalreporter.write_line(f"{'':<18}   lines  branches")
        for name, lines, branches in self._rows:
            terminalreporter.write_line(f"{name:<18} {lines:6.1f} %  {branches:6.1f} %")
        for line in self._too_little:
            terminalreporter.write_line(f"FAILED: {line}; see `python -m coverage report -m`", red=True)


def _percentages() -> list[tuple[str, float, float]]:
    """(package, lines, branches) in per cent, and of all of them."""
    measured = coverage.Coverage()
    measured.load()
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        measured.json_report(outfile=report.name)
        files = json.loads(Path(report.name).read_text(encoding="utf-8"))["files"]
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for path, each in files.items():
        package = Path(path).relative_to(SOURCE).parts[0]
        for name in (f"dray.{package}", "all"):
            counts[name].update({key: n for key, n in each["summary"].items() if isinstance(n, int)})
    return [
        (
            name,
            100 * found["covered_lines"] / found["num_statements"],
            100 * found["covered_branches"] / max(1, found["num_branches"]),
        )
        for name, found in sorted(counts.items(), key=lambda entry: (entry[0] == "all", entry[0]))
    ]
