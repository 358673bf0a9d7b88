"""Reads from a producer whose main thread runs pure Python, with several switch intervals: target P12."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing

from benchmarks.exchange import measure
from benchmarks.exchanges.lanes import LaneRead
from benchmarks.figures import Figure, Row, Target
from benchmarks.plan import MIB, LaneName, Plan
from benchmarks.scenario import Progress, Scenario, Skipped

NAME = "busy"
LANES: tuple[LaneName, ...] = ("shm", "tcp")
SWITCH_INTERVALS = (5e-3, 1e-3, 1e-4)
"""Seconds; the first is Python's own."""

_FEWEST_READS = 40
_CALM_SECONDS = 0.25


def run(plan: Plan, progress: Progress) -> Iterator[Row | Skipped]:
    """Measure the idle producer and the busy ones in turn, one lane after the other."""
    reads, batch = max(_FEWEST_READS, plan.operations(MIB)), plan.batch(MIB)
    for lane in _lanes(plan):
        with ExitStack() as opened:
            progress.step(f"{lane}: starting the producers")
            idle = opened.enter_context(closing(LaneRead(lane, name=f"{lane}, idle producer")))
            busy = [opened.enter_context(closing(_busy(lane, interval))) for interval in SWITCH_INTERVALS]
            blocks: dict[str, list[list[float]]] = {each.name: [] for each in (idle, *busy)}
            turns: dict[str, list[float]] = {each.name: [] for each in busy}
            for index in range(plan.rounds):
                progress.step(f"{lane}, round {index + 1} of {plan.rounds}")
                blocks[idle.name].append(_block(idle, reads, batch))
                for each in busy:
                    # Open for its own block only: its loop would take the processor from all the others.
                    each.open(MIB, batch)
                    calm = _turns_per_second(each, _CALM_SECONDS)
                    measure(each, 2, batch)
                    before, began = each.spun(), time.perf_counter()
                    blocks[each.name].append(measure(each, reads, batch))
                    spun, seconds = each.spun() - before, time.perf_counter() - began
                    each.shut()
                    turns[each.name].append(spun / seconds / calm)
        yield from _rows(blocks, turns)


def _lanes(plan: Plan) -> tuple[LaneName, ...]:
    return LANES[:1] if plan.quick else LANES


def _busy(lane: LaneName, interval: float) -> LaneRead:
    name = f"{lane}, busy producer, switch interval {1000 * interval:g} ms"
    return LaneRead(lane, name=name, switch_interval=interval)


def _block(exchange: LaneRead, reads: int, batch: int) -> list[float]:
    exchange.open(MIB, batch)
    measure(exchange, 2, batch)
    block = measure(exchange, reads, batch)
    exchange.shut()
    return block


def _turns_per_second(exchange: LaneRead, seconds: float) -> float:
    before, began = exchange.spun(), time.perf_counter()
    time.sleep(seconds)
    return (exchange.spun() - before) / (time.perf_counter() - began)


def _rows(blocks: dict[str, list[list[float]]], turns: dict[str, list[float]]) -> Iterator[Row]:
    idle = next(iter(blocks))
    limits: dict[str, Figure] = {}
    for share, figures in (("p50", Figure.of), ("p99", Figure.of_p99)):
        for name, block in blocks.items():
            figure = figures(block)
            limits.setdefault(share, figure)
            subject = f"{share}, {name}"
            if name == idle:
                yield Row(NAME, subject, MIB, figure, moves=False)
                continue
            left = Figure(tuple(turns[name]), None, len(block))
            note = f"its loop at {100 * left.p50:.0f} % of its speed"
            target = Target("P12", "at most", 3.0, "time ratio") if share == "p99" else None
            yield Row(NAME, subject, MIB, figure, "s", f"{share}, {idle}", limits[share], target, note, False)


SCENARIO = Scenario(NAME, "Busy producer", ("P12",), lambda plan: len(_lanes(plan)) * (1 + plan.rounds), run)
