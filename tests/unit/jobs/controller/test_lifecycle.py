import itertools

import pytest

from dray.jobs.controller.state import TRANSITIONS, IllegalTransition, JobEvent, Lifecycle
from dray.jobs.messages.models import Phase


def test_every_pair_outside_the_table_raises_and_changes_nothing() -> None:
    for phase, event in itertools.product(Phase, JobEvent):
        lifecycle = Lifecycle()
        lifecycle.phase = phase
        if (phase, event) in TRANSITIONS:
            assert lifecycle.apply(event) is TRANSITIONS[phase, event]
        else:
            with pytest.raises(IllegalTransition):
                lifecycle.apply(event)
            assert lifecycle.phase is phase


def test_final_phases_have_no_way_out() -> None:
    assert not any(phase.is_final for phase, _ in TRANSITIONS)
    assert {phase for phase in Phase if phase.is_final} == {Phase.DONE, Phase.INTERRUPTED, Phase.FAILED}
