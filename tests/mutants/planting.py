"""Plants a defect into a copy of the sources, and looks for it with the model or the simulation."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from defects import Defect, Search

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src"
TESTS = ROOT / "tests"
MAX_SECONDS = 3600.0
"""Bounds one search; a defect that is not found by then has survived."""


@dataclass(frozen=True)
class Finding:
    """The result of a search: the seed that found the defect, or None; how long it took; what was printed last."""

    seed: int | None
    seconds: float
    output: str


@contextlib.contextmanager
def planted(defect: Defect | None) -> Iterator[Path]:
    """A folder with a copy of the sources, with the defect in it."""
    with tempfile.TemporaryDirectory(prefix="dray-mutant-") as folder:
        copy = Path(folder) / "src"
        shutil.copytree(SOURCES, copy, ignore=shutil.ignore_patterns("__pycache__"))
        if defect is not None:
            file = copy / "dray" / defect.file
            file.write_text(defect.plant(file.read_text(encoding="utf-8")), encoding="utf-8")
        yield copy


def search_for(defect: Defect | None, search: Search, seeds: int, first: int = 0) -> Finding:
    """Run a search over the sources with the defect, or over them as they are, from seed `first` on.

    Raises:
        RuntimeError: the search failed in another way than by finding a violation.
    """
    with planted(defect) as copy:
        started = time.monotonic()
        try:
            ran = subprocess.run(
                [sys.executable, *command(search, seeds, first)],
                cwd=copy.parent,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join((str(copy), str(TESTS))),
                    "PYTHONDONTWRITEBYTECODE": "1",
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=MAX_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            return Finding(None, time.monotonic() - started, str(error))
        seconds = time.monotonic() - started
    if ran.returncode == 0:
        return Finding(None, seconds, ran.stdout)
    found = re.search(r"\bseed[ =:]+(\d+)", ran.stdout)
    if found is None:
        raise RuntimeError(f"the search for {defect and defect.name} failed:\n{ran.stdout[-4000:]}")
    return Finding(int(found[1]), seconds, ran.stdout)


def find(defect: Defect, seeds: int) -> Finding:
    """Search for a planted defect; a seed that fails without it does not count."""
    first, seconds = 0, 0.0
    while True:
        finding = search_for(defect, defect.search, seeds - first, first)
        seconds += finding.seconds
        if finding.seed is None or search_for(None, defect.search, 1, finding.seed).seed is None:
            return Finding(finding.seed, seconds, finding.output)
        first = finding.seed + 1


def command(search: Search, seeds: int, first: int) -> Sequence[str]:
    """What Python runs for a search."""
    wanted = ["--first", str(first), "--seeds", str(seeds)]
    if search is Search.MODEL:
        return [str(Path(__file__).parent / "walk_seeds.py"), *wanted]
    return ["-m", "simulation", *wanted, "--stop-at-first", "--jobs", "1"]
