"""The scenarios, in the order of the report."""

from benchmarks.scenario import Scenario
from benchmarks.scenarios import (
    batches,
    beside,
    busy,
    fleet,
    idle,
    in_place,
    job,
    memory,
    owner,
    packing,
    reads,
    ring,
    selection,
    streams,
)

SCENARIOS: tuple[Scenario, ...] = (
    in_place.SCENARIO,
    reads.SCENARIO,
    batches.SCENARIO,
    selection.SCENARIO,
    idle.SCENARIO,
    packing.SCENARIO,
    ring.SCENARIO,
    fleet.SCENARIO,
    streams.SCENARIO,
    busy.SCENARIO,
    owner.SCENARIO,
    memory.SCENARIO,
    job.SCENARIO,
    beside.SCENARIO,
)
