"""Reads from a producer whose process runs pure Python, and the speed that its loop keeps: target P12."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.exchange import measure
from benchmarks.exchanges.busy import BusyRead, Stretch
from benchmarks.exchanges.lanes import How
from benchmarks.figures import Figure, Row, Target
from benchmarks.plan import KIB, MIB, LaneName, Plan
from benchmarks.scenario import Progress, Scenario, Skipped

NAME = "busy"
DEFAULT_INTERVAL = 5e-3
"""Python's own switch interval, in seconds."""

_BATCH_BYTES = 64 * MIB
"""Read in one go: long enough for some turns of the loop where it has to share its processor."""

IDLE, BUSY = "idle producer", "busy producer"
ALONE = "without reads"


_CLOCKS: Mapping[str, Callable[[Stretch], float]] = {
    "": lambda stretch: stretch.seconds,
    ", by processor time": lambda stretch: stretch.cpu_seconds,
}
"""What the loop's turns are counted against. Other programs take time from it, but no processor time."""


class _Way(NamedTuple):
    """How payloads are read, of which size, with which switch intervals of the producer, how many for one of the
    plan's operations."""

    lane: LaneName
    how: How
    nbytes: int
    intervals: tuple[float, ...]
    reads: int


_WAYS = (
    _Way("shm", "lease", 64 * KIB, (DEFAULT_INTERVAL,), 4),
    _Way("shm", "read", MIB, (DEFAULT_INTERVAL,), 8),
    # Here a thread of the producer serves, and has to wait for its interpreter.
    _Way("tcp", "read", MIB, (DEFAULT_INTERVAL, 1e-4), 1),
)


@dataclass
class _Found:
    """What one switch interval gave, round by round."""

    times: list[list[float]] = field(default_factory=list)
    beside: list[Stretch] = field(default_factory=list)
    alone: list[Stretch] = field(default_factory=list)


def run(plan: Plan, progress: Progress) -> Iterator[Row | Skipped]:
    """Measure the idle producer and the busy one in turn, one way to read after the other."""
    for way in _ways(plan):
        batch = _BATCH_BYTES // way.nbytes
        reads = max(way.reads * plan.operations(way.nbytes), 2 * batch)
        idle: list[list[float]] = []
        busy = {interval: _Found() for interval in way.intervals}
        with closing(BusyRead(way.lane, way.how)) as exchange:
            exchange.open(way.nbytes, batch)
            measure(exchange, batch, batch)
            for index in range(plan.rounds):
                progress.step(f"{exchange.name}, round {index + 1} of {plan.rounds}")
                idle.append([each for count in _batches(reads, batch) for each in exchange.read_idle(count)])
                for interval, found in busy.items():
                    _read_beside(exchange, reads, batch, interval, found)
            exchange.shut()
        yield from _rows(exchange.name, way, idle, busy)


def _ways(plan: Plan) -> list[_Way]:
    return [way for way in _WAYS if way.lane == "shm" or not plan.quick]


def _batches(reads: int, batch: int) -> list[int]:
    return [min(batch, reads - begun) for begun in range(0, reads, batch)]


def _read_beside(exchange: BusyRead, reads: int, batch: int, interval: float, found: _Found) -> None:
    """One round with a busy producer."""
    times: list[float] = []
    beside = alone = Stretch(0, 0.0, 0.0)
    for count in _batches(reads, batch):
        block, with_reads, without = exchange.read_beside(count, interval)
        times += block
        beside, alone = beside.plus(with_reads), alone.plus(without)
    found.times.append(times)
    found.beside.append(beside)
    found.alone.append(alone)


def _rows(name: str, way: _Way, idle: list[list[float]], busy: dict[float, _Found]) -> Iterator[Row]:
    judged, nbytes = way.lane == "shm", way.nbytes
    for share, figures in (("p50", Figure.of), ("p99", Figure.of_p99)):
        limit_name, limit = f"{share}, {name}, {IDLE}", figures(idle)
        yield Row(NAME, limit_name, nbytes, limit, moves=False)
        target = Target("P12", "at most", 1.2, "time ratio") if judged and share == "p99" else None
        for interval, found in busy.items():
            subject = f"{share}, {name}, {_called(interval, judged)}"
            yield Row(NAME, subject, nbytes, figures(found.times), "s", limit_name, limit, target, moves=False)
    target = Target("P12", "at least", 0.98, "rate ratio") if judged else None
    for interval, found in busy.items():
        subject = f"its loop beside reads, {name}, {_called(interval, judged)}"
        for by, clock in _CLOCKS.items():
            beside, alone = (_speed(each, clock) for each in (found.beside, found.alone))
            yield Row(NAME, f"{subject}{by}", nbytes, beside, "/s", ALONE, alone, target, moves=False)


def _speed(stretches: Sequence[Stretch], clock: Callable[[Stretch], float]) -> Figure:
    """Turns per second, round by round; none where the process was not given the processor."""
    rates = tuple(each.turns / clock(each) if clock(each) else 0.0 for each in stretches)
    return Figure(rates, None, sum(each.turns for each in stretches))


def _called(interval: float, only: bool) -> str:
    return BUSY if only else f"{BUSY}, switch interval {1000 * interval:g} ms"


SCENARIO = Scenario(NAME, "Busy producer", ("P12",), lambda plan: len(_ways(plan)) * plan.rounds, run)
