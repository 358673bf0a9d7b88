"""Runs the quick tests with each supported Python that is on this machine: ``python tests/pythons.py [TESTS …]``.

An interpreter is found on PATH, or among those of pyenv. Each gets an environment of its own in a temporary
folder, or in ``--folder``, where it is kept and used again, with the versions of constraints.txt. torch is left
out, as its builds bring gigabytes of CUDA for most of them, and the tests that need it are skipped; ``--torch``
installs it. The table at the end has a line for each Python. The exit code is 1 if one of them failed, or if none
was found.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from lowest_versions import EXTRA, ROOT, make_environment, requirements, run_pytest

VERSIONS = ("3.11", "3.12", "3.13", "3.14")
QUICK = ("tests/unit", "tests/property", "tests/contract")
NOT_FOUND = "not found"


class Row(NamedTuple):
    """What came of one Python.

    Attributes:
        version: the interpreter's version, the whole of it where it was found.
        result: ``"passed"``, ``"failed"``, what went wrong before the tests, or ``"not found"``.
    """

    version: str
    result: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0


def find_python(version: str, pyenv: Path) -> Path | None:
    """An interpreter of this version that runs, on PATH or below `pyenv`."""
    name = f"python{version}"
    on_path = shutil.which(name)
    candidates = [Path(on_path)] if on_path else []
    # A file on PATH may be a shim of pyenv, which runs only where the version is chosen.
    candidates += sorted(pyenv.glob(f"versions/{version}.*/bin/{name}"), reverse=True)
    return next((each for each in candidates if full_version(each)), None)


def full_version(python: Path) -> str:
    """The interpreter's version; empty if it does not run."""
    program = "import platform, venv; print(platform.python_version())"
    try:
        ended = subprocess.run([python, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    except OSError:
        return ""
    return ended.stdout.strip() if ended.returncode == 0 else ""


def run_one(python: Path, folder: Path, packages: Sequence[str], arguments: Sequence[str]) -> Row:
    """Install and run the tests with one Python."""
    version = full_version(python)
    print(f"--- Python {version}: {python}", flush=True)
    began = time.monotonic()
    try:
        made = make_environment(folder, str(python), packages)
    except subprocess.CalledProcessError as error:
        return Row(version, f"not installed: exit code {error.returncode}", seconds=time.monotonic() - began)
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    code = run_pytest(made, ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments])
    return row_of(version, code, report, time.monotonic() - began)


def row_of(version: str, code: int, report: Path, seconds: float) -> Row:
    """The row of a pytest that ended with `code` and wrote `report`."""
    if not report.exists():
        return Row(version, f"no tests: exit code {code}", seconds=seconds)
    total = failed = skipped = 0
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        total += int(suite.get("tests", 0))
        failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped += int(suite.get("skipped", 0))
    return Row(version, "failed" if code else "passed", total - failed - skipped, failed, skipped, seconds)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """The rows as lines of text."""
    yield f"{'Python':<10} {'result':<28} {'passed':>7} {'failed':>7} {'skipped':>8} {'seconds':>8}"
    for row in rows:
        counts = f"{row.passed:>7} {row.failed:>7} {row.skipped:>8} {row.seconds:>8.0f}"
        yield f"{row.version:<10} {row.result:<28}" + ("" if row.result == NOT_FOUND else f" {counts}")


def main() -> int:
    """Run the tests with each Python, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", default=QUICK, help="by default the quick tests")
    parser.add_argument("--python", action="append", choices=VERSIONS, help="only this version; may be repeated")
    parser.add_argument("--folder", type=Path, help="where the environments are made and kept")
    parser.add_argument("--torch", action="store_true", help="install torch as well")
    parser.add_argument("--workers", type=int, default=2 * (os.cpu_count() or 1), help="tests at a time")
    chosen = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], f"{project['name']}[{EXTRA}]"]
    needed = map(str, requirements(project, asked, () if chosen.torch else ("torch",)))
    packages = ["--constraint", str(ROOT / "constraints.txt"), *needed]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    rows = []
    with tempfile.TemporaryDirectory(prefix="dray-pythons-") as temporary:
        for version in chosen.python or VERSIONS:
            python = find_python(version, pyenv)
            if python is None:
                rows.append(Row(version, NOT_FOUND))
                continue
            folder = (chosen.folder or Path(temporary)).absolute() / version
            arguments = ["-n", str(chosen.workers), "--maxschedchunk", "4", *chosen.tests]
            rows.append(run_one(python, folder, packages, arguments))
    print(*table(rows), sep="\n")
    found = [row for row in rows if row.result != NOT_FOUND]
    return 0 if found and all(row.result == "passed" for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
