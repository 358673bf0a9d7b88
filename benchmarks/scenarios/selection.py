"""One of 32 fields of a payload of 256 MiB. Target P17; a quick run has payloads of 16 MiB.

In place on shm it stands beside a lease of a whole payload, over a network beside a payload of that field alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing

from benchmarks.exchange import ByteExchange, measure
from benchmarks.exchanges.lanes import LaneRead
from benchmarks.exchanges.payloads import MANY
from benchmarks.exchanges.selecting import FieldRead
from benchmarks.figures import Figure, Row, Target
from benchmarks.plan import GIB, MIB, LaneName, Plan
from benchmarks.scenario import UCX_MISSING, Progress, Scenario, Skipped
from benchmarks.scenarios.in_place import too_large
from dray.transport.lanes.ucx_worker import UCXX_AVAILABLE

NAME = "selection"
WHOLE_BYTES, QUICK_BYTES = 256 * MIB, 16 * MIB

_LEASED = 8
"""Payloads that are written together before they are leased."""

_SLOTS = 2
"""Payloads of many fields that are written together before their fields are read."""

_WAYS: tuple[tuple[LaneName, bool], ...] = (("tcp", False), ("tcp", True), ("ucx", False))
"""Lane and checksum."""


def run(plan: Plan, progress: Progress) -> Iterator[Row | Skipped]:
    """Measure each lane beside its limit."""
    nbytes = _whole_bytes(plan)
    if why := too_large(nbytes, 2 * _LEASED):
        yield Skipped(f"one of {MANY} fields, {nbytes / GIB:g} GiB", why)
        return
    yield _leases(nbytes, plan, progress)
    for lane, checksum in _WAYS:
        if lane == "ucx" and not UCXX_AVAILABLE:
            yield Skipped("one of many fields over the ucx lane", UCX_MISSING)
            continue
        yield _reads(lane, checksum, nbytes, plan, progress)


def _leases(nbytes: int, plan: Plan, progress: Progress) -> Row:
    part = FieldRead("shm", in_place=True)
    whole = LaneRead("shm", "lease", fields=6, name="shm in place, all of six fields")
    operations = max(plan.operations(nbytes), _LEASED)
    figures = _in_turn(
        (part, nbytes), (whole, nbytes), operations=operations, batch=_LEASED, plan=plan, progress=progress
    )
    target = Target("P17", "at most", 10e-6, "value")
    return Row(NAME, part.name, nbytes, figures[0], "s", whole.name, figures[1], target, moves=False)


def _reads(lane: LaneName, checksum: bool, nbytes: int, plan: Plan, progress: Progress) -> Row:
    """As many bytes are written before a block of either, so that the caches are as cold for both."""
    part = FieldRead(lane, checksum=checksum)
    alone = LaneRead(lane, checksum=checksum, name="a payload of that size")
    batch, each = _SLOTS * MANY, nbytes // MANY
    figures = _in_turn((part, nbytes), (alone, each), operations=batch, batch=batch, plan=plan, progress=progress)
    target = Target("P17", "at most", 1.1, "time ratio") if lane == "tcp" else None
    return Row(NAME, part.name, each, figures[0], "s", alone.name, figures[1], target)


def _in_turn(
    *exchanges: tuple[ByteExchange, int], operations: int, batch: int, plan: Plan, progress: Progress
) -> list[Figure]:
    """Measure exchanges, each with its payload size, a block of operations each in turn."""
    blocks: list[list[list[float]]] = [[] for _ in exchanges]
    with ExitStack() as opened:
        for exchange, nbytes in exchanges:
            opened.enter_context(closing(exchange))
            exchange.open(nbytes, batch)
            measure(exchange, batch, batch)
        for number in range(plan.rounds):
            progress.step(exchanges[0][0].name)
            for turn in range(len(exchanges)):
                index = (number + turn) % len(exchanges)
                blocks[index].append(measure(exchanges[index][0], operations, batch))
        for exchange, _ in exchanges:
            exchange.shut()
    return [Figure.of(found) for found in blocks]


def _whole_bytes(plan: Plan) -> int:
    return QUICK_BYTES if plan.quick else WHOLE_BYTES


SCENARIO = Scenario(NAME, "One of many fields", ("P17",), lambda plan: plan.rounds * (1 + len(_WAYS)), run)
