"""Packages that a machine may lack, and that take long to import."""

import importlib
import importlib.util
from typing import Any

import pytest


class Later:
    """A module that is imported when something of it is used first."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._name), name)


def imported_later(name: str, reason: str | None = None) -> Any:
    """The module `name`; where it is not installed, the tests of the calling module are skipped."""
    require(name, reason=reason)
    return Later(name)


def require(*names: str, reason: str | None = None) -> None:
    """Skip the tests of the calling module where one of these is not installed; nothing is imported."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(reason or f"{name} is not installed", allow_module_level=True)
