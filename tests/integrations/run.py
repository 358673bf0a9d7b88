"""Runs the tests of the integrations with frameworks with the frameworks' own packages: ``make integrations``.

Each folder here with a ``requirements.txt`` is an integration. Its first line, ``# environment: NAME``, names the
environment that it shares with others; by default it has one of its own. A line
``# without dependencies: PACKAGE`` names one that is installed alone, as its dependencies are not needed or cannot
be installed. Environments are made below the user's cache folder and are kept: they are made again when the
requirements or the interpreter have changed. The tests run in a network namespace that has loopback alone, with a
home of their own (``tests/loopback.py``).

An integration whose packages cannot be installed is skipped with the reason. The exit code is 1 if a test failed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import loopback
from lowest_versions import ROOT, make_environment
from packaging.requirements import Requirement
from pythons import Row, row_of

HERE = Path(__file__).parent
SKIPPED = "skipped"
_HEADER = "# environment:"
_ALONE = "# without dependencies:"


@dataclass(frozen=True)
class Integration:
    """One folder of tests.

    Attributes:
        name: of the folder.
        environment: the environment that it runs in.
        requirements: what is installed there, one in a line.
        alone: what is installed there without its dependencies.
    """

    name: str
    environment: str
    requirements: tuple[str, ...]
    alone: tuple[str, ...] = ()


def integrations(folder: Path) -> list[Integration]:
    """The integrations in a folder, by name."""
    return [
        integration_of(path.parent.name, path.read_text("utf-8"))
        for path in sorted(folder.glob("*/requirements.txt"))
    ]


def integration_of(name: str, text: str) -> Integration:
    """The integration whose requirements are `text`."""
    lines = [line.strip() for line in text.splitlines()]
    named = next((line.removeprefix(_HEADER).strip() for line in lines if line.startswith(_HEADER)), name)
    alone = tuple(line.removeprefix(_ALONE).strip() for line in lines if line.startswith(_ALONE))
    return Integration(name, named, tuple(line for line in lines if line and not line.startswith("#")), alone)


def shared_requirements(found: Sequence[Integration]) -> dict[str, tuple[list[str], list[str]]]:
    """What each environment needs, each once: the requirements of all its integrations, and those alone."""
    needed: dict[str, tuple[list[str], list[str]]] = {}
    for integration in found:
        together = needed.setdefault(integration.environment, ([], []))
        for wanted, own in zip(together, (integration.requirements, integration.alone), strict=True):
            wanted += [each for each in own if each not in wanted]
    return needed


def stamp_of(requirements: Sequence[str], python: str) -> str:
    """A text that changes when an environment has to be made again."""
    return hashlib.sha256("\n".join((python, *requirements)).encode()).hexdigest()


def prepare(folder: Path, requirements: Sequence[str], alone: Sequence[str] = ()) -> str:
    """Make an environment, unless it is there; returns its interpreter.

    Raises:
        subprocess.CalledProcessError: a package cannot be installed.
    """
    stamp = stamp_of([*requirements, *alone], sys.version)
    kept = folder / "dray-stamp"
    if kept.exists() and kept.read_text() == stamp:
        return str(folder / "bin" / "python")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Not with the checkout: what the frameworks allow decides on the versions of its dependencies.
    made = make_environment(folder, sys.executable, [*requirements, *_needed_by_tests()])
    if alone:
        pip = [made, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, *shlex.split(os.environ.get("PIP_ARGS", "")), *alone], check=True)
    kept.write_text(stamp)
    return made


def _needed_by_tests() -> list[str]:
    """What dray and the common parts of its tests import."""
    own = [each for each in importlib.metadata.requires("dray-rl") or () if "extra ==" not in each]
    return [*own, "pytest>=8.2", "pytest-timeout>=2.3.1", "packaging"]


def versions(python: str, requirements: Sequence[str]) -> str:
    """The versions of packages in an environment, as far as they are there."""
    names = [Requirement(each).name for each in requirements]
    program = (
        "import importlib.metadata as m, json, sys\n"
        "print(json.dumps({d.metadata['Name'].lower(): d.version for d in m.distributions()}))"
    )
    ended = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    found = json.loads(ended.stdout)
    return " ".join(f"{name} {found[name.lower()]}" for name in names if name.lower() in found)


def run_integration(integration: Integration, python: str, arguments: Sequence[str]) -> Row:
    """Run the tests of an integration in its environment."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dray-integration-", dir="/tmp", ignore_cleanup_errors=True) as home:
        report = Path(home) / "report.xml"
        pytest = [
            python, "-m", "pytest", "-q", "-m", "integration", "-p", "no:cacheprovider", "-p", "no:asyncio",
            "-o", "faulthandler_timeout=0", f"--junitxml={report}",
            *arguments, str(HERE / integration.name),
        ]  # fmt: skip
        paths = os.pathsep.join((str(ROOT / "src"), str(ROOT / "tests")))
        variables = loopback.environment(Path(home), PYTHONPATH=paths)
        code = subprocess.run(loopback.command(pytest), cwd=ROOT, env=variables, check=False).returncode
        return row_of(integration.name, code, report, time.monotonic() - began)


def table(rows: Sequence[tuple[Row, str]]) -> Iterator[str]:
    """The rows, each with the versions of its packages, as lines of text."""
    yield f"{'integration':<16} {'result':<10} {'passed':>7} {'failed':>7} {'skipped':>8} {'seconds':>8}  packages"
    for row, packages in rows:
        counts = f"{row.passed:>7} {row.failed:>7} {row.skipped:>8} {row.seconds:>8.0f}"
        yield f"{row.version:<16} {row.result:<10} {counts}  {packages}"


def main() -> int:
    """Install, run the tests of each integration, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "integrations", nargs="*", metavar="INTEGRATION", help="only these integrations; by default all"
    )
    parser.add_argument("--folder", type=Path, help="where the environments are kept; by default the user's cache")
    parser.add_argument("--pytest", action="append", default=[], metavar="ARGUMENT", help="an argument for pytest")
    parser.add_argument("--list", action="store_true", help="show the integrations and do nothing")
    chosen = parser.parse_args()
    found = integrations(HERE)
    unknown = set(chosen.integrations) - {integration.name for integration in found}
    if unknown:
        parser.error(
            f"no such integration: {', '.join(sorted(unknown))}; there are {', '.join(d.name for d in found)}"
        )
    folder = chosen.folder or default_folder()
    needed = shared_requirements(found)
    rows: list[tuple[Row, str]] = []
    for integration in found:
        if chosen.integrations and integration.name not in chosen.integrations:
            continue
        print(
            f"--- {integration.name}: {folder / integration.environment}:",
            *integration.requirements,
            *integration.alone,
            flush=True,
        )
        if not chosen.list:
            rows.append(
                _row_of_integration(
                    integration, folder / integration.environment, needed[integration.environment], chosen.pytest
                )
            )
    if rows:
        print(*table(rows), sep="\n")
    return 1 if any(row.result not in ("passed", SKIPPED) for row, _ in rows) else 0


def _row_of_integration(
    integration: Integration, folder: Path, needed: tuple[list[str], list[str]], arguments: Sequence[str]
) -> tuple[Row, str]:
    if loopback.problem():
        return Row(integration.name, SKIPPED), loopback.problem()
    began = time.monotonic()
    try:
        python = prepare(folder.absolute(), *needed)
    except subprocess.CalledProcessError as error:
        row = Row(integration.name, SKIPPED, seconds=time.monotonic() - began)
        return row, f"cannot be installed: pip ended with exit code {error.returncode}"
    row = run_integration(integration, python, arguments)
    return replace_result(row), versions(python, [*integration.alone, *integration.requirements])


def replace_result(row: Row) -> Row:
    """An integration all of whose tests were skipped is skipped."""
    return row._replace(result=SKIPPED) if row.result == "passed" and row.skipped and not row.passed else row


def default_folder() -> Path:
    """Where the environments are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dray" / "integrations"


if __name__ == "__main__":
    sys.exit(main())
