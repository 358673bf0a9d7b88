"""One life cycle of a slot (claim, commit, lease, consume) in rings of 10 to 100,000 slots: target P10."""

from __future__ import annotations

import time
from collections.abc import Iterator

from benchmarks.figures import Figure, Row, Target
from benchmarks.plan import Plan
from benchmarks.scenario import Progress, Scenario, Skipped
from dray import SharedRingBuffer

NAME = "ring"
SLOTS = (10, 100, 1_000, 10_000, 100_000)
PAYLOAD_BYTES = 64
_CYCLES = 20


def run(plan: Plan, progress: Progress) -> Iterator[Row | Skipped]:
    """Measure all rings in turn; the smallest is what the others are held against."""
    operations = max(1, plan.most_operations // 10)
    rings = [SharedRingBuffer(slots, PAYLOAD_BYTES, prefault=True) for slots in SLOTS]
    try:
        for ring in rings:
            progress.step(f"warm-up of {ring.slots:,} slots")
            _cycle(ring, ring.slots)
        blocks: dict[int, list[list[float]]] = {ring.slots: [] for ring in rings}
        for index in range(plan.rounds):
            progress.step(f"round {index + 1} of {plan.rounds}")
            for ring in rings:
                blocks[ring.slots].append([_cycle(ring, _CYCLES) / _CYCLES for _ in range(operations)])
    finally:
        for ring in rings:
            ring.close()
    figures = {slots: Figure.of(found) for slots, found in blocks.items()}
    smallest = f"{SLOTS[0]} slots"
    for slots, figure in figures.items():
        subject = f"claim, commit, lease, consume in {slots:,} slots"
        if slots == SLOTS[0]:
            yield Row(NAME, subject, None, figure)
        else:
            target = Target("P10", "at most", 1.3, "time ratio")
            yield Row(NAME, subject, None, figure, "s", smallest, figures[SLOTS[0]], target)


def _cycle(ring: SharedRingBuffer, count: int) -> float:
    """Seconds for `count` life cycles of a slot."""
    began = time.perf_counter()
    for _ in range(count):
        with ring.claim(PAYLOAD_BYTES, 0) as slot:
            slot.commit()
        ring.read_raw(slot.slot, slot.sequence).acknowledge()
    return time.perf_counter() - began


SCENARIO = Scenario(NAME, "Ring operations", ("P10",), lambda plan: len(SLOTS) + plan.rounds, run)
