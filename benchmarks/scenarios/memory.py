"""Memory of a client and of a server over very many reads: target P13."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from benchmarks.exchanges.producing import Fleet, anonymous_memory
from benchmarks.figures import Figure, Row, Target
from benchmarks.plan import KIB, LANES, Plan
from benchmarks.scenario import UCX_MISSING, Progress, Scenario, Skipped
from dray.transport.lanes.ucx_worker import UCXX_AVAILABLE

NAME = "memory"
SLOTS = 64
PARTS = 10
ALLOWED = 256 * KIB
"""Growth that is not one: what the allocator keeps moves by this much."""


def run(plan: Plan, progress: Progress) -> Iterator[Row | Skipped]:
    """Read in ten parts; growth counts from the end of the second one."""
    for lane in LANES:
        if lane == "ucx" and not UCXX_AVAILABLE:
            yield Skipped("memory of reads over the ucx lane", UCX_MISSING)
            continue
        # shm gets the whole number; the other lanes share all but the stream with it.
        reads = plan.memory_reads if lane == "shm" else plan.memory_reads // 10
        seen: dict[str, list[int]] = {"server": [], "client": []}
        with closing(Fleet(1, SLOTS, KIB, lane)) as fleet:
            for part in range(PARTS):
                progress.step(f"{lane}: {reads * part // PARTS:,} of {reads:,} reads")
                fleet.read(reads // PARTS)
                seen["server"].append(fleet.partners[0].ask("memory")["bytes"])
                seen["client"].append(anonymous_memory())
        for side, sizes in seen.items():
            # The rest of this process, which is the client, has grown before.
            growth = float(max(0, sizes[-1] - sizes[1]))
            target = Target("P13", "at most", ALLOWED, "value")
            note = f"over {reads:,} reads"
            yield Row(NAME, f"{lane} {side}", None, Figure((growth,), None, reads), "B", target=target, note=note)


SCENARIO = Scenario(NAME, "Memory", ("P13",), lambda _: len(LANES) * PARTS, run)
