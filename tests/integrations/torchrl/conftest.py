"""What the tests of TorchRL leave behind: its collectors keep pipes and memory, which dray cannot close."""

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest


def held() -> list[str]:
    """Threads and shared memory of dray in this process."""
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "/memfd:dray" in line]
    return sorted([*maps, *(each.name for each in threading.enumerate() if "dray" in each.name)])


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    before = held()
    yield
    gc.collect()
    assert [each for each in held() if each not in before] == []
