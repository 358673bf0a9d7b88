"""An exhaustive breadth-first search over all interleavings of a scenario."""

from __future__ import annotations

import contextlib
import gc
import time
from collections import deque
from collections.abc import Callable
from enum import Enum
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from model.consumer import Consumer
from model.defects import NO_DEFECT, Defect
from model.machine import State
from model.owner_thread import OwnerThread
from model.properties import Properties, ViolationError
from model.scenarios import Kind, Scenario
from model.world import World


class Transition(NamedTuple):
    """A step that may be possible in a state.

    Attributes:
        actor: what does it, for traces.
        needs: the place of a byte that is not 0 wherever it is possible, to be checked first.
        is_possible: whether it is possible in a state.
        apply: does it.
        is_fault: it need not ever happen, so a state in which nothing else is possible is at rest.
    """

    actor: str
    needs: int
    is_possible: Callable[[bytes], bool]
    apply: Callable[[State], None]
    is_fault: bool = False


class Result(NamedTuple):
    """What a search has found.

    Attributes:
        states: how many different states it reached.
        seconds: processor time.
        violated: the property that does not hold, if there is one. The search ends with it; without one, every
            reachable state was visited.
        detail: what is violated.
        steps: the shortest interleaving that leads to it, as (actor, what it does).
        missing: events of the scenario's `reaches` that never occurred.
    """

    states: int
    seconds: float
    violated: Enum | None
    detail: str
    steps: list[tuple[str, str]]
    missing: frozenset[str]


class Model:
    """A scenario with its actors, and at most one planted defect."""

    def __init__(self, scenario: Scenario, defect: Defect = NO_DEFECT) -> None:
        self.scenario = scenario
        self.world = world = World(scenario)
        self.properties = properties = Properties(world)
        self.consumers = [defect.consumer(world, properties, each) for each in range(len(scenario.threads))]
        self.owners = [defect.owner(world, properties, each) for each in range(scenario.putting)]
        self.observers: list[OwnerThread] = [*self.owners, defect.observer(world, properties, scenario.putting)]
        self.server = defect.server(world, properties)
        for consumer in self.consumers:
            consumer.resolve(self.consumers)
        for observer in self.observers:
            observer.resolve(self.observers, self.consumers)
        self.server.resolve(self.observers, self.consumers)
        self.transitions = self._transitions()

    def _transitions(self) -> list[Transition]:
        world, server = self.world, self.server
        found: list[Transition] = []

        def add(
            actor: str,
            needs: int,
            is_possible: Callable[..., bool],
            apply: Callable[..., None],
            is_fault: bool = False,
            **of: object,
        ) -> None:
            found.append(Transition(actor, needs, partial(is_possible, **of), partial(apply, **of), is_fault))

        for owner in self.observers:
            add(owner.name, world.always, owner.can_step, owner.do_step)
            for consumer in self.consumers:
                add(owner.name, owner.awaited, owner.barrier_can_reach, owner.barrier_reaches, consumer=consumer)
            if self.scenario.barrier_fails:
                add("kernel", world.always, owner.barrier_can_fail, owner.barrier_fails, True)
        for consumer in self.consumers:
            add(consumer.name, world.always, consumer.can_step, consumer.do_step)
            add("server", consumer.requested, server.can_answer, server.answer, consumer=consumer)
            if any(each.kind is Kind.ATTACH for each in consumer.program):
                add("server", consumer.requested, server.can_attach, server.attach, consumer=consumer)
            add("server", consumer.pending, server.can_receive_end, server.receive_end, consumer=consumer)
        if self.scenario.interrupted:
            for owner in self.owners:
                add("kernel", world.always, owner.can_be_interrupted, owner.interrupt, True)
        if self.scenario.server_stops:
            add("kernel", world.always, server.can_stop, server.stop, True)
            add("kernel", world.suspended, server.can_start, server.start)
        actors: list[OwnerThread | Consumer] = [*self.observers, *self.consumers]
        for actor in actors:
            stores = world.stores(actor.processor)
            add(f"processor of {actor.name}", stores, world.can_drain, world.drain_one, processor=actor.processor)
        for process in self.scenario.crashes:
            add("kernel", world.always, server.can_be_killed, server.kill, True, process=process)
            add("server", world.dead, server.can_notice, server.notice, process=process)
        for process in self.scenario.sockets:
            add("kernel", world.always, server.can_lose_socket, server.lose_socket, True, process=process)
        for is_possible, apply in server.further_transitions():
            add("server", world.always, is_possible, apply)
        return found

    def search(self) -> Result:
        """Visit every reachable state, or find a violation with the fewest steps."""
        began = time.process_time()
        initial = self.world.initial()
        before: dict[bytes, bytes | None] = {initial: None}
        queue = deque([initial])
        transitions = [(each.needs, each.is_possible, each) for each in self.transitions]
        visited = 0
        collecting = gc.isenabled()
        gc.disable()
        try:
            while queue:
                state = queue.popleft()
                visited += 1
                rests = True
                for needs, is_possible, transition in transitions:
                    if state[needs] and is_possible(state):
                        rests = rests and transition.is_fault
                        changed = bytearray(state)
                        try:
                            transition.apply(changed)
                        except ViolationError as error:
                            return self._violation(error, before, state, transition, began)
                        after = bytes(changed)
                        if after not in before:
                            before[after] = state
                            queue.append(after)
                if rests:
                    try:
                        self.properties.at_rest(state, self.observers, self.consumers)
                    except ViolationError as error:
                        return self._violation(error, before, state, None, began)
        finally:
            if collecting:
                gc.enable()
        assert visited == len(before)
        missing = frozenset(self.scenario.reaches) - self.world.reached
        return Result(visited, time.process_time() - began, None, "", [], missing)

    def _violation(
        self,
        error: ViolationError,
        before: dict[bytes, bytes | None],
        state: bytes,
        last: Transition | None,
        began: float,
    ) -> Result:
        path = [state]
        while (earlier := before[path[-1]]) is not None:
            path.append(earlier)
        path.reverse()
        steps = [self._describe(first, second) for first, second in pairwise(path)]
        if last is not None:
            steps.append((last.actor, self._do(state, last)[1]))
        seconds = time.process_time() - began
        return Result(len(before), seconds, error.violated, str(error), steps, frozenset())

    def _describe(self, state: bytes, after: bytes) -> tuple[str, str]:
        """The transition that leads from one state to the next, in words."""
        for transition in self.transitions:
            if state[transition.needs] and transition.is_possible(state):
                changed, what = self._do(state, transition)
                if changed == after:
                    return transition.actor, what
        raise AssertionError("no transition leads to the next state")

    def _do(self, state: bytes, transition: Transition) -> tuple[bytes, str]:
        """Apply a transition and note what it does."""
        self.world.notes = []
        self.world.tracing = True
        changed = bytearray(state)
        with contextlib.suppress(ViolationError):
            transition.apply(changed)
        self.world.tracing = False
        return bytes(changed), "; ".join(self.world.notes)
