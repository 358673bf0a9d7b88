"""The model of direct leases: no interleaving violates a property, and each planted defect does."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from model.command import main, scenario_named, search
from model.defects import DEFECTS, Defect
from model.machine import CAPACITY, BufferTooSmallError, Machine
from model.properties import Property
from model.scenarios import SCENARIOS, Scenario

TESTS = Path(__file__).parents[1]
QUICK = [scenario for scenario in SCENARIOS if scenario.quick]
X, Y = 0, 1


@pytest.mark.parametrize("scenario", QUICK, ids=lambda scenario: scenario.name)
def test_no_interleaving_violates_a_property(scenario: Scenario) -> None:
    result = search(scenario)
    assert result.violated is None, result.detail
    assert result.missing == set()


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_a_planted_defect_violates_a_property(defect: Defect) -> None:
    result = search(scenario_named(defect.scenario), defect)
    assert result.violated is defect.violated, result.detail
    assert len(result.steps) > 5


def test_each_defect_states_what_it_changes_and_has_a_name_of_its_own() -> None:
    assert all(defect.change for defect in DEFECTS)
    assert len({defect.name for defect in DEFECTS}) == len(DEFECTS)
    assert len({scenario.name for scenario in SCENARIOS}) == len(SCENARIOS)


def test_defects_violate_every_property_but_the_one_that_steps_cannot_reach() -> None:
    """No planted defect blocks a thread or leaves a word behind; these two properties guard the model itself."""
    violated = {defect.violated for defect in DEFECTS}
    assert set(Property) - violated == {Property.HANG, Property.WORD_STAYS}


def test_the_command_prints_the_interleaving_that_a_defect_makes_possible(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--defect", "no-barrier-in-retire"]) == 0
    printed = capsys.readouterr().out
    assert "   1  owner" in printed
    assert "consumer B" in printed
    assert "violated: a slot changes under a lease" in printed


def test_the_command_fails_if_a_defect_is_not_found() -> None:
    script = (
        "import sys; from model import command, defects, owner;"
        "command.SCENARIOS = command.SCENARIOS[:1];"
        "command.DEFECTS = (defects.DEFECTS[0]._replace(consumer=command.NO_DEFECT.consumer, scenario='reuse'),);"
        "sys.exit(command.main([]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=TESTS, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "NOT FOUND" in done.stdout


def test_a_scenario_that_never_reaches_its_events_is_reported() -> None:
    threads = scenario_named("drain").threads
    result = search(Scenario("no drop", "no payload is dropped", threads, payloads=2, reaches=("dropped",)))
    assert result.violated is None
    assert result.missing == {"dropped"}


# --- the memory of the model --------------------------------------------------------------------------------------


Access = tuple[str, int]


def loads_of(*programs: Sequence[Access]) -> set[tuple[int, ...]]:
    """What the loads of programs, each on a processor of its own, can return together; X and Y are 0 at first."""
    machine = Machine()
    words = [machine.variable("x"), machine.variable("y")]
    processors = [machine.processor(str(number)) for number in range(len(programs))]
    counters = [machine.variable(f"counter {number}") for number in range(len(programs))]
    loaded = {
        (number, at): machine.variable(f"loaded {number} {at}")
        for number, program in enumerate(programs)
        for at, (kind, _) in enumerate(program)
        if kind == "load"
    }
    results = set()
    reached = {machine.initial()}
    todo = list(reached)
    while todo:
        state = todo.pop()
        following = []
        for number, program in enumerate(programs):
            at, processor = state[counters[number]], processors[number]
            if machine.can_drain(state, processor):
                changed = bytearray(state)
                machine.drain_one(changed, processor)
                following.append(bytes(changed))
            if at < len(program):
                changed = bytearray(state)
                changed[counters[number]] += 1
                kind, word = program[at]
                if kind == "store":
                    machine.store(changed, processor, words[word], 1)
                elif kind == "load":
                    changed[loaded[number, at]] = machine.load(changed, processor, words[word])
                else:
                    machine.drain(changed, processor)
                following.append(bytes(changed))
        if not following:
            results.add(tuple(state[place] for place in loaded.values()))
        todo.extend(set(following) - reached)
        reached.update(following)
    return results


def test_a_load_passes_an_earlier_store_to_another_word() -> None:
    assert (0, 0) in loads_of([("store", X), ("load", Y)], [("store", Y), ("load", X)])


def test_no_load_passes_a_barrier() -> None:
    first = [("store", X), ("barrier", 0), ("load", Y)]
    second = [("store", Y), ("barrier", 0), ("load", X)]
    assert loads_of(first, second) == {(0, 1), (1, 0), (1, 1)}


def test_stores_become_visible_in_order() -> None:
    assert loads_of([("store", X), ("store", Y)], [("load", Y), ("load", X)]) == {(0, 0), (0, 1), (1, 1)}


def test_a_processor_loads_what_it_stored() -> None:
    assert loads_of([("store", X), ("load", X)]) == {(1,)}


def test_a_buffer_that_is_full_ends_the_search() -> None:
    machine = Machine()
    word, processor = machine.variable("x"), machine.processor("0")
    state = bytearray(machine.initial())
    for _ in range(CAPACITY):
        machine.store(state, processor, word, 1)
    with pytest.raises(BufferTooSmallError):
        machine.store(state, processor, word, 1)
