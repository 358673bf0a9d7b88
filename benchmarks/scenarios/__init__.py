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
    nested,
    owner,
    packing,
    reads,
    ring,
    selection,
    streams,
    weights,
)

SCENARIOS: tuple[Scenario, ...] = (
    in_place.SCENARIO,
    reads.SCENARIO,
    batches.SCENARIO,
    selection.SCENARIO,
    idle.SCENARIO,
    packing.SCENARIO,
    nested.SCENARIO,
    ring.SCENARIO,
    fleet.SCENARIO,
    streams.SCENARIO,
    weights.SCENARIO,
    busy.SCENARIO,
    owner.SCENARIO,
    memory.SCENARIO,
    job.SCENARIO,
    beside.SCENARIO,
)
