"""One consumer of a stream with many producers, beside one producer with as many slots: target P16."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from benchmarks.figures import Figure, Row, Target, Unit
from benchmarks.machine import available_bytes
from benchmarks.partner import Partner, PartnerError
from benchmarks.plan import GIB, KIB, MIB, Plan
from benchmarks.runtime_folder import own_runtime_folder
from benchmarks.scenario import Progress, Scenario, Skipped

NAME = "streams"

_COUNTS, _QUICK_COUNTS = (1, 100, 300), (1, 25, 50)
_NBYTES = 64 * KIB
_SLOTS = 4
_BLOCK_SECONDS, _QUICK_BLOCK_SECONDS = 2.0, 0.5
_PROCESS_BYTES = 16 * MIB
"""Memory that a producer may take, its slots included, before the scenario is skipped for want of memory."""
_MAX_TIME_RATIO = 1.1

_MEMORY, _DESCRIPTORS = "private memory", "descriptors"


@dataclass(frozen=True, slots=True)
class _ProcessResources:
    """What each producer takes when there are so many."""

    producer: Mapping[str, float]
    consumer: Mapping[str, float]  # for each producer


@dataclass
class _Side:
    """Producers of one stream, and its consumer."""

    name: str
    producers: Partner
    consumer: Partner
    before: Mapping[str, Any]
    count: int = 0

    def grow(self, count: int, slots: int) -> None:
        """Let there be `count` producers, each of which has given a payload."""
        self.producers.ask("add", name=self.name, count=count - self.count, slots=slots, nbytes=_NBYTES)
        self.count = count
        self.consumer.ask("attach", count=count)

    def read(self, seconds: float) -> tuple[float, int]:
        """Payloads per second, and payloads."""
        found = self.consumer.ask("read", seconds=seconds, nbytes=_NBYTES)
        return found["rate"], found["payloads"]

    def held(self) -> _ProcessResources:
        producers, consumer = self.producers.ask("memory"), self.consumer.ask("memory")
        return _ProcessResources(
            {
                _MEMORY: statistics.median(producers["private"]),
                _DESCRIPTORS: statistics.median(producers["descriptors"]),
            },
            {
                _MEMORY: (consumer["private"] - self.before["private"]) / self.count,
                _DESCRIPTORS: (consumer["descriptors"] - self.before["descriptors"]) / self.count,
            },
        )


def run(plan: Plan, progress: Progress) -> Iterator[Row | Skipped]:
    """Read from either side in turn; the other one's rings are full meanwhile, and its processes wait."""
    most = _counts(plan)[-1]
    needed, available = most * _PROCESS_BYTES, available_bytes()
    if needed > available:
        text = f"they may take {needed / GIB:.1f} GiB of memory, and {available / GIB:.1f} GiB are available"
        yield Skipped(f"{most} producers of a stream", text)
        return
    try:
        rows = _measure(plan, progress)
    except PartnerError as error:
        yield Skipped(f"{most} producers of a stream", str(error))
    else:
        yield from rows


def _measure(plan: Plan, progress: Progress) -> list[Row]:
    counts = _counts(plan)
    seconds = _QUICK_BLOCK_SECONDS if plan.quick else _BLOCK_SECONDS
    held: dict[int, _ProcessResources] = {}
    rates: dict[str, list[float]] = {}
    payloads: dict[str, int] = {}
    with ExitStack() as opened:
        opened.enter_context(own_runtime_folder())
        one, many = (_open(name, opened) for name in ("one", "many"))
        for count in counts:
            progress.step(f"starting producers: {count} of {counts[-1]}")
            many.grow(count, _SLOTS)
            many.read(seconds)
            held[count] = many.held()
        one.grow(1, counts[-1] * _SLOTS)
        one.read(seconds)
        for index in range(plan.rounds):
            progress.step(f"round {index + 1} of {plan.rounds}")
            for side in (one, many) if index % 2 else (many, one):
                rate, read = side.read(seconds)
                rates.setdefault(side.name, []).append(rate)
                payloads[side.name] = payloads.get(side.name, 0) + read
    alone, together = (Figure(tuple(rates[name]), None, payloads[name]) for name in ("one", "many"))
    limit, target = "one producer of a stream", Target("P16", "at least", 0.9, "rate ratio")
    return [
        Row(NAME, limit, _NBYTES, alone, "/s"),
        Row(NAME, f"{counts[-1]} producers of a stream", _NBYTES, together, "/s", limit, alone, target),
        *_held_rows(held),
    ]


def _open(name: str, opened: ExitStack) -> _Side:
    # The producers end first: a consumer would try to attach to those that are left.
    consumer = opened.enter_context(Partner("stream reader"))
    producers = opened.enter_context(Partner("producers"))
    consumer.ask("open", name=name)
    return _Side(name, producers, consumer, consumer.ask("memory"))


def _held_rows(held: Mapping[int, _ProcessResources]) -> Iterator[Row]:
    """With the most producers, each may take hardly more than with a part of them."""
    *_, some, most = held
    units: dict[str, Unit] = {_MEMORY: "B", _DESCRIPTORS: "descriptors"}
    for where in ("producer", "consumer"):
        for what, unit in units.items():
            figures = {count: Figure((getattr(each, where)[what],), None, count) for count, each in held.items()}
            names = {
                count: f"{what} of a producer, of {count}"
                if where == "producer"
                else f"{what} of the consumer for each producer, of {count}"
                for count in held
            }
            for count, figure in figures.items():
                judged = count == most
                yield Row(
                    NAME,
                    names[count],
                    None,
                    figure,
                    unit,
                    f"the same of {some}" if judged else "",
                    figures[some] if judged else None,
                    Target("P16", "at most", _MAX_TIME_RATIO, "time ratio") if judged else None,
                )


def _counts(plan: Plan) -> tuple[int, ...]:
    return _QUICK_COUNTS if plan.quick else _COUNTS


def _steps(plan: Plan) -> int:
    return len(_counts(plan)) + plan.rounds


SCENARIO = Scenario(NAME, "Many producers of a stream", ("P16",), _steps, run)
