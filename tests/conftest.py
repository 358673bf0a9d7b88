"""What holds for every test: short socket paths, nothing left behind, their order where several run at once; and
a fixture for tests of every lane.

A test that passes is failed after all if a thread, a child process, a file descriptor or a mapping of shared
memory is still there that was not before it. Threads and processes that are ending get a bounded time to do so.
"""

import ctypes
import functools
import gc
import os
import shutil
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from forbidding import forbid
from optional import Later
from transport_fixtures import LANES
from waiting import ends_within

from dray.clock import Deadline
from dray.transport.lanes import ucx_worker

GRACE_SECONDS = 5.0
_LIBC = ctypes.CDLL(None)
_PR_SET_CHILD_SUBREAPER = 36
_PASSED = pytest.StashKey[bool]()
_RUNTIME_DIR = pytest.StashKey[str]()

# --- sockets ----------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--forbid` has the kernel refuse system calls, as a sandbox does."""
    parser.addoption("--forbid", default="", metavar="CALLS", help="system calls that fail, separated by commas")


def pytest_configure(config: pytest.Config) -> None:
    """Unix sockets of tests, and of the processes they start, lie in a short folder that goes with the session."""
    if refused := config.getoption("forbid"):
        forbid(*refused.split(","))
    _keep_bytecode()
    config.stash[_RUNTIME_DIR] = tempfile.mkdtemp(prefix="dray-test-", dir="/tmp")
    os.environ["DRAY_RUNTIME_DIR"] = config.stash[_RUNTIME_DIR]
    if config.getoption("cov_source", None) and not _is_worker(config):
        # Here, as most runs measure nothing and have no need of it.
        from coverage_bounds import CoverageBounds

        config.pluginmanager.register(CoverageBounds())


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import tests of integrations only where their frameworks are installed: with ``-m integration`` alone.

    Some of their modules put empty modules in the place of packages that a framework imports and does not need.
    """
    theirs = Path(__file__).with_name("integrations")
    return True if collection_path == theirs and config.option.markexpr != "integration" else None


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[_RUNTIME_DIR], ignore_errors=True)


def _keep_bytecode() -> None:
    """Without compiled modules, each of a thousand processes that tests start would compile dray first."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False


# --- several at once --------------------------------------------------------------------------------------------

SHORT = ("unit", "fuzz", "contract", "mutants", "property", "fault")
"""Folders of tests, those whose tests are the shortest first."""

UNMEASURED = ("property", "fuzz")
"""Folders of tests during which coverage is off."""


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def _folder(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).parts[0]


def pytest_collection_finish() -> None:
    """What exists now stays until the end: no later garbage collection scans it."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several workers the longest tests begin first, so that all workers end at about the same time."""
    if _is_worker(config):
        items.sort(key=_length, reverse=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Random inputs are not measured: that doubles their time, and other tests reach the same lines.

    The marker `no_cover` is not used: coverage starts anew after it, and each start makes all later forks slower.
    """
    if _folder(item) not in UNMEASURED:
        return (yield)
    tracer, of_threads = sys.gettrace(), threading.gettrace()
    sys.settrace(None)
    threading.settrace(None)  # type: ignore[arg-type]
    try:
        return (yield)
    finally:
        threading.settrace(of_threads)  # type: ignore[arg-type]
        sys.settrace(tracer)


def _length(item: pytest.Item) -> int:
    """A rank: the tests with a time limit of their own are the longest, and the folders follow.

    The last are those that import torch into their worker, because everything takes longer after that.
    """
    if _imports_later(getattr(item, "module", None)):
        return -1
    if item.get_closest_marker("timeout") is not None:
        return len(SHORT) + 1
    folder = _folder(item)
    return SHORT.index(folder) if folder in SHORT else len(SHORT)


@functools.cache
def _imports_later(module: ModuleType | None) -> bool:
    return module is not None and any(isinstance(each, Later) for each in vars(module).values())


@pytest.fixture(autouse=True)
def _measured_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Coverage counts what started processes do in tests marked `measured`; others it would only slow down."""
    if request.node.get_closest_marker("measured") is None:
        monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)


# --- lanes ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=LANES)
def lane(request: pytest.FixtureRequest) -> str:
    """Each lane, one after the other."""
    return str(request.param)


# --- leaks ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldResources:
    """What this process holds at one moment."""

    threads: frozenset[threading.Thread]
    children: frozenset[int]
    descriptors: frozenset[tuple[int, str]]  # number and what it refers to
    mappings: frozenset[str]  # address, inode and name of shared memory

    @classmethod
    def now(cls) -> "HeldResources":
        return cls(frozenset(threading.enumerate()), _children(), _descriptors(), _mappings())

    def __sub__(self, before: "HeldResources") -> "HeldResources":
        return HeldResources(
            self.threads - before.threads,
            self.children - before.children,
            self.descriptors - before.descriptors,
            self.mappings - before.mappings,
        )

    def __bool__(self) -> bool:
        return bool(self.threads or self.children or self.descriptors or self.mappings)

    def __str__(self) -> str:
        frames = sys._current_frames()  # noqa: SLF001
        lines = []
        for thread in self.threads:
            stack = traceback.format_stack(frames.get(thread.ident or 0))[-1].strip()
            lines.append(f"thread {thread.name}, at {stack}")
        lines += [f"child process {pid}: {_command(pid)}" for pid in sorted(self.children)]
        lines += [f"file descriptor {number}: {target}" for number, target in sorted(self.descriptors)]
        lines += [f"shared memory {mapping}" for mapping in sorted(self.mappings)]
        return "\n".join(lines)


@pytest.fixture(scope="session", autouse=True)
def _ucx_context() -> None:
    """UCX keeps one context for each process, with a thread and descriptors: it is made before these count."""
    if ucx_worker.UCXX_AVAILABLE:
        ucx_worker.UcxWorker(loopback=True).close()


@pytest.fixture(autouse=True)
def _nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    before = HeldResources.now()
    yield
    # A command that a test has called in this process adopts orphans until the process ends: those of later tests.
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    if not request.node.stash.get(_PASSED, False):
        return  # what a failed test leaves behind proves nothing more
    left = HeldResources.now() - before
    if left:
        # Exceptions that a test has caught hold their frames, and through them its objects, until collected.
        gc.collect()
        _let_end(left, Deadline.after(GRACE_SECONDS))
        left = HeldResources.now() - before
    if left:
        pytest.fail(f"the test passed, but left behind:\n{left}", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.when == "call":
        item.stash[_PASSED] = report.passed
    return report


def _let_end(left: HeldResources, deadline: Deadline) -> None:
    for thread in left.threads:
        thread.join(deadline.timeout)
    for pid in left.children:
        ends_within(deadline.remaining, pid)


def _children() -> frozenset[int]:
    pids: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            pids.update(map(int, (task / "children").read_text().split()))
        except (FileNotFoundError, ProcessLookupError):  # the thread has just ended
            continue
    return frozenset(pids)


def _descriptors() -> frozenset[tuple[int, str]]:
    found = set()
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208  (called twice for every test)
        try:
            target = os.readlink(f"/proc/self/fd/{name}")  # noqa: PTH115
        except FileNotFoundError:  # the descriptor that listed the folder
            continue
        if not target.startswith("/dev/nvidia"):  # the driver's, open until the process ends
            found.add((int(name), target))
    return frozenset(found)


def _mappings() -> frozenset[str]:
    found = set()
    for line in Path("/proc/self/maps").read_bytes().splitlines():
        if b"/memfd:" in line or b" /dev/shm/" in line:
            addresses, _, _, _, inode, name = line.decode().split(maxsplit=5)
            found.add(f"{name} (inode {inode}) at {addresses}")
    return frozenset(found)


def _command(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    return command or "ended, but was not waited for"
