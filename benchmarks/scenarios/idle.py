"""What idle connections cost: processor time of a server and of a client with 64 of them, target P8."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack

from benchmarks.figures import Figure, Row, Target
from benchmarks.partner import Partner
from benchmarks.plan import KIB, LANES, Plan
from benchmarks.scenario import UCX_MISSING, Progress, Scenario, Skipped
from dray.transport.lanes.ucx_worker import UCXX_AVAILABLE

NAME = "idle"
CONNECTIONS = 64
_PARTS = 5


def run(plan: Plan, progress: Progress) -> Iterator[Row | Skipped]:
    """Watch all lanes at the same time, each with a server and a client process of its own."""
    lanes: list[str] = list(LANES)
    if "ucx" in lanes and not UCXX_AVAILABLE:
        lanes.remove("ucx")
        yield Skipped("idle connections of the ucx lane", UCX_MISSING)
    with ExitStack() as opened:
        pairs: dict[str, tuple[Partner, Partner]] = {}
        notes: dict[str, str] = {}
        for lane in lanes:
            progress.step(f"{CONNECTIONS} connections over {lane}")
            server = opened.enter_context(Partner("payloads"))
            reader = opened.enter_context(Partner("idle reader"))
            server.ask("open", nbytes=KIB, slots=CONNECTIONS, lane=lane, checksum=False)
            reader.ask("connect", lane=lane, refs=server.ask("put", count=CONNECTIONS)["refs"])
            pairs[lane] = server, reader
            notes[lane] = f"{server.ask('connections')['open']} connections"
        used: dict[tuple[str, str], list[float]] = {}
        for part in range(_PARTS):
            progress.step(f"watching for {plan.idle_seconds:g} s, part {part + 1} of {_PARTS}")
            for key, percent in _watch(pairs, plan.idle_seconds / _PARTS).items():
                used.setdefault(key, []).append(percent)
    for (lane, side), percents in used.items():
        figure = Figure(tuple(percents), None, len(percents))
        target = Target("P8", "at most", 1.0, "value")
        yield Row(NAME, f"{lane} {side}", None, figure, "% of a core", target=target, note=notes[lane])


def _watch(pairs: dict[str, tuple[Partner, Partner]], seconds: float) -> dict[tuple[str, str], float]:
    """Processor time used while nothing happens, in percent of a core, by lane and side."""
    ends = {
        (lane, side): end
        for lane, pair in pairs.items()
        for side, end in zip(("server", "client"), pair, strict=True)
    }
    began = time.perf_counter()
    before = {key: end.cpu_seconds() for key, end in ends.items()}
    time.sleep(seconds)
    after = {key: end.cpu_seconds() for key, end in ends.items()}
    elapsed = time.perf_counter() - began
    return {key: 100 * (after[key] - before[key]) / elapsed for key in ends}


SCENARIO = Scenario(NAME, "Idle connections", ("P8",), lambda plan: len(LANES) + _PARTS, run)
