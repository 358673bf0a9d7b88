"""Tools for tests: a clock moved by hand, and the deterministic simulation. Nothing in dray imports this package.

`python -m simulation` runs the simulation; docs/reference/testing.md explains what it does and how to read the
output.
"""

from simulation.clock import ManualClock

__all__ = ["ManualClock"]
