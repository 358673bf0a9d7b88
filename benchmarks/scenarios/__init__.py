"""The scenarios, in the order of the report."""

from benchmarks.scenario import Scenario
from benchmarks.scenarios import batches, beside, busy, fleet, idle, job, memory, packing, reads, ring

SCENARIOS: tuple[Scenario, ...] = (
    reads.SCENARIO,
    batches.SCENARIO,
    idle.SCENARIO,
    packing.SCENARIO,
    ring.SCENARIO,
    fleet.SCENARIO,
    busy.SCENARIO,
    memory.SCENARIO,
    job.SCENARIO,
    beside.SCENARIO,
)
