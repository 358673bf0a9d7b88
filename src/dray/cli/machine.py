"""The facts about the machine that `dray doctor` prints: versions, devices and limits."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dray import __version__
from dray.errors import ConfigError
from dray.ring.direct import direct_problem
from dray.system_calls import refused_calls

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
    from dray.jobs.queue.redis_server import server_remedies

    redis = _redis_server()
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


def _version(candidates: Iterable[str]) -> str | None:
    for name in candidates:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _redis_server() -> str | None:
    from dray.jobs.queue.redis_server import find_redis_binary

    try:
        return str(find_redis_binary())
    except ConfigError:
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
