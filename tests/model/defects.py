"""The defects that are planted, one at a time, to show that the search finds them."""

from __future__ import annotations

from typing import Final, NamedTuple

from model.consumer import Consumer
from model.look import Looker
from model.owner import Owner
from model.properties import Property
from model.server import Server


class Defect(NamedTuple):
    """A change of the protocol.

    Attributes:
        name: how commands refer to it.
        scenario: the scenario that finds it.
        violated: the property that the shortest interleaving violates.
        consumer: the class of consumers.
        owner: the class of the owner's threads.
        server: the class of the server.
    """

    name: str
    scenario: str
    violated: Property | None
    consumer: type[Consumer] = Consumer
    owner: type[Owner] = Owner
    looker: type[Looker] = Looker
    server: type[Server] = Server

    @property
    def change(self) -> str:
        """What it changes: the docstring of the class that has the defect."""
        pairs = ((self.consumer, Consumer), (self.owner, Owner), (self.server, Server), (self.looker, Looker))
        return next((changed.__doc__ or "" for changed, base in pairs if changed is not base), "")


NO_DEFECT: Final = Defect("none", "", None)


def _of_consumer(name: str, scenario: str, violated: Property, consumer: type[Consumer]) -> Defect:
    return Defect(name, scenario, violated, consumer=consumer)


def _of_owner(name: str, scenario: str, violated: Property, owner: type[Owner]) -> Defect:
    return Defect(name, scenario, violated, owner=owner)


def _of_server(name: str, scenario: str, violated: Property, server: type[Server]) -> Defect:
    return Defect(name, scenario, violated, server=server)


_OTHER_BYTES: Final = Property.OTHER_BYTES
_CHANGED: Final = Property.SLOT_CHANGED
_STALE: Final = Property.STALE
_TWICE: Final = Property.CONSUMED_TWICE
_UNDONE: Final = Property.UNDONE
_MISCOUNTED: Final = Property.MISCOUNTED
_LOST: Final = Property.LOST
_FOREIGN: Final = Property.FOREIGN_END
_WAKE_UP: Final = Property.LOST_WAKE_UP

DEFECTS: Final[tuple[Defect, ...]] = ()
