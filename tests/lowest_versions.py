"""Runs tests with the lowest versions that pyproject.toml declares: ``python tests/lowest_versions.py [TESTS …]``.

Environments of their own are made in a temporary folder, or in ``--folder``, where they are kept and used again.
Each package that dray or one of its extras asks for is installed in the lowest version that is allowed; what those
bring along is as new as they let it be, as for a user who has pinned them and nothing else. ``PIP_ARGS`` are
further options for pip.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
EXTRA = "dev"
"""What the tests need: it includes every other extra but those for another CUDA, and for fuzzing."""

ENVIRONMENTS: Sequence[tuple[Collection[str], Sequence[str]]] = (
    ((), ("tests/unit", "tests/contract", "tests/process/test_job_lifecycle.py")),
    (("ucxx", "torch"), ("tests/unit/ring", "tests/unit/payload", "tests/unit/protocol")),
)
"""Extras that are left out, as they raise the bounds of others, and the tests that are run without them."""


def lowest_versions(project: Mapping[str, Any], extra: str, without: Collection[str] = ()) -> list[str]:
    """The requirements of a project and of one of its extras, each with its lower bound as the only version.

    Where several are about one package, the highest bound is what holds for all of them.

    Args:
        project: the table of that name in pyproject.toml.
        without: extras that are left out, where another one includes them.

    Raises:
        ValueError: a requirement has no lower bound, or more than one.
    """
    found: dict[str, tuple[Version, Requirement]] = {}
    for requirement in requirements(project, [*project["dependencies"], f"{project['name']}[{extra}]"], without):
        bounds = [Version(each.version) for each in requirement.specifier if each.operator == ">="]
        if len(bounds) != 1:
            raise ValueError(f"{requirement} must have one lower bound")
        name = canonicalize_name(requirement.name)
        known = found.get(name)
        if known is None or known[0] < bounds[0]:
            found[name] = bounds[0], requirement
    return [_pin(requirement, bound) for _, (bound, requirement) in sorted(found.items())]


def _pin(requirement: Requirement, version: Version) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}=={version}"


def requirements(
    project: Mapping[str, Any], texts: Sequence[str], without: Collection[str]
) -> Iterator[Requirement]:
    """The requirements that `texts` come to, the project's own extras taken apart, but for those in `without`."""
    for requirement in map(Requirement, texts):
        if canonicalize_name(requirement.name) != canonicalize_name(project["name"]):
            yield requirement
            continue
        for extra in sorted(requirement.extras.difference(without)):
            yield from requirements(project, project["optional-dependencies"][extra], without)


def main() -> int:
    """Install, run the tests, and return the exit code of the first pytest that fails, or 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", help="by default some of each environment")
    parser.add_argument("--folder", type=Path, help="where the environments are made and kept")
    parser.add_argument("--list", action="store_true", help="show the versions and do nothing")
    chosen = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    with tempfile.TemporaryDirectory(prefix="dray-lowest-") as temporary:
        for without, tests in ENVIRONMENTS:
            name = "-".join(["without", *without]) if without else "all"
            versions = lowest_versions(project, EXTRA, without)
            print(f"{name}: {' '.join(versions)}", flush=True)
            folder = (chosen.folder or Path(temporary)).absolute() / name
            if not chosen.list and (code := _run(folder, versions, chosen.tests or tests)):
                return code
    return 0


def _run(folder: Path, versions: Sequence[str], tests: Sequence[str]) -> int:
    python = make_environment(folder, sys.executable, versions)
    # Old packages warn about what newer ones have deprecated: that is no fault here.
    options = ["-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    return run_pytest(python, [*options, "-n", str(2 * (os.cpu_count() or 1)), *tests])


def make_environment(folder: Path, python: str, packages: Sequence[str]) -> str:
    """A virtual environment with `packages` and an editable dray; its interpreter.

    Args:
        folder: where it is made; what is there already is used.
        python: the interpreter that makes it.
        packages: arguments of `pip install`, those of ``PIP_ARGS`` are added.
    """
    made = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    pip = [made, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *shlex.split(os.environ.get("PIP_ARGS", "")), *packages], check=True)
    subprocess.run([*pip, "--no-deps", "--editable", str(ROOT)], check=True)
    return made


def run_pytest(python: str, arguments: Sequence[str]) -> int:
    """Run pytest with another interpreter; its exit code."""
    # Nothing of the environment that runs this is to be found.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run([python, "-m", "pytest", *arguments], cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
