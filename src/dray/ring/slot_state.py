"""The states of a slot, and the events that are allowed in each. No I/O.

The ring changes the state of a slot by `after` only, which follows `TRANSITIONS`. `diagram` draws the same table.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Final

from dray.errors import SlotError


class SlotState(IntEnum):
    """What a slot holds."""

    FREE = 0
    """No payload."""
    WRITING = 1
    """A payload that is not committed; it cannot be read."""
    READY = 2
    """A committed payload without a lease."""
    READING = 3
    """A committed payload with at least one lease."""


class SlotEvent(IntEnum):
    """What happens to a slot."""

    CLAIM = 0
    """A writer takes the slot."""
    COMMIT = 1
    """The payload is complete."""
    ABORT = 2
    """The claim ends without a payload."""
    LEASE = 3
    """A reader takes a lease; other readers may have some already."""
    RETURN = 4
    """The last lease ends, and the payload is not retired."""
    END = 5
    """The payload is retired (consumed, dropped or replaced), and no lease is left."""


TRANSITIONS: Final[Mapping[SlotState, Mapping[SlotEvent, SlotState]]] = {
    SlotState.FREE: {SlotEvent.CLAIM: SlotState.WRITING},
    SlotState.WRITING: {SlotEvent.COMMIT: SlotState.READY, SlotEvent.ABORT: SlotState.FREE},
    SlotState.READY: {SlotEvent.LEASE: SlotState.READING, SlotEvent.END: SlotState.FREE},
    SlotState.READING: {
        SlotEvent.LEASE: SlotState.READING,
        SlotEvent.RETURN: SlotState.READY,
        SlotEvent.END: SlotState.FREE,
    },
}


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


# The same table by index, for speed: every payload passes through it four times.
_TABLE: Final = tuple(tuple(TRANSITIONS[state].get(event) for event in SlotEvent) for state in SlotState)
