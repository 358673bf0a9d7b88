"""The ring against the model in `ring_model.py`, over random histories of every policy."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from ring_model import LAPPING, OPERATIONS, POLICIES, READERS, RingAndModel, walk


def operation(name: str) -> Callable[..., None]:
    """A rule that does one of the model's operations, with what hypothesis draws for it."""

    def do(self: "RingMachine", data: st.DataObject) -> None:
        self.pair.do(name, lambda low, high: data.draw(st.integers(low, high)))

    do.__name__ = name
    return precondition(lambda self: self.pair.can(name))(rule(data=st.data())(do))


class RingMachine(RuleBasedStateMachine):
    pair: RingAndModel

    @initialize(slots=st.integers(1, 4), readers=st.sampled_from(READERS), policy=st.sampled_from(POLICIES))
    def create(self, slots: int, readers: int, policy: tuple[str, str]) -> None:
        self.pair = RingAndModel(slots, readers, *policy)

    def teardown(self) -> None:
        if hasattr(self, "pair"):
            self.pair.end()


for _name in OPERATIONS:
    setattr(RingMachine, _name, operation(_name))


def machine(**options: Any) -> type:
    """The machine as a test case."""
    case = type("TestCase", (RingMachine.TestCase,), {})
    case.settings = settings(
        stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow], **options
    )
    return case


test_ring_behaves_like_its_model = machine(max_examples=75)

test_ring_behaves_like_its_model_for_long = machine(max_examples=5000)
for _mark in (pytest.mark.endurance, pytest.mark.timeout(3600)):
    _mark(test_ring_behaves_like_its_model_for_long)


@pytest.mark.parametrize("seed", range(50))
def test_ring_behaves_like_its_model_on_a_random_walk(seed: int) -> None:
    walk(seed, 200)


@pytest.mark.parametrize("seed", range(3))
def test_ring_behaves_like_its_model_over_a_thousand_laps(seed: int) -> None:
    assert walk(seed, 20_000, LAPPING).laps > 1000


@pytest.mark.endurance
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(100, 110))
def test_ring_behaves_like_its_model_over_many_thousands_of_laps(seed: int) -> None:
    assert walk(seed, 200_000, LAPPING).laps > 4_000
