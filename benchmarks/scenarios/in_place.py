"""Payloads of six fields used in their slots, 1 KiB to 1 GiB: lease, unpack, acknowledge. Target P1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from benchmarks.exchange import measure
from benchmarks.exchanges.lanes import How, LaneRead
from benchmarks.exchanges.sockets import SocketExchange
from benchmarks.figures import Figure, Row, Target
from benchmarks.machine import available_bytes
from benchmarks.plan import GIB, KIB, MIB, Plan, size_name
from benchmarks.scenario import Progress, Scenario, Skipped

NAME = "in place"
SUBJECT = "shm in place"
FIRST = "first of a batch"

_WAYS: tuple[tuple[How, float], ...] = (("lease", 10e-6), ("lease_bytes", 5e-6))
"""How payloads are read, and the seconds that are asked for."""

_BATCH_BYTES = 64 * MIB
_FEWEST, _MOST = 8, 256
_MEMORY_SHARE = 0.75
"""Of the memory that is available, what a ring and its producer may take."""


def run(plan: Plan, progress: Progress) -> Iterator[Row | Skipped]:
    """Measure every size, one way after the other: there is no limit to take turns with."""
    progress.step("a round trip that a lease does without")
    yield _round_trip(plan)
    for nbytes in plan.sizes:
        if why := too_large(nbytes, _batch(nbytes, plan)):
            progress.step(size_name(nbytes))
            yield Skipped(f"{SUBJECT}, {size_name(nbytes)}", why)
            continue
        for how, bound in _WAYS:
            yield from _measure(how, bound, nbytes, plan, progress)


def _measure(how: How, bound: float, nbytes: int, plan: Plan, progress: Progress) -> Iterator[Row]:
    batch = _batch(nbytes, plan)
    operations = max(plan.operations(nbytes), batch)
    blocks: list[list[float]] = []
    with closing(LaneRead("shm", how, fields=6)) as exchange:
        exchange.open(nbytes, batch)
        measure(exchange, batch, batch)
        for index in range(plan.rounds):
            progress.step(f"{exchange.name}, {size_name(nbytes)}, round {index + 1} of {plan.rounds}")
            blocks.append(measure(exchange, operations, batch))
        exchange.shut()
    target = Target("P1", "at most", bound, "value")
    yield Row(NAME, exchange.name, nbytes, Figure.of(blocks), target=target)
    firsts = Figure.of(block[::batch] for block in blocks)
    yield Row(NAME, f"{exchange.name}, {FIRST}", nbytes, firsts, note=f"of {batch}", moves=False)


def _round_trip(plan: Plan) -> Row:
    """64 bytes there and back over a Unix socket."""
    batch = plan.batch(KIB)
    with closing(SocketExchange("unix", round_trip=True)) as exchange:
        exchange.open(KIB, batch)
        measure(exchange, batch, batch)
        blocks = [measure(exchange, plan.operations(KIB), batch) for _ in range(plan.rounds)]
        exchange.shut()
    return Row(NAME, exchange.name, KIB, Figure.of(blocks), moves=False)


def _batch(nbytes: int, plan: Plan) -> int:
    """Payloads that are written together before they are read; only the first ones find cold caches."""
    return min(max(_BATCH_BYTES // nbytes, _FEWEST), _MOST, max(plan.operations(nbytes), _FEWEST))


def too_large(nbytes: int, batch: int) -> str:
    """Why payloads of a size cannot be measured here, of which so many are written together; empty if they can."""
    # The producer has the slots, and what it writes into them.
    needed, available = (batch + 1) * nbytes, available_bytes()
    if needed <= _MEMORY_SHARE * available:
        return ""
    return f"it takes {needed / GIB:.1f} GiB of memory, and {available / GIB:.1f} GiB are available"


SCENARIO = Scenario(
    NAME, "Reads in place", ("P1",), lambda plan: 1 + len(plan.sizes) * len(_WAYS) * plan.rounds, run
)
