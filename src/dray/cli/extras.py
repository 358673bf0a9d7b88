"""The extras of the package, and the line that a command prints if the package of an extra is missing."""

from __future__ import annotations

import importlib.util
from types import MappingProxyType
from typing import Final

EXTRAS: Final = MappingProxyType(
    {
        "jobs": (
            "typer",
            "rich",
            "pydantic",
            "redis",
            "httpcore",
            "prometheus_client",
            "fastapi",
            "uvicorn",
            "psutil",
        ),
        "slurm": ("jinja2", "junitparser"),
        "ucxx": ("ucxx",),
        "torch": ("torch",),
        "demo": ("gymnasium", "matplotlib"),
    }
)
"""The modules that dray imports from each extra."""


def require_extra(extra: str) -> None:
    """Check that the packages of `extra` are installed, without importing them.

    Raises:
        ModuleNotFoundError: a package is missing; `name` has the first.
    """
    for package in EXTRAS[extra]:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)


def remedy(error: ModuleNotFoundError) -> str | None:
    """One line that names the missing package and the extra to install; None if no extra has it."""
    package = (error.name or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages:
            return f"this command needs {package}, which is not installed: pip install 'dray-rl[{extra}]'"
    return None
