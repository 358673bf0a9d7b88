"""`dray doctor`: tests the lanes on this machine and prints facts about the machine."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import resource
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dray import __version__
from dray.errors import ConfigError
from dray.identifiers import LANE_NAMES
from dray.system_calls import ALLOW, refused_calls
from dray.text import MAX_LINE, printable

if TYPE_CHECKING:
    from dray.cli.lane_check import LaneReport

_FEW_OPEN_FILES = 1024


def doctor(
    require: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LANE", help="A lane that must work besides shm and tcp, for example ucx. Repeatable."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="Time limit for each lane's test, in seconds.")
    ] = 20.0,
) -> None:
    """Test each lane on this machine with a transfer between two processes.

    Exit code 0: shm, tcp and every lane named with --require work; 1: one of them does not.
    """
    needed = needed_lanes(require or [])
    if not timeout > 0:
        raise ConfigError("--timeout", timeout, "must be more than 0 seconds")
    from dray.cli.lane_check import check_lane  # here, so that the other commands start fast

    reports = [check_lane(lane, timeout) for lane in LANE_NAMES]
    machine = inspect_machine()
    works = all(report.works for report in reports if report.lane in needed)
    if as_json:
        typer.echo(json.dumps(as_document(reports, machine, works), indent=2))
    else:
        _show(reports, machine, needed)
    raise typer.Exit(0 if works else 1)


def needed_lanes(required: Sequence[str]) -> frozenset[str]:
    """The lanes that must work: those that need no package, and those that are required.

    Raises:
        ConfigError: `required` names something that is not a lane.
    """
    for lane in required:
        if lane not in LANE_NAMES:
            raise ConfigError("--require", lane, f"must be one of {', '.join(LANE_NAMES)}")
    from dray.transport.lanes import LANES

    return frozenset(lane.name for lane in LANES.values() if not lane.extra) | frozenset(required)


def as_document(reports: Sequence[LaneReport], machine: MachineFacts, works: bool) -> dict[str, Any]:
    """Reports, facts and remarks as plain JSON values."""
    return {
        "ok": works,
        "lanes": {report.lane: dataclasses.asdict(report) for report in reports},
        "machine": dataclasses.asdict(machine),
        "remarks": list(remarks(machine)),
    }


def facts(machine: MachineFacts) -> Iterator[tuple[str, str]]:
    """The name of each fact about the machine, and its value."""
    yield "system", f"{machine.system}, {machine.cpus} processors"
    yield "python", machine.python
    for name, found in machine.versions.items():
        yield name, found or "not installed"
    if machine.redis_server is None:
        yield "redis server", f"none: {machine.redis_remedies}"
    else:
        yield "redis server", f"{machine.redis_version} {machine.redis_server}".strip()
    yield "RDMA devices", ", ".join(machine.rdma_devices) or "none"
    yield "locked memory", "no limit" if machine.memlock is None else f"at most {machine.memlock:,} bytes"
    yield "open files", "no limit" if machine.open_files is None else f"at most {machine.open_files:,}"
    yield "system calls", f"refused: {', '.join(machine.refused_calls)}" if machine.refused_calls else "allowed"
    yield "direct leases", f"not possible: {machine.direct_problem}" if machine.direct_problem else "possible"
    for name, value in machine.ucx_variables.items():
        yield name, value


def remarks(machine: MachineFacts) -> Iterator[str]:
    """Settings that work now but may cause failures later."""
    if machine.rdma_devices and machine.memlock is not None:
        yield (
            f"RDMA registers memory, and at most {machine.memlock:,} bytes may be locked: raise the limit "
            "(ulimit -l unlimited)"
        )
    if machine.refused_calls:
        yield f"the system calls {', '.join(machine.refused_calls)} are refused: they {ALLOW}"
    if machine.open_files is not None and machine.open_files < _FEW_OPEN_FILES:
        yield f"only {machine.open_files} files may be open, which limits connections: raise it (ulimit -n 4096)"


def lines(reports: Sequence[LaneReport], machine: MachineFacts, needed: frozenset[str]) -> Iterator[str]:
    """The report as plain lines."""
    for report in reports:
        yield f"{report.lane}: {verdict(report, needed)}: {finding(report)}"
    for name, value in facts(machine):
        yield f"{name}: {value}"
    for remark in remarks(machine):
        yield f"remark: {remark}"


def verdict(report: LaneReport, needed: frozenset[str]) -> str:
    """The result of a lane's test, in a few words."""
    if report.works:
        return "works"
    return "does not work" if report.lane in needed else "not available"


def finding(report: LaneReport) -> str:
    """The finding of a lane's test, and the remedy if there is one."""
    return printable(f"{report.detail}; {report.remedy}" if report.remedy else report.detail, MAX_LINE)


def _show(reports: Sequence[LaneReport], machine: MachineFacts, needed: frozenset[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        for line in lines(reports, machine, needed):
            typer.echo(line)
        return
    lanes = Table(title="Lanes", title_justify="left")
    for column in ("lane", "verdict", "finding"):
        lanes.add_column(column)
    for report in reports:
        style = "green" if report.works else "red" if report.lane in needed else "yellow"
        lanes.add_row(report.lane, Text(verdict(report, needed), style), Text(finding(report)))
    console.print(lanes)
    rest = Table(title="Machine", title_justify="left", show_header=False)
    for name, value in facts(machine):
        rest.add_row(name, Text(value))
    console.print(rest)
    for remark in remarks(machine):
        console.print(Text(f"remark: {remark}", "yellow"))


# --- the machine -------------------------------------------------------------------------------------------------

RDMA_DEVICES = Path("/sys/class/infiniband")

_DISTRIBUTIONS: dict[str, tuple[str, ...]] = {
    "numpy": ("numpy",),
    "ucxx": ("ucxx-cu12", "ucxx-cu13", "ucxx"),
    "ucx": ("libucx-cu12", "libucx-cu13", "libucx"),
    "torch": ("torch",),
    "safetensors": ("safetensors",),
}
_VERSION_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """Facts about this machine and this environment.

    Attributes:
        system: the kernel, its version and the processor architecture.
        cpus: number of processors that this process may use.
        python: the interpreter's version.
        versions: package → version, None if it is not installed. No package is imported for this.
        redis_server: the Redis server that a job would start, None if there is none.
        redis_version: the version that it prints; empty if it prints none.
        redis_remedies: how to install a server.
        rdma_devices: names of the RDMA devices, with the states of their ports.
        memlock: limit of locked memory, which RDMA needs, in bytes; None for no limit.
        open_files: limit of open descriptors of a process; None for no limit.
        refused_calls: system calls that dray needs and that a sandbox refuses to this process.
        direct_problem: why processes of this machine cannot lease payloads directly; empty if they can.
        ucx_variables: the environment variables whose names begin with UCX_.
    """

    system: str
    cpus: int
    python: str
    versions: dict[str, str | None]
    redis_server: str | None
    redis_version: str
    redis_remedies: str
    rdma_devices: tuple[str, ...]
    memlock: int | None
    open_files: int | None
    refused_calls: tuple[str, ...]
    direct_problem: str
    ucx_variables: dict[str, str]


def inspect_machine() -> MachineFacts:
    """The facts about this machine and environment."""
    # Imported here: it imports the redis package, which only a job needs.
    from dray.jobs.queue.redis_server import find_redis_binary, server_remedies

    try:
        redis = str(find_redis_binary())
    except ConfigError:
        redis = None
    from dray.ring.direct import direct_problem

    return MachineFacts(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        python=platform.python_version(),
        versions={"dray": __version__, **{name: _version(found) for name, found in _DISTRIBUTIONS.items()}},
        redis_server=redis,
        redis_version=_redis_version(redis) if redis else "",
        redis_remedies=server_remedies(),
        rdma_devices=rdma_devices(RDMA_DEVICES),
        memlock=_limit(resource.RLIMIT_MEMLOCK),
        open_files=_limit(resource.RLIMIT_NOFILE),
        refused_calls=refused_calls(),
        direct_problem=direct_problem(),
        ucx_variables={name: value for name, value in sorted(os.environ.items()) if name.startswith("UCX_")},
    )


def rdma_devices(folder: Path) -> tuple[str, ...]:
    """The RDMA devices that the kernel lists in `folder`, each with its ports' states: ``"mlx5_0 (ACTIVE)"``."""
    if not folder.is_dir():
        return ()
    found = []
    for device in sorted(folder.iterdir()):
        states = [_state(port) for port in sorted(device.glob("ports/*/state"))]
        found.append(f"{device.name} ({', '.join(states)})" if states else device.name)
    return tuple(found)


def _state(port: Path) -> str:
    try:
        return port.read_text().rpartition(":")[2].strip()  # "4: ACTIVE"
    except OSError:
        return "unreadable"


def _version(candidates: Sequence[str]) -> str | None:
    for name in candidates:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _redis_version(binary: str) -> str:
    try:
        done = subprocess.run(
            [binary, "--version"], capture_output=True, text=True, timeout=_VERSION_TIMEOUT, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    words = [word.removeprefix("v=") for word in done.stdout.split() if word.startswith("v=")]
    return words[0] if words else done.stdout.strip()


def _limit(which: int) -> int | None:
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft
