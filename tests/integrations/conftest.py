"""Tests of integrations are imported where their frameworks are installed: with ``-m integration`` alone.

Some of their modules put empty modules in the place of packages that a framework imports and does not need.
"""

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the modules alone in every other run."""
    return None if config.option.markexpr == "integration" else True
