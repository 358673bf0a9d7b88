"""Packing a trajectory of six fields into a slot, beside a bare copy of as many bytes into the same slot: P9."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from benchmarks.exchanges.payloads import six_fields
from benchmarks.figures import Figure, Row, Target
from benchmarks.plan import KIB, MAX_COPIED, MIB, Plan, size_name
from benchmarks.scenario import Progress, Scenario, Skipped
from dray import SharedRingBuffer
from dray.payload.codec import plan as plan_image

NAME = "packing"
SLOTS = 4
COPY = "bare copy into the slot"

_TARGET_SECONDS = 15e-6


def run(plan: Plan, progress: Progress) -> Iterator[Row | Skipped]:
    """Measure every size."""
    for nbytes in _sizes(plan):
        progress.step(size_name(nbytes))
        arrays = six_fields(nbytes)
        packed = plan_image(arrays).nbytes
        source = np.random.default_rng(0).integers(0, 256, packed, np.uint8)
        with SharedRingBuffer(SLOTS, packed, prefault=True) as ring:

            def pack(slot: memoryview, arrays: Mapping[str, Any] = arrays) -> None:
                plan_image(arrays).write(slot)

            def copy(slot: memoryview, source: np.ndarray[Any, Any] = source) -> None:
                np.copyto(np.frombuffer(slot, np.uint8), source)

            operations = plan.operations(nbytes)
            _times(ring, packed, pack, operations // 4 + SLOTS)
            packs, copies = [], []
            for _ in range(plan.rounds):
                packs.append(_times(ring, packed, pack, operations))
                copies.append(_times(ring, packed, copy, operations))
        limit = Figure.of(copies)
        yield Row(NAME, COPY, nbytes, limit)
        yield Row(NAME, "pack, six fields", nbytes, Figure.of(packs), "s", COPY, limit, _target(nbytes))


def _times(
    ring: SharedRingBuffer, nbytes: int, write: Callable[[memoryview], None], operations: int
) -> list[float]:
    """Seconds that `write` takes in one slot after the other; claiming is not timed."""
    times = []
    now = time.perf_counter
    for _ in range(operations):
        with ring.claim(nbytes, 0) as slot:
            began = now()
            write(slot.buffer)
            times.append(now() - began)
    return times


def _target(nbytes: int) -> Target | None:
    if nbytes <= KIB:
        return Target("P9", "at most", _TARGET_SECONDS, "value")
    return Target("P9", "at most", 1.1, "time ratio") if nbytes >= MIB else None


def _sizes(plan: Plan) -> list[int]:
    return [nbytes for nbytes in plan.sizes if nbytes <= MAX_COPIED]


SCENARIO = Scenario(NAME, "Packing into a slot", ("P9",), lambda plan: len(_sizes(plan)), run)
