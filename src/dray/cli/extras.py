"""Which extra brings a package that a command needs, for the one line that an installation without it gets."""

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
"""The packages of each extra that are imported, by the names under which they are."""


def require_extra(extra: str) -> None:
    """Make sure that the packages of `extra` are installed, without importing them.

    Raises:
        ModuleNotFoundError: for the first that is missing, with its `name`.
    """
    for package in EXTRAS[extra]:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)


def remedy(error: ModuleNotFoundError) -> str | None:
    """One line that names the missing package and the extra to install; None where no extra brings it."""
    package = (error.name or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages:
            return f"this command needs {package}, which is not installed: pip install 'dray-rl[{extra}]'"
    return None
