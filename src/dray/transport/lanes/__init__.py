"""The lanes: how messages and payloads travel between two processes.

`LANES` is the table of all lanes, best first. What depends on a lane reads it: the choice of a
client, what a server serves, endpoints, configuration, `dray doctor`, and the contract tests.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final, TypeAlias

from dray.errors import ConfigError
from dray.protocol.ref import has_control
from dray.transport.lanes.base import Endpoint, Lane
from dray.transport.lanes.socket import SHM, TCP
from dray.transport.lanes.ucx import UCX

__all__ = ["LANES", "SHM", "TCP", "UCX", "Endpoint", "Lane", "LaneChoice", "chosen_lanes", "parse_endpoint"]

LANES: Final[dict[str, Lane]] = {lane.name: lane for lane in (SHM, UCX, TCP)}

LaneChoice: TypeAlias = str | Sequence[str]
"""``"auto"``, the name of a lane, or several names."""


@functools.lru_cache(maxsize=4096)
def parse_endpoint(address: str) -> Endpoint:
    """An address such as ``"unix:PATH"`` or ``"tcp:HOST:PORT"`` in its parts.

    Raises:
        ConfigError: it is not an address of any lane.
    """
    if not has_control(address):
        scheme, _, rest = address.partition(":")
        for lane in LANES.values():
            if lane.scheme == scheme and (found := lane.parse_address(rest)) is not None:
                return Endpoint(lane, *found)
    forms = ", ".join(sorted({lane.form for lane in LANES.values()}))
    raise ConfigError("endpoint", address, f"{forms}, without control characters")


def chosen_lanes(key: str, choice: LaneChoice) -> tuple[Lane, ...] | None:
    """The lanes that a choice names, in the order of the table; None for ``"auto"``.

    Args:
        key: what an error calls the choice.

    Raises:
        ConfigError: a name is not a lane's, or there is none.
        MissingDependencyError: a lane needs a package that is not installed.
    """
    if choice == "auto":
        return None
    names = {choice} if isinstance(choice, str) else set(choice)
    if not names or not names <= LANES.keys():
        raise ConfigError(key, choice, f'"auto", or one or several of {", ".join(LANES)}')
    lanes = tuple(lane for name, lane in LANES.items() if name in names)
    for lane in lanes:
        lane.check()
    return lanes
