"""What mutation changes and no test notices, and why that is so; `docs/testing.md` tells the same."""

from typing import NamedTuple


class Survivor(NamedTuple):
    """A change that no test notices.

    Attributes:
        function: module, class and function, below `dray`.
        old: the lines that are gone.
        new: the lines in their place.
    """

    function: str
    old: str
    new: str


EXPLAINED: dict[Survivor, str] = {}
