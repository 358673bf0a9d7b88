"""The states of a slot, and the table of what may happen in each. No I/O.

`TRANSITIONS` is the whole truth: the ring moves slots only through `after`, and `diagram` draws the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import Final

from dray.errors import SlotError


class SlotState(IntEnum):
    """What a slot holds."""

    FREE = 0
    """Nothing; it waits in the free list."""
    WRITING = 1
    """A payload that its writer has not committed; nobody can read it."""
    READY = 2
    """A committed payload that nobody reads now."""
    READING = 3
    """A committed payload with at least one lease."""


class SlotEvent(IntEnum):
    """What happens to a slot."""

    CLAIM = 0
    """A writer takes the slot."""
    COMMIT = 1
    """The writer has written the payload."""
    ABORT = 2
    """The writer gives up."""
    LEASE = 3
    """A reader begins to read; others may be reading already."""
    RETURN = 4
    """The last lease ends and the payload is still wanted."""
    END = 5
    """The payload's life is over (consumed, overwritten or retired) and no lease is left."""


TRANSITIONS: Final[Mapping[SlotState, Mapping[SlotEvent, SlotState]]] = MappingProxyType(
    {
        SlotState.FREE: MappingProxyType({SlotEvent.CLAIM: SlotState.WRITING}),
        SlotState.WRITING: MappingProxyType(
            {SlotEvent.COMMIT: SlotState.READY, SlotEvent.ABORT: SlotState.FREE},
        ),
        SlotState.READY: MappingProxyType(
            {SlotEvent.LEASE: SlotState.READING, SlotEvent.END: SlotState.FREE},
        ),
        SlotState.READING: MappingProxyType(
            {
                SlotEvent.LEASE: SlotState.READING,
                SlotEvent.RETURN: SlotState.READY,
                SlotEvent.END: SlotState.FREE,
            }
        ),
    }
)


def after(state: SlotState, event: SlotEvent) -> SlotState:
    """The state that follows `event` in `state`.

    Raises:
        SlotError: the table has no such transition.
    """
    following = _TABLE[state][event]
    if following is None:
        raise SlotError(f"{event.name} is not possible in state {state.name}")
    return following


def diagram() -> str:
    """The table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", "    [*] --> FREE"]
    lines += [
        f"    {state.name} --> {following.name}: {event.name.lower()}"
        for state, events in TRANSITIONS.items()
        for event, following in events.items()
    ]
    return "\n".join(lines)


# The same table by index: every payload passes through it four times.
_TABLE: Final = tuple(tuple(TRANSITIONS[state].get(event) for event in SlotEvent) for state in SlotState)
