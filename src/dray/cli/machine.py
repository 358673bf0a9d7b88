"""What `dray doctor` tells about the machine: versions, devices and limits."""

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
_VERSION_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Machine:
    """Facts about this machine and this environment.

    Attributes:
        system: kernel, its version, the processor's kind.
        cpus: processors this process may use.
        python: the interpreter's version.
        versions: package → version, None where it is not installed. None of them was imported to find out.
        redis_server: the Redis server that a job would start, None if there is none.
        redis_version: what it says about itself; empty if it does not.
        redis_remedies: what makes a server available where there is none.
        rdma_devices: names of the RDMA devices, with their ports' states.
        memlock: bytes a process may lock in memory, which RDMA needs; None for no limit.
        open_files: descriptors a process may have; None for no limit.
        refused_calls: system calls that dray needs and that a sandbox refuses to this process.
        direct_problem: why processes of this machine cannot lease payloads directly; empty if they can.
        ucx_variables: UCX's variables in the environment.
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


def examine() -> Machine:
    """Look at this machine."""
    # It brings the redis package in, which only a job needs.
    from dray.jobs.queue.redis_server import server_remedies

    redis = _redis_server()
    return Machine(
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
        said = subprocess.run(
            [binary, "--version"], capture_output=True, text=True, timeout=_VERSION_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    words = [word.removeprefix("v=") for word in said.stdout.split() if word.startswith("v=")]
    return words[0] if words else said.stdout.strip()


def _limit(which: int) -> int | None:
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft
