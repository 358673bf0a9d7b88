"""The wheel and the source distribution, and the wheel in an environment that has nothing but what it asks for."""

import fcntl
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import NamedTuple

import pytest
from new_user_path import walk_new_users_path
from packaging.requirements import Requirement
from typer.core import TyperGroup
from typer.main import get_command

import dray
from dray.cli.app import app

ROOT = Path(__file__).parents[2]
CORE = {"ml-dtypes", "numpy", "xxhash"}
DATA_PLANE = """
import json, sys
import numpy as np
import dray, dray.prefetch, dray.ucxx

with dray.PayloadServer.create(slots=2, slot_bytes=1 << 16) as server, dray.PayloadClient() as client:
    ref = server.put({"n": np.arange(3)}, timeout=10)
    received = client.read(ref, timeout=10)["n"].tolist()
packages = {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names - {"__main__", "dray"}
print(json.dumps([received, sorted(packages)]))
"""


class Built(NamedTuple):
    """What was built, and where the wheel is installed.

    Attributes:
        sdist: the source distribution.
        wheel: built from the source distribution, as `python -m build` does.
        from_tree: the wheel again, built from this checkout.
        environment: a virtual environment with the wheel and what it asks for, and nothing else.
    """

    sdist: Path
    wheel: Path
    from_tree: Path
    environment: Path

    def member(self, name: str) -> str:
        """The text of a file in the folder of the wheel's metadata."""
        with zipfile.ZipFile(self.wheel) as archive:
            return archive.read(f"dray_rl-{dray.__version__}.dist-info/{name}").decode()

    @property
    def python(self) -> str:
        """The interpreter of the environment."""
        return str(self.environment / "bin" / "python")

    @property
    def program(self) -> str:
        """The `dray` command of the environment."""
        return str(self.environment / "bin" / "dray")

    @property
    def metadata(self) -> Message:
        return Parser().parsestr(self.member("METADATA"))

    @property
    def sources(self) -> set[str]:
        """The files in the source distribution."""
        with tarfile.open(self.sdist) as archive:
            return {name.partition("/")[2] for name in archive.getnames()}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Built:
    """Everything is built once, also where several processes run tests."""
    place = tmp_path_factory.getbasetemp()
    place = (place if worker_id == "master" else place.parent) / "packaging"
    place.mkdir(exist_ok=True)
    done = place / "done"
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            build(place / "dist")
            build(place / "tree", "--wheel")
            install(next((place / "dist").glob("*.whl")), place / "environment")
            done.touch()
    (sdist,), (wheel,), (from_tree,) = (
        place.glob(pattern) for pattern in ("dist/*.tar.gz", "dist/*.whl", "tree/*.whl")
    )
    return Built(sdist, wheel, from_tree, place / "environment")


def build(outdir: Path, *options: str) -> None:
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(outdir), *options, str(ROOT))


def install(wheel: Path, environment: Path) -> None:
    """Install the wheel by pip, without an index; the three packages are those of this interpreter."""
    venv.create(environment, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = environment / "lib" / version / "site-packages"
    for name in CORE:
        distribution = importlib.metadata.distribution(name)
        for part in {path.parts[0] for path in distribution.files or ()} - {"..", "__pycache__"}:
            (packages / part).symlink_to(Path(str(distribution.locate_file(part))).resolve())
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python")]
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", str(wheel))


def run(*command: str) -> None:
    code, printed, complaints = ended(ROOT, *command)
    assert code == 0, printed + complaints


@pytest.mark.timeout(240)
def test_wheel_asks_for_three_packages_and_names_each_extra(built: Built) -> None:
    metadata = built.metadata
    required = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    assert {each.name for each in required if each.marker is None} == CORE
    assert (metadata["Name"], metadata["Version"]) == ("dray-rl", dray.__version__)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(metadata.get_all("Provides-Extra", [])) == set(project["optional-dependencies"])
    assert "dray = dray.cli.__main__:main" in built.member("entry_points.txt")


@pytest.mark.timeout(240)
def test_long_description_has_no_relative_hyperlink_and_names_files_that_are_shipped(built: Built) -> None:
    text = str(built.metadata.get_payload())
    assert [target for target in re.findall(r"\]\(([^)]*)\)", text) if not re.match(r"https?://|#", target)] == []
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\((?!\w+:|#)([^)#]+)", readme))
    assert "CHANGELOG.md" in linked
    assert [path for path in linked if f"`{path}`" not in text] == []
    shipped = {str(parent) for path in built.sources for parent in (Path(path), *Path(path).parents)}
    assert [path for path in linked if path.rstrip("/") not in shipped] == []


@pytest.mark.timeout(240)
def test_wheel_is_the_package_and_nothing_else(built: Built) -> None:
    package = ROOT / "src" / "dray"
    expected = {
        str(path.relative_to(ROOT / "src"))
        for path in package.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    with zipfile.ZipFile(built.wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if not name.startswith(f"dray_rl-{dray.__version__}.dist-info/")} == expected
    assert "dray/py.typed" in expected


@pytest.mark.timeout(240)
def test_source_distribution_has_what_the_tests_need_and_builds_the_same_wheel(built: Built) -> None:
    sources = built.sources
    for folder in ("benchmarks", "docs", "examples", "src", "tests"):
        written = [path for kind in ("*.py", "*.md", "*.toml", "*.sh") for path in (ROOT / folder).rglob(kind)]
        assert {str(path.relative_to(ROOT)) for path in written} <= sources
    for name in ("CHANGELOG.md", "LICENSE", "Makefile", "README.md", "constraints.txt", ".ci/run"):
        assert name in sources
    assert [name for name in sources if "__pycache__" in name] == []
    assert built.wheel.read_bytes() == built.from_tree.read_bytes()


@pytest.mark.timeout(240)
def test_data_plane_works_with_three_packages(built: Built, tmp_path: Path) -> None:
    code, printed, complaints = ended(tmp_path, built.python, "-I", "-W", "error", "-c", DATA_PLANE)
    assert (code, complaints) == (0, "")
    assert json.loads(printed) == [[0, 1, 2], ["ml_dtypes", "numpy", "xxhash"]]


@pytest.mark.timeout(240)
def test_import_of_the_data_plane_leaves_asyncio_to_the_first_use(built: Built, tmp_path: Path) -> None:
    program = (
        "import sys, dray; print('numpy' in sys.modules); from dray import *;"
        "print('dray.transport.async_reads' in sys.modules, 'asyncio' in sys.modules)"
    )
    assert ended(tmp_path, built.python, "-I", "-c", program) == (0, "False\nTrue False\n", "")


def test_script_reports_how_long_the_import_takes_beside_that_of_numpy(tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks" / "import_time.py")
    code, printed, complaints = ended(tmp_path, sys.executable, script, "--rounds", "1")
    assert (code, complaints) == (0, "")
    time = r" +\d+ ms +\d+ ms\n"
    assert re.search(rf"import numpy{time}import dray{time}P22: .* (not )?reached\n$", printed, re.DOTALL)


def commands(group: TyperGroup, *before: str) -> Iterator[list[str]]:
    for name, command in group.commands.items():
        yield [*before, name]
        if isinstance(command, TyperGroup):
            yield from commands(command, *before, name)


EACH_COMMAND = """
import json, sys
from dray.cli.__main__ import main

for arguments in json.loads(sys.argv[1]):
    sys.argv = ["dray", *arguments]
    try:
        main()
    except SystemExit as end:
        print(end.code, flush=True)
"""


@pytest.mark.timeout(240)
def test_command_names_its_extra_in_one_line_where_only_the_data_plane_is_installed(
    built: Built, tmp_path: Path
) -> None:
    line = "error: this command needs typer, which is not installed: pip install 'dray-rl[jobs]'\n"
    assert ended(tmp_path, built.program, "--help") == (2, "", line)
    assert ended(tmp_path, built.program, "--version") == (0, f"dray {dray.__version__}\n", "")
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    found = [[], *commands(group), ["run", "job.toml"]]
    assert ["slurm", "submit"] in found
    # In one interpreter, as its start takes longer than the rest.
    each = ended(tmp_path, built.python, "-I", "-c", EACH_COMMAND, json.dumps(found))
    assert each == (0, "2\n" * len(found), line * len(found))


def ended(folder: Path, *command: str) -> tuple[int, str, str]:
    """The exit code of a command, and what it wrote to its two streams."""
    end = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100, check=False)
    return end.returncode, end.stdout, end.stderr


@pytest.mark.timeout(240)
def test_new_user_makes_a_job_mends_its_mistakes_and_runs_it_from_the_wheel(built: Built, tmp_path: Path) -> None:
    # What `dray-rl[jobs,embedded]` asks for is that of this interpreter; dray itself is the wheel's.
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
    found = subprocess.run(
        [built.python, "-c", "import dray; print(dray.__file__)"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert Path(found.stdout.strip()).is_relative_to(built.environment)
    walk_new_users_path((built.program,), tmp_path, environment)
