from dray.jobs.controller.state import TRANSITIONS
from dray.jobs.messages.models import Phase


def test_final_phases_have_no_way_out() -> None:
    assert not any(phase.is_final for phase, _ in TRANSITIONS)
    assert {phase for phase in Phase if phase.is_final} == {Phase.DONE, Phase.INTERRUPTED, Phase.FAILED}
