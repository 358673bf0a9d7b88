"""The scenarios, in the order of the report."""

from benchmarks.scenario import Scenario
from benchmarks.scenarios import idle, packing, reads, ring

SCENARIOS: tuple[Scenario, ...] = (reads.SCENARIO, idle.SCENARIO, packing.SCENARIO, ring.SCENARIO)
