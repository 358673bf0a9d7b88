"""Reads over each lane, 1 KiB to 64 MiB, beside the bare means: targets P1 to P6."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Literal, cast

from benchmarks.exchange import Exchange, measure_in_turn
from benchmarks.exchanges.lanes import LaneRead
from benchmarks.exchanges.memory import ForeignCopy, PrivateCopy
from benchmarks.exchanges.sockets import SocketExchange
from benchmarks.exchanges.ucx import UcxExchange
from benchmarks.figures import Figure, Row, Target
from benchmarks.plan import KIB, MIB, Plan, size_name
from benchmarks.scenario import Progress, Scenario, Skipped
from dray.transport.ucx_worker import UCXX_AVAILABLE

NAME = "reads"

PRIVATE_COPY = "bare copy, private"
WARM_COPY = "bare copy, foreign"
UNIX = "bare Unix round trip"
TCP = "bare TCP round trip"
TCP_BULK = "bare TCP, same size"
UCX = "bare UCX exchange"

_LANES: dict[str, tuple[Callable[[], Exchange], ...]] = {
    "shm": (lambda: LaneRead("shm", "lease"), lambda: LaneRead("shm")),
    "tcp": (lambda: LaneRead("tcp"), lambda: LaneRead("tcp", checksum=True)),
    "ucx": (lambda: LaneRead("ucx"),),
}
_BARE: dict[str, tuple[Callable[[], Exchange], ...]] = {
    "shm": (
        PrivateCopy,
        lambda: ForeignCopy("warm memory"),
        lambda: ForeignCopy("new memory"),
        lambda: SocketExchange("unix", round_trip=True),
    ),
    "tcp": (
        lambda: SocketExchange("tcp", round_trip=True),
        lambda: SocketExchange("tcp", round_trip=False),
    ),
    "ucx": (UcxExchange,),
}


def run(plan: Plan, progress: Progress) -> Iterator[Row | Skipped]:
    """Measure every size, all lanes and limits in turn."""
    lanes = list(plan.lanes)
    if "ucx" in lanes and not UCXX_AVAILABLE:
        lanes.remove("ucx")
        yield Skipped("reads over the ucx lane", "the ucxx package is not installed: pip install 'dray[ucxx]'")
    with ExitStack() as opened:
        progress.step("starting the other processes")
        makers = [maker for lane in lanes for maker in (*_BARE[lane], *_LANES[lane])]
        exchanges: list[Exchange] = [opened.enter_context(closing(maker())) for maker in makers]
        for nbytes in plan.sizes:
            figures = _measure(exchanges, nbytes, plan, progress)
            yield from (_row(name, nbytes, figures) for name in figures)


def _measure(exchanges: list[Exchange], nbytes: int, plan: Plan, progress: Progress) -> dict[str, Figure]:
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
    figure = figures[name]
    match name:
        case "shm in place":
            target = Target("P1", "at most", 3.0, "time ratio")
            return Row(NAME, name, nbytes, figure, limit_name=UNIX, limit=figures[UNIX], target=target)
        case "shm":
            limit = figures[WARM_COPY].plus(figures[UNIX])
            named = "foreign copy + round trip"
            large = Target("P2", "at most", 1.1, "time ratio") if nbytes >= MIB else None
            return Row(NAME, name, nbytes, figure, limit_name=named, limit=limit, target=large)
        case "tcp" | "tcp with checksum":
            return _tcp_row(name, nbytes, figure, figures)
        case "ucx":
            return Row(NAME, name, nbytes, figure, limit_name=UCX, limit=figures[UCX], target=_ucx_target(nbytes))
        case _:
            return Row(NAME, name, nbytes, figure, moves=name not in (UNIX, TCP))


def _tcp_row(
    name: Literal["tcp", "tcp with checksum"], nbytes: int, figure: Figure, figures: dict[str, Figure]
) -> Row:
    if nbytes <= KIB:
        target = Target("P4", "at most", 3.0, "time ratio")
        return Row(NAME, name, nbytes, figure, limit_name=TCP, limit=figures[TCP], target=target)
    bound = 0.9 if name == "tcp" else 0.8
    large = Target("P3", "at least", bound, "rate ratio") if nbytes >= MIB else None
    return Row(NAME, name, nbytes, figure, limit_name=TCP_BULK, limit=figures[TCP_BULK], target=large)


def _ucx_target(nbytes: int) -> Target | None:
    if nbytes <= KIB:
        return Target("P6", "at most", 1.5, "time ratio")
    return Target("P5", "at least", 0.9, "rate ratio") if nbytes >= MIB else None


SCENARIO = Scenario(
    NAME,
    "Reads between two processes",
    lambda plan: 1 + len(plan.sizes) * (plan.rounds + 1),
    run,
)
