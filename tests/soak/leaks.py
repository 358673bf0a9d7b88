"""What grows in the processes that live as long as the soak, and what is left when it is over."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from soak.processes import Footprint, Life

_MIN_SECONDS = 90.0
"""A shorter life is not judged: what a process holds still rises to what it needs at most."""

_ALLOWED = {"memory": 64.0, "descriptors": 12.0, "sockets": 12.0, "threads": 4.0, "segments": 3.0}
"""By how much the last third of a life may exceed the second: connections come and go with the faults."""
_ALLOWED_SLOPE = 6.0
"""MiB per minute; counts where the life is long enough for a slope to mean something."""
_SLOPE_NEEDS = 240.0

HELD = tuple(_ALLOWED)
"""What is watched; memory in MiB."""


@dataclass(frozen=True, slots=True)
class Growth:
    """One process: medians of the second and of the last third of its life, and the slope of its memory."""

    name: str
    before: dict[str, float]
    after: dict[str, float]
    slope: float  # MiB per minute, from the second third on
    leaks: tuple[str, ...]


def growths(lives: Iterable[Life]) -> list[Growth]:
    """What each steady process held, once it was warm, and at the end of the plan."""
    return [_growth(life) for life in lives if life.steady and _seconds(life.footprints) >= _MIN_SECONDS]


def _seconds(footprints: list[Footprint]) -> float:
    return footprints[-1].at - footprints[0].at if footprints else 0.0


def _growth(life: Life) -> Growth:
    third = len(life.footprints) // 3
    warm, last = life.footprints[third : 2 * third], life.footprints[-third:]
    before, after = _medians(warm), _medians(last)
    slope = _slope(life.footprints[third:])
    leaks = [name for name, most in _ALLOWED.items() if after[name] > before[name] + most]
    if last[-1].at - warm[0].at > _SLOPE_NEEDS and slope > _ALLOWED_SLOPE:
        leaks.append("memory")
    return Growth(life.name, before, after, round(slope, 2), tuple(leaks))


def _medians(footprints: list[Footprint]) -> dict[str, float]:
    return {name: statistics.median(getattr(each, name) for each in footprints) for name in _ALLOWED}


def _slope(footprints: list[Footprint]) -> float:
    line = statistics.linear_regression([each.at for each in footprints], [each.memory for each in footprints])
    return line.slope * 60
