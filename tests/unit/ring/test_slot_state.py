import itertools

import pytest

from dray.errors import SlotError
from dray.ring.slot_state import TRANSITIONS, SlotEvent, SlotState, after, diagram

F, W, R, L = SlotState.FREE, SlotState.WRITING, SlotState.READY, SlotState.READING


def test_the_table_holds_exactly_the_transitions_of_the_design() -> None:
    assert {(state, event): to for state, events in TRANSITIONS.items() for event, to in events.items()} == {
        (F, SlotEvent.CLAIM): W,
        (W, SlotEvent.COMMIT): R,
        (W, SlotEvent.ABORT): F,
        (R, SlotEvent.LEASE): L,
        (R, SlotEvent.END): F,
        (L, SlotEvent.LEASE): L,
        (L, SlotEvent.RETURN): R,
        (L, SlotEvent.END): F,
    }


@pytest.mark.parametrize(("state", "event"), list(itertools.product(SlotState, SlotEvent)))
def test_every_pair_of_state_and_event_follows_the_table_or_raises(state: SlotState, event: SlotEvent) -> None:
    if event in TRANSITIONS[state]:
        assert after(state, event) is TRANSITIONS[state][event]
    else:
        with pytest.raises(SlotError, match=f"{event.name} is not possible in state {state.name}"):
            after(state, event)


def test_a_zeroed_header_is_a_free_slot() -> None:
    assert SlotState(0) is SlotState.FREE


def test_diagram_draws_every_transition() -> None:
    lines = diagram().splitlines()
    assert lines[:3] == ["stateDiagram-v2", "    [*] --> FREE", "    FREE --> WRITING: claim"]
    assert "    READING --> FREE: end" in lines
    assert len(lines) == 2 + sum(len(events) for events in TRANSITIONS.values())
