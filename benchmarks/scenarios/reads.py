"""Reads with a copy over each lane, 1 KiB to 64 MiB, beside the bare means: targets P2 to P6."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import NamedTuple, cast

from benchmarks.exchange import ByteExchange, measure_in_turn
from benchmarks.exchanges.lanes import LaneRead
from benchmarks.exchanges.memory import ForeignCopy, PrivateCopy
from benchmarks.exchanges.sockets import SocketExchange
from benchmarks.exchanges.ucx import UcxExchange
from benchmarks.figures import Figure, Row, Target
from benchmarks.plan import KIB, MAX_COPIED, MIB, Plan, size_name
from benchmarks.scenario import UCX_MISSING, Progress, Scenario, Skipped
from dray.transport.lanes.ucx_worker import UCXX_AVAILABLE

NAME = "reads"
TARGETS = ("P2", "P3", "P4", "P5", "P6")

PRIVATE_COPY = "bare copy, private"
WARM_COPY = "bare copy, foreign"
TCP = "bare TCP round trip"
TCP_BULK = "bare TCP, same size"
UCX = "bare UCX exchange"


class _Part(NamedTuple):
    """An exchange, and the targets whose rows need it."""

    make: Callable[[], ByteExchange]
    targets: frozenset[str]


_PARTS = (
    _Part(PrivateCopy, frozenset({"P2"})),
    _Part(lambda: ForeignCopy("warm memory"), frozenset({"P2"})),
    _Part(lambda: ForeignCopy("new memory"), frozenset({"P2"})),
    _Part(lambda: LaneRead("shm"), frozenset({"P2"})),
    _Part(lambda: SocketExchange("tcp", round_trip=True), frozenset({"P4"})),
    _Part(lambda: SocketExchange("tcp", round_trip=False), frozenset({"P3"})),
    _Part(lambda: LaneRead("tcp"), frozenset({"P3", "P4"})),
    _Part(lambda: LaneRead("tcp", checksum=True), frozenset({"P3", "P4"})),
    _Part(UcxExchange, frozenset({"P5", "P6"})),
    _Part(lambda: LaneRead("ucx"), frozenset({"P5", "P6"})),
)
_OVER_UCX = frozenset({"P5", "P6"})


def run(plan: Plan, progress: Progress) -> Iterator[Row | Skipped]:
    """Measure every size, all lanes and limits in turn."""
    parts = [part for part in _PARTS if plan.wants(*part.targets)]
    if not UCXX_AVAILABLE:
        parts = [part for part in parts if part.targets != _OVER_UCX]
        if plan.wants(*_OVER_UCX):
            yield Skipped("reads over the ucx lane", UCX_MISSING)
    with ExitStack() as opened:
        progress.step("starting the other processes")
        made = {part: opened.enter_context(closing(part.make())) for part in parts}
        for nbytes in _sizes(plan):
            wanted = frozenset(_targets_at(nbytes, plan))
            exchanges = [exchange for part, exchange in made.items() if part.targets & wanted]
            if not exchanges:
                progress.step(size_name(nbytes))
                continue
            figures = _measure(exchanges, nbytes, plan, progress)
            yield from (_row(name, nbytes, figures) for name in figures)


def _sizes(plan: Plan) -> list[int]:
    return [nbytes for nbytes in plan.sizes if any(_targets_at(nbytes, plan))]


def _targets_at(nbytes: int, plan: Plan) -> Iterator[str]:
    """The targets whose rows are measured at this size: those asked for where they are judged; all where none was
    asked for, because the plot shows every size."""
    for target in TARGETS:
        small, large = target in ("P4", "P6"), target in ("P2", "P3", "P5")
        if nbytes > MAX_COPIED or not plan.wants(target):
            continue
        judged = not (small and nbytes > KIB) and not (large and nbytes < MIB)
        if judged or not plan.targets:
            yield target


def _measure(exchanges: list[ByteExchange], nbytes: int, plan: Plan, progress: Progress) -> dict[str, Figure]:
    operations, batch = plan.operations(nbytes), plan.batch(nbytes)
    figures: dict[str, Figure] = {}
    try:
        for exchange in exchanges:
            exchange.open(nbytes, batch)
        turns = measure_in_turn(exchanges, plan.rounds, operations, batch)
        for done in range(plan.rounds + 1):
            what = "warm-up" if done == 0 else f"round {done} of {plan.rounds}"
            progress.step(f"{size_name(nbytes)}, {what}")
            next(turns)
        figures = cast("dict[str, Figure]", next(turns))
    finally:
        for exchange in exchanges:
            exchange.shut()
    return figures


def _row(name: str, nbytes: int, figures: dict[str, Figure]) -> Row:
    limit_name, limit, target = _held_against(name, nbytes, figures)
    return Row(NAME, name, nbytes, figures[name], "s", limit_name, limit, target, moves=name != TCP)


def _held_against(name: str, nbytes: int, figures: dict[str, Figure]) -> tuple[str, Figure | None, Target | None]:
    """The limit's name, its figure, and the target."""
    large = nbytes >= MIB
    match name:
        case "shm":
            return WARM_COPY, figures[WARM_COPY], Target("P2", "at most", 1.05, "time ratio") if large else None
        case "tcp" | "tcp with checksum" if nbytes <= KIB:
            return TCP, figures.get(TCP), Target("P4", "at most", 3.0, "time ratio")
        case "tcp" | "tcp with checksum":
            bound = 0.95 if name == "tcp" else 0.85
            bulk = Target("P3", "at least", bound, "rate ratio") if large else None
            return TCP_BULK, figures.get(TCP_BULK), bulk
        case "ucx" if nbytes <= KIB:
            return UCX, figures[UCX], Target("P6", "at most", 1.5, "time ratio")
        case "ucx":
            return UCX, figures[UCX], Target("P5", "at least", 0.9, "rate ratio") if large else None
        case _:
            return "", None, None


SCENARIO = Scenario(
    NAME,
    "Reads between two processes",
    TARGETS,
    lambda plan: 1 + len(_sizes(plan)) * (plan.rounds + 1),
    run,
)
