"""Batches with `read_many`: 1 MiB over ucx beside `ucx_perftest` (P5), 1 KiB over shm (P7)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Literal

from benchmarks.exchange import measure
from benchmarks.exchanges.lanes import LaneRead
from benchmarks.exchanges.perftest import PerftestError, find_perftest, tag_bandwidth
from benchmarks.figures import Figure, Row, Target
from benchmarks.plan import KIB, MIB, Plan
from benchmarks.scenario import UCX_MISSING, Progress, Scenario, Skipped
from dray.transport.lanes.ucx_worker import UCXX_AVAILABLE

NAME = "batches"
SMALL_BATCH = 1024
PERFTEST = "ucx_perftest -t tag_bw -e"

_SMALL: tuple[tuple[Literal[1, 6], float], ...] = ((1, 300_000), (6, 150_000))
"""Fields of a payload, and how many payloads per second are asked for."""


def run(plan: Plan, progress: Progress) -> Iterator[Row | Skipped]:
    """Measure large batches, then small payloads."""
    if plan.wants("P5"):
        if UCXX_AVAILABLE:
            yield from _large(plan, progress)
        else:
            yield Skipped("read_many over the ucx lane", UCX_MISSING)
    if plan.wants("P7"):
        yield from _small(plan, progress)


def _large(plan: Plan, progress: Progress) -> Iterator[Row | Skipped]:
    program = find_perftest()
    if program is None:
        yield Skipped(PERFTEST, "the libucx wheel is not installed")
    count = plan.batch(MIB)
    rates: list[float] = []
    limits: list[float] = []
    with closing(LaneRead("ucx", "read_many")) as exchange:
        exchange.open(MIB, count)
        measure(exchange, count, count, whole=True)
        for index in range(plan.rounds):
            progress.step(f"1 MiB over ucx, round {index + 1} of {plan.rounds}")
            (seconds,) = measure(exchange, count, count, whole=True)
            rates.append(count * MIB / seconds)
            if program is None:
                continue
            try:
                limits.append(tag_bandwidth(program, MIB, plan.operations(MIB)))
            except PerftestError as error:
                yield Skipped(PERFTEST, str(error))
                program = None
        exchange.shut()
    figure = Figure(tuple(rates), None, count * plan.rounds)
    note = f"batches of {count}"
    if len(limits) < len(rates):
        yield Row(NAME, exchange.name, MIB, figure, "B/s", note=note)
        return
    limit = Figure(tuple(limits), None, plan.operations(MIB) * plan.rounds)
    target = Target("P5", "at least", 0.85, "rate ratio")
    yield Row(NAME, PERFTEST, MIB, limit, "B/s")
    yield Row(NAME, exchange.name, MIB, figure, "B/s", PERFTEST, limit, target, note)


def _small(plan: Plan, progress: Progress) -> Iterator[Row]:
    batches = max(2, plan.most_operations // 50)
    with ExitStack() as opened:
        exchanges = [(opened.enter_context(closing(_reader(fields))), bound) for fields, bound in _SMALL]
        rates: dict[str, list[float]] = {exchange.name: [] for exchange, _ in exchanges}
        for exchange, _ in exchanges:
            exchange.open(KIB, SMALL_BATCH)
            measure(exchange, 2 * SMALL_BATCH, SMALL_BATCH, whole=True)
        for index in range(plan.rounds):
            progress.step(f"1 KiB over shm, round {index + 1} of {plan.rounds}")
            for exchange, _ in exchanges:
                seconds = sum(measure(exchange, batches * SMALL_BATCH, SMALL_BATCH, whole=True))
                rates[exchange.name].append(batches * SMALL_BATCH / seconds)
        for exchange, _ in exchanges:
            exchange.shut()
    for exchange, bound in exchanges:
        figure = Figure(tuple(rates[exchange.name]), None, batches * SMALL_BATCH * plan.rounds)
        target = Target("P7", "at least", bound, "value")
        note = f"batches of {SMALL_BATCH}"
        yield Row(NAME, exchange.name, KIB, figure, "/s", target=target, note=note, moves=False)


def _reader(fields: Literal[1, 6]) -> LaneRead:
    """As bytes what has one field, unpacked what has six."""
    if fields == 1:
        return LaneRead("shm", "read_many_bytes", name="shm read_many, as bytes")
    return LaneRead("shm", "read_many", fields=6, name="shm read_many, six fields unpacked")


def _steps(plan: Plan) -> int:
    return plan.rounds * (plan.wants("P5") + plan.wants("P7"))


SCENARIO = Scenario(NAME, "Batches", ("P5", "P7"), _steps, run)
