"""`make mutmut`: mutation of the code that keeps slots and speaks the protocol; fails on an unexplained survivor.

Works in a folder of its own with a copy of the sources and of the few tests that are about them, without the
checks for leaks: a mutant is tested in well under a second.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from planting import ROOT, SOURCES
from survivors import EXPLAINED, Survivor

MUTATED = (
    "ring/slot_state.py",
    "ring/slots.py",
    "ring/ring.py",
    "ring/lease.py",
    "protocol/server_session.py",
    "transport/served_connection.py",
)
TESTS = (
    *sorted((ROOT / "tests/unit/ring").glob("test_*.py")),
    ROOT / "tests/unit/protocol/test_sessions.py",
    ROOT / "tests/unit/transport/test_served_connection.py",
    ROOT / "tests/process/test_segment_process.py",
)
WALKS = """
import pytest
from ring_model import walk

@pytest.mark.parametrize("seed", range(40))
def test_walk(seed):
    walk(seed, 150)
"""
SETTINGS = """
[tool.mutmut]
source_paths = ["src"]
only_mutate = {only}
pytest_add_cli_args_test_selection = ["tests"]
pytest_add_cli_args = ["-p", "no:cacheprovider", "-k", "not b9 and not ends_its_interpreter"]  # they take long
use_git_change_detection = false
track_dependencies = false
timeout_constant = 3.0

[tool.pytest.ini_options]
timeout = 60
filterwarnings = ["error", "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"]
"""


def prepare(folder: Path) -> None:
    """Copy what a run needs."""
    shutil.copytree(SOURCES, folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    tests = folder / "tests"
    tests.mkdir()
    for file in (*TESTS, ROOT / "tests/forked_child.py", ROOT / "tests/ring_model.py"):
        shutil.copy(file, tests)
    (tests / "conftest.py").touch()
    (tests / "test_walks.py").write_text(WALKS, encoding="utf-8")
    only = [f"src/dray/{file}" for file in MUTATED]
    (folder / "pyproject.toml").write_text(SETTINGS.format(only=only), encoding="utf-8")


def mutmut(folder: Path, *arguments: str) -> str:
    """Run mutmut there; what it printed.

    Raises:
        CalledProcessError: it failed.
    """
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout


def survivors(folder: Path) -> Iterator[Survivor]:
    """What no test noticed."""
    for line in mutmut(folder, "results").splitlines():
        name, _, status = line.strip().partition(": ")
        if status not in ("survived", "no tests", "suspicious"):
            continue
        changed = [
            each for each in mutmut(folder, "show", name).splitlines() if re.match(r"[-+](?![-+]{2})", each)
        ]
        old, new = (" ".join(each[1:].strip() for each in changed if each[0] == sign) for sign in "-+")
        yield Survivor(place(name), old, new)


def place(mutant: str) -> str:
    """`dray.ring.lease.xǁLeaseǁrelease__mutmut_3` → `ring.lease.Lease.release`."""
    module, _, function = re.sub(r"__mutmut_\d+$", "", mutant).removeprefix("dray.").rpartition(".")
    return f"{module}.{function.removeprefix('xǁ').removeprefix('x_').replace('ǁ', '.')}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="make mutmut", description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dray-mutmut-") as name:
        folder = Path(name)
        prepare(folder)
        command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(arguments.jobs)]
        subprocess.run(command, cwd=folder, check=True)
        found = set(survivors(folder))
    for survivor in sorted(found - EXPLAINED.keys()):
        print(f"not explained: {survivor.function}\n  - {survivor.old}\n  + {survivor.new}")
    for survivor in sorted(EXPLAINED.keys() - found):
        print(f"explained, but killed or gone: {survivor.function}\n  - {survivor.old}\n  + {survivor.new}")
    print(f"{len(found)} survivors, {len(found - EXPLAINED.keys())} of them not explained")
    return 1 if found - EXPLAINED.keys() else 0


if __name__ == "__main__":
    sys.exit(main())
