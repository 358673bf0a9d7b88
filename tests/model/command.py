"""`python -m model`: searches every scenario, then shows that each planted defect is found."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from model import stream_search
from model.defects import DEFECTS, NO_DEFECT, Defect
from model.scenarios import SCENARIOS, Scenario
from model.search import Model, Result
from model.stream import StreamScenario
from model.stream_search import StreamDefect


def search(scenario: Scenario | StreamScenario, defect: Defect | StreamDefect = NO_DEFECT) -> Result:
    """Search one scenario, with a defect or without."""
    if isinstance(scenario, StreamScenario):
        return stream_search.search(
            scenario, defect if isinstance(defect, StreamDefect) else stream_search.NO_DEFECT
        )
    assert isinstance(defect, Defect)
    return Model(scenario, defect).search()


def all_scenarios() -> tuple[Scenario | StreamScenario, ...]:
    """Those of direct leases, then those of streams."""
    return (*SCENARIOS, *stream_search.SCENARIOS)


def all_defects() -> tuple[Defect | StreamDefect, ...]:
    """Those of direct leases, then those of streams."""
    return (*DEFECTS, *stream_search.DEFECTS)


def scenario_named(name: str) -> Scenario | StreamScenario:
    """The scenario of that name."""
    return next(scenario for scenario in all_scenarios() if scenario.name == name)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 if a property does not hold, an expected event never occurs, or a defect is not found."""
    parser = argparse.ArgumentParser(prog="python -m model", description=__doc__)
    scenarios = [scenario.name for scenario in all_scenarios()]
    defects = [defect.name for defect in all_defects()]
    parser.add_argument(
        "--quick",
        action="store_true",
        help="only the smaller scenarios, and the defects that they find, as `make test` does",
    )
    parser.add_argument("--list", action="store_true", help="list scenarios and defects, search nothing")
    parser.add_argument("--scenario", metavar="NAME", choices=scenarios, help="only this scenario")
    parser.add_argument(
        "--defect", metavar="NAME", choices=defects, help="plant this defect and print the shortest interleaving"
    )
    options = parser.parse_args(arguments)
    if options.list:
        return _list()
    if options.defect is not None or options.scenario is not None:
        chosen = next((defect for defect in all_defects() if defect.name == options.defect), NO_DEFECT)
        return _one(scenario_named(options.scenario or chosen.scenario), chosen)
    return _all(options.quick)


def _list() -> int:
    for scenario in all_scenarios():
        print(f"{scenario.name:36} {scenario.covers}")
    print()
    for defect in all_defects():
        print(f"{defect.name:36} {defect.change}")
    return 0


def _one(scenario: Scenario | StreamScenario, defect: Defect | StreamDefect) -> int:
    """One scenario, with the interleaving if there is a violation; 1 if it is not the expected result."""
    if defect is not NO_DEFECT:
        print(f"defect {defect.name}: {defect.change}")
    print(f"scenario {scenario.name}: {scenario.covers}\n")
    result = search(scenario, defect)
    width = max((len(actor) for actor, _ in result.steps), default=0)
    for number, (actor, what) in enumerate(result.steps, 1):
        print(f"{number:4}  {actor:{width}}  {what}")
    print(f"{chr(10) if result.steps else ''}{_outcome(result)}")
    print(f"{result.states:,} states, {result.seconds:.2f} s")
    expected = result.violated is None if defect is NO_DEFECT else result.violated is not None
    return 0 if expected and not result.missing else 1


def _outcome(result: Result) -> str:
    if result.violated is not None:
        return f"violated: {result.detail}"
    if result.missing:
        return f"never occurred: {', '.join(sorted(result.missing))}"
    return "nothing is violated in any state"


def _all(quick: bool) -> int:
    began = time.perf_counter()
    failures = total = 0
    print(f"{'scenario':36} {'states':>10} {'seconds':>8}  result")
    for scenario in all_scenarios():
        if scenario.quick or not quick:
            result = search(scenario)
            failures += result.violated is not None or bool(result.missing)
            total += result.states
            print(f"{scenario.name:36} {result.states:10,} {result.seconds:8.2f}  {_outcome(result)}", flush=True)
    print(f"\n{'planted defect':36} {'states':>10} {'seconds':>8}  result")
    for defect in all_defects():
        scenario = scenario_named(defect.scenario)
        if quick and not scenario.quick:
            continue
        result = search(scenario, defect)
        found = result.violated is defect.violated
        failures += not found
        total += result.states
        outcome = f"found in {len(result.steps)} steps of {defect.scenario}" if found else "NOT FOUND"
        print(f"{defect.name:36} {result.states:10,} {result.seconds:8.2f}  {outcome}", flush=True)
    seconds = time.perf_counter() - began
    print(f"\n{total:,} states in {seconds:.0f} s, {failures} failures")
    return 1 if failures else 0
