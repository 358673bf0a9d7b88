"""The life cycle of a payload in a job, as its table describes it."""

import pytest

from dray.jobs.queue import Delivery, RolloutEntry
from dray.jobs.replica.delivery import (
    ENDED,
    TRANSITIONS,
    IllegalPayloadTransition,
    PayloadEvent,
    PayloadState,
    PayloadTracker,
    diagram,
)

WAYS = {
    PayloadState.RECEIVED: [],
    PayloadState.READ: [PayloadEvent.READ],
    PayloadState.TRAINING: [PayloadEvent.READ, PayloadEvent.BEGIN],
    PayloadState.TRAINED: [PayloadEvent.READ, PayloadEvent.BEGIN, PayloadEvent.TRAIN],
    PayloadState.COMMITTED: [PayloadEvent.READ, PayloadEvent.BEGIN, PayloadEvent.TRAIN, PayloadEvent.COMMIT],
    PayloadState.LOST: [PayloadEvent.FAIL],
    PayloadState.TOO_OLD: [PayloadEvent.AGE],
    PayloadState.DEAD_LETTER: [PayloadEvent.GIVE_UP],
}
"""The events that lead to each state in which a payload is known."""


def delivery(sequence: int = 0, work_item: int = 0) -> Delivery:
    entry = RolloutEntry("0f" * 16, sequence, 1, "rollout-0", work_item, payload=b"x")
    return Delivery(entry, 1, "1-0")


def tracker_in(state: PayloadState) -> tuple[PayloadTracker, Delivery]:
    tracker, one = PayloadTracker(), delivery()
    assert tracker.receive([one]) == [one]
    for event in WAYS[state]:
        tracker.apply(event, [one.entry.id])
    assert tracker.within(state) == [one]
    return tracker, one


@pytest.mark.parametrize("state", WAYS)
@pytest.mark.parametrize("event", PayloadEvent)
def test_every_event_in_every_state_does_what_the_table_states(state: PayloadState, event: PayloadEvent) -> None:
    tracker, one = tracker_in(state)
    after = TRANSITIONS.get((state, event))
    if after is None:
        with pytest.raises(IllegalPayloadTransition, match=f"is {state.value}: it cannot {event.value}"):
            tracker.apply(event, [one.entry.id])
        assert tracker.within(state) == [one]
    elif after in (PayloadState.FREED, PayloadState.TAKEN):
        tracker.apply(event, [one.entry.id])
        assert tracker.within(*PayloadState) == [], "it is forgotten"
    else:
        tracker.apply(event, [one.entry.id])
        assert tracker.within(after) == [one]


def test_every_end_but_that_of_another_consumer_leads_to_the_reuse_of_the_slot() -> None:
    reached = {PayloadState.FREED}
    while more := {before for (before, _), after in TRANSITIONS.items() if after in reached} - reached:
        reached |= more
    assert reached == set(PayloadState) - {PayloadState.TAKEN}
    assert {before for (before, event) in TRANSITIONS if event is PayloadEvent.FREE} == set(ENDED)


def test_payload_that_is_given_again_while_it_is_here_is_received_once() -> None:
    tracker, one = tracker_in(PayloadState.READ)
    assert tracker.receive([delivery(), delivery(1)]) == [delivery(1)]
    assert tracker.within(PayloadState.READ) == [one]


def test_event_of_a_payload_that_is_not_here_is_an_error() -> None:
    with pytest.raises(IllegalPayloadTransition, match="is unknown: it cannot train"):
        PayloadTracker().apply(PayloadEvent.TRAIN, [delivery().entry.id])


def test_diagram_has_every_transition() -> None:
    assert diagram().count("-->") == len(TRANSITIONS) + 3
