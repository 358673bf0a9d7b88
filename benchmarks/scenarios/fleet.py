"""One consumer of 16 producers that wait for room, beside one producer with as many slots: target P11."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing

from benchmarks.exchanges.producing import Fleet
from benchmarks.figures import Figure, Row, Target
from benchmarks.plan import MIB, Plan
from benchmarks.scenario import Progress, Scenario, Skipped

NAME = "fleet"
PRODUCERS = 16
_SLOTS = 4
_ALONE = "one producer"


def run(plan: Plan, progress: Progress) -> Iterator[Row | Skipped]:
    """Read from either side in turn; the other one's rings are full meanwhile, and its processes wait."""
    # Several times what the rings hold, so that most of it is written while it is measured.
    count = max(4 * PRODUCERS * _SLOTS, plan.operations(MIB))
    rates: dict[int, list[float]] = {1: [], PRODUCERS: []}
    with ExitStack() as opened:
        progress.step(f"starting {PRODUCERS + 1} producers")
        fleets = {
            1: opened.enter_context(closing(Fleet(1, PRODUCERS * _SLOTS, MIB))),
            PRODUCERS: opened.enter_context(closing(Fleet(PRODUCERS, _SLOTS, MIB))),
        }
        for fleet in fleets.values():
            fleet.read(count // 2)
        for index in range(plan.rounds):
            progress.step(f"round {index + 1} of {plan.rounds}")
            for producers, fleet in fleets.items():
                began = time.perf_counter()
                fleet.read(count)
                rates[producers].append(count * MIB / (time.perf_counter() - began))
    figures = {producers: Figure(tuple(each), None, count * plan.rounds) for producers, each in rates.items()}
    yield Row(NAME, _ALONE, MIB, figures[1], "B/s")
    target = Target("P11", "at least", 0.9, "rate ratio")
    yield Row(NAME, f"{PRODUCERS} producers", MIB, figures[PRODUCERS], "B/s", _ALONE, figures[1], target)


SCENARIO = Scenario(NAME, "Many producers", ("P11",), lambda plan: 1 + plan.rounds, run)
