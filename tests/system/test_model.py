"""The model of direct leases and streams: no interleaving violates a property, and each planted defect does."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from model import stream_search
from model.command import all_defects, all_scenarios, main, scenario_named, search
from model.defects import DEFECTS
from model.machine import CAPACITY, BufferTooSmallError, Machine
from model.properties import Property
from model.scenarios import Scenario
from model.stream import StreamProperty

TESTS = Path(__file__).parents[1]
NAMED_BY_THE_PROTOCOL = {
    "attachment-ended-by-socket",
    "barrier-left-out-of-drop",
    "barrier-left-out-of-retire",
    "barrier-left-out-of-wait",
    "board-after-word",
    "board-ignored-by-network-lane",
    "generation-0-while-undecided",
    "generation-cleared-after-scan",
    "lease-ended-twice",
    "word-cleared-before-copy",
}
X, Y = 0, 1


def run_model(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own: coverage is not in its way."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=TESTS, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.mark.timeout(300)
def test_no_interleaving_violates_a_property_and_every_defect_does() -> None:
    done = run_model("-m", "model", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line.split()[0] for line in done.stdout.splitlines() if " found in " in line}
    held = {line.split()[0] for line in done.stdout.splitlines() if "nothing is violated" in line}
    assert held == {scenario.name for scenario in all_scenarios() if scenario.quick}
    assert found == {defect.name for defect in all_defects() if scenario_named(defect.scenario).quick}
    assert found >= NAMED_BY_THE_PROTOCOL


def test_each_defect_states_what_it_changes_and_has_a_name_of_its_own() -> None:
    assert all(defect.change for defect in all_defects())
    assert len({defect.name for defect in all_defects()}) == len(all_defects())
    assert len({scenario.name for scenario in all_scenarios()}) == len(all_scenarios())


def test_defects_violate_every_property_but_those_that_no_defect_reaches() -> None:
    """No planted defect blocks a thread or leaves a word behind; these two properties guard the model itself."""
    violated = {defect.violated for defect in DEFECTS}
    assert set(Property) - violated == {Property.HANG, Property.WORD_STAYS}
    assert {defect.violated for defect in stream_search.DEFECTS} == set(StreamProperty)


def test_the_command_prints_the_interleaving_that_a_defect_makes_possible(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--defect", "barrier-left-out-of-retire"]) == 0
    printed = capsys.readouterr().out
    assert "   1  owner" in printed
    assert "consumer B" in printed
    assert "violated: a slot changes under a lease" in printed


def test_the_command_fails_if_a_defect_is_not_found() -> None:
    script = (
        "import sys; from model import command, defects, owner;"
        "command.SCENARIOS = command.SCENARIOS[:1]; command.stream_search.SCENARIOS = ();"
        "command.stream_search.DEFECTS = ();"
        "command.DEFECTS = (defects.DEFECTS[0]._replace(consumer=command.NO_DEFECT.consumer, scenario='reuse'),);"
        "sys.exit(command.main([]))"
    )
    done = run_model("-c", script)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "NOT FOUND" in done.stdout


def test_a_scenario_that_never_reaches_its_events_is_reported() -> None:
    drain = scenario_named("drain")
    assert isinstance(drain, Scenario)
    threads = drain.threads
    result = search(Scenario("no drop", "no payload is dropped", threads, payloads=2, reaches=("dropped",)))
    assert result.violated is None
    assert result.missing == {"dropped"}


# --- the memory of the model -----------------------------------------------------------------------------------


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
