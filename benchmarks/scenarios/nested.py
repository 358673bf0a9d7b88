"""Packing and unpacking 32 arrays in nested mappings, beside the same arrays as fields of one level."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.figures import Figure, Row, Target
from benchmarks.plan import Plan
from benchmarks.scenario import Progress, Scenario, Skipped
from dray import pack, unpack

NAME = "nested values"
LEAVES = 32
GROUPS = 4
ROWS = 4
COLUMNS = 8
REPEATS = 20
"""Calls that are timed together, as one takes tens of microseconds."""

_FLAT = "flat"


def run(plan: Plan, progress: Progress) -> Iterator[Row | Skipped]:
    """Measure both directions."""
    names = [f"field {index}" for index in range(LEAVES)]
    arrays = {name: np.ones((ROWS, COLUMNS), np.float32) for name in names}
    size = LEAVES // GROUPS
    nested = {
        f"group {group}": {name: arrays[name] for name in names[group * size : (group + 1) * size]}
        for group in range(GROUPS)
    }
    images = {_FLAT: pack(arrays), "nested": pack(nested)}
    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "pack": (lambda: pack(arrays), lambda: pack(nested)),
        "unpack": (lambda: unpack(images[_FLAT]), lambda: unpack(images["nested"])),
    }
    nbytes = len(images["nested"])
    for what, (flat, tree) in calls.items():
        progress.step(what)
        times: dict[str, list[list[float]]] = {_FLAT: [], "nested": []}
        for _ in range(plan.rounds):
            for name, call in ((_FLAT, flat), ("nested", tree)):
                times[name].append(_times(call, plan.operations(nbytes)))
        limit = Figure.of(times[_FLAT])
        against = f"{what}, {LEAVES} arrays on one level"
        yield Row(NAME, against, nbytes, limit)
        target = Target("P9A", "at most", 1.5, "time ratio")
        yield Row(NAME, f"{what}, nested", nbytes, Figure.of(times["nested"]), "s", against, limit, target)


def _times(call: Callable[[], Any], operations: int) -> list[float]:
    times = []
    now = time.perf_counter
    for _ in range(max(10, operations // REPEATS)):
        began = now()
        for _ in range(REPEATS):
            call()
        times.append((now() - began) / REPEATS)
    return times


SCENARIO = Scenario(NAME, "Nested values", ("P9A",), lambda plan: 2, run)
