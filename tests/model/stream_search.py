"""Streams in the model: scenarios, planted defects, and the search over both."""

from __future__ import annotations

from functools import partial
from typing import Any, Final, NamedTuple, cast

from model.machine import State
from model.properties import ViolationError
from model.search import Model, Result, Transition
from model.stream import (
    BARRIER,
    DECIDE,
    IDLE,
    MARK,
    RAISE,
    RING,
    SLEEP,
    StreamConsumer,
    StreamProducer,
    StreamProperty,
    StreamScenario,
    StreamWorld,
)

SCENARIOS: Final = (
    StreamScenario(
        "stream-wake-up",
        "credit is raised while payloads begin to wait for it",
        payloads=3,
        slots=3,
        reaches=("bell", "credit read again"),
    ),
    StreamScenario(
        "stream-slots",
        "a slot is used again for the next hand-out",
        payloads=3,
        slots=1,
        spread=1,
        reaches=("credit read again",),
    ),
    StreamScenario(
        "stream-late",
        "a payload is begun while it is taken back for another consumer",
        payloads=1,
        consumers=2,
        slots=1,
        late=1,
        reaches=("begun meanwhile", "taken back", "returned"),
    ),
    StreamScenario(
        "stream-late-again",
        "the same, with a second payload in the same slot, and twice",
        payloads=2,
        consumers=2,
        slots=1,
        late=2,
        reaches=("begun meanwhile", "taken back", "returned"),
        quick=False,
    ),
    StreamScenario(
        "stream-crash",
        "a consumer is killed between any two steps",
        payloads=1,
        consumers=2,
        slots=1,
        late=1,
        crashes=(0,),
        reaches=("redelivered", "taken back"),
    ),
    StreamScenario(
        "stream-crash-waiting",
        "the same, while another payload waits",
        payloads=2,
        consumers=2,
        spread=1,
        crashes=(0,),
        reaches=("redelivered", "bell"),
        quick=False,
    ),
)


# --- defects ----------------------------------------------------------------------------------------------------


class NoBarrier(StreamProducer):
    """The credit is read again without a barrier before it."""

    def begin_barrier(self, state: State, step: int) -> None:
        if step == BARRIER:
            self.begin_giving(state)
        else:
            super().begin_barrier(state, step)


class CreditReadOnce(StreamProducer):
    """The credit is not read again after consumers know that payloads wait."""

    def mark(self, state: State) -> None:
        super().mark(state)
        if state[self.step] not in (MARK, IDLE):
            state[self.awaited] = 0
            state[self.step] = IDLE


class LateWithoutBarrier(StreamProducer):
    """A payload is taken back without a barrier."""

    def begin_barrier(self, state: State, step: int) -> None:
        if step == BARRIER:
            super().begin_barrier(state, step)
        else:
            state[self.step] = DECIDE


class LateWithoutBegun(StreamProducer):
    """A payload is taken back although it was begun meanwhile."""

    def decide(self, state: State) -> None:
        holder, slot = state[self.holder[state[self.taken]]] - 1, self.slot(state[self.taken])
        self.world.store(state, self.processor, self.world.begun[holder][slot], 0)
        super().decide(state)


class CreditIgnored(StreamProducer):
    """Payloads are given to consumers without credit."""

    def allowance(self, state: State, consumer: int) -> int:
        return 1 + 0 * super().allowance(state, consumer)


class DeadKeeps(StreamProducer):
    """What a consumer that has died was given does not come back."""

    def notice(self, state: State, consumer: int) -> None:
        state[self.world.noticed] |= 1 << consumer
        self.begin_giving(state)


class PendingFirst(StreamConsumer):
    """A consumer loads pending before it stores its credit."""

    def __init__(self, world: StreamWorld, producer: StreamProducer, number: int) -> None:
        super().__init__(world, producer, number)
        self.rings = world.variable(f"{self.name} has found payloads that wait")
        self.steps.append(self.raise_late)

    def raise_credit(self, state: State) -> None:
        state[self.rings] = self.world.load(state, self.processor, self.world.pending[self.number])
        state[self.step] = len(self.steps) - 1

    def raise_late(self, state: State) -> None:
        super().raise_credit(state)
        state[self.step] = RING if state[self.rings] else SLEEP


class GivenFirst(StreamConsumer):
    """A consumer checks that a payload is still given before it stores that it begins."""

    def __init__(self, world: StreamWorld, producer: StreamProducer, number: int) -> None:
        super().__init__(world, producer, number)
        self.steps.append(self.begin_late)

    def begin(self, state: State) -> None:
        word = self.world.given[self.number][self.slot(state)]
        if self.world.load(state, self.processor, word) == state[self.current]:
            state[self.step] = len(self.steps) - 1
        else:
            self.refuse(state)

    def begin_late(self, state: State) -> None:
        super().begin(state)
        self.hold(state)


class KeepsSilent(StreamConsumer):
    """A consumer that finds a payload taken back does not return it."""

    def refuse(self, state: State) -> None:
        state[self.step] = RAISE


class NoBell(StreamConsumer):
    """A consumer that raises its credit does not ring."""

    def ring(self, state: State) -> None:
        super().ring(state)
        state[self.world.bell] = 0


class StreamDefect(NamedTuple):
    """A change of the protocol; as `model.defects.Defect`."""

    name: str
    scenario: str
    violated: StreamProperty | None
    producer: type[StreamProducer] = StreamProducer
    consumer: type[StreamConsumer] = StreamConsumer

    @property
    def change(self) -> str:
        """What it changes."""
        changed = self.producer if self.producer is not StreamProducer else self.consumer
        return changed.__doc__ or ""


NO_DEFECT: Final = StreamDefect("none", "", None)

DEFECTS: Final = (
    StreamDefect("no-barrier-before-credit", "stream-wake-up", StreamProperty.LOST_WAKE_UP, NoBarrier),
    StreamDefect("credit-read-once", "stream-wake-up", StreamProperty.LOST_WAKE_UP, CreditReadOnce),
    StreamDefect("pending-before-credit", "stream-wake-up", StreamProperty.LOST_WAKE_UP, consumer=PendingFirst),
    StreamDefect("no-bell-with-credit", "stream-wake-up", StreamProperty.LOST_WAKE_UP, consumer=NoBell),
    StreamDefect("credit-ignored", "stream-wake-up", StreamProperty.EXCEEDED, CreditIgnored),
    StreamDefect("no-barrier-in-take-back", "stream-late", StreamProperty.TWICE, LateWithoutBarrier),
    StreamDefect("take-back-without-begun", "stream-late", StreamProperty.TWICE, LateWithoutBegun),
    StreamDefect("given-before-begun", "stream-late", StreamProperty.TWICE, consumer=GivenFirst),
    StreamDefect("taken-back-not-returned", "stream-late", StreamProperty.LOST, consumer=KeepsSilent),
    StreamDefect("dead-consumer-keeps", "stream-crash", StreamProperty.LOST, DeadKeeps),
)


# --- the search -------------------------------------------------------------------------------------------------


class StreamModel(Model):
    """A scenario with its actors, and at most one planted defect."""

    def __init__(self, scenario: StreamScenario, defect: StreamDefect = NO_DEFECT) -> None:
        self.scenario = cast(Any, scenario)
        self.streams = world = StreamWorld(scenario)
        self.world = cast(Any, world)
        self.producer = producer = defect.producer(world)
        self.receivers = [defect.consumer(world, producer, each) for each in range(scenario.consumers)]
        self.properties = cast(Any, self)
        self.observers, self.consumers = [], []
        self.transitions = self._stream_transitions()

    def _stream_transitions(self) -> list[Transition]:
        world, producer, always = self.streams, self.producer, self.streams.always
        found = [
            Transition(producer.name, always, producer.can_step, producer.do_step),
            Transition(producer.name, always, producer.can_put, producer.do_put),
            Transition(producer.name, world.bell, producer.is_rung, producer.answer_bell),
        ]
        for payload in producer.payloads:
            found.append(
                Transition(
                    "time",
                    producer.holder[payload],
                    partial(producer.can_be_late, payload=payload),
                    partial(producer.be_late, payload=payload),
                    True,
                )
            )
        for each in self.receivers:
            number = each.number
            found += [
                Transition(each.name, always, each.can_step, each.do_step),
                Transition(
                    producer.name,
                    producer.awaited,
                    partial(producer.barrier_can_reach, consumer=each),
                    partial(producer.barrier_reaches, consumer=each),
                ),
                Transition(
                    producer.name,
                    world.up[number][0],
                    partial(producer.can_receive, consumer=number),
                    partial(producer.receive, consumer=number),
                ),
            ]
        actors: list[StreamProducer | StreamConsumer] = [producer, *self.receivers]
        for actor in actors:
            found.append(
                Transition(
                    f"processor of {actor.name}",
                    world.stores(actor.processor),
                    partial(world.can_drain, processor=actor.processor),
                    partial(world.drain_one, processor=actor.processor),
                )
            )
        for crashed in world.scenario.crashes:
            found.append(
                Transition(
                    "kernel",
                    always,
                    partial(self.can_kill, consumer=crashed),
                    partial(self.kill, consumer=crashed),
                    True,
                )
            )
            found.append(
                Transition(
                    producer.name,
                    world.dead,
                    partial(producer.can_notice, consumer=crashed),
                    partial(producer.notice, consumer=crashed),
                )
            )
        return found

    def can_kill(self, state: bytes, consumer: int) -> bool:
        """A consumer is alive."""
        return not state[self.streams.dead] >> consumer & 1

    def kill(self, state: State, consumer: int) -> None:
        """A consumer dies: what it has sent arrives, and it receives nothing."""
        state[self.streams.dead] |= 1 << consumer

    def at_rest(self, state: bytes, observers: object, consumers: object) -> None:
        """Every payload is consumed, unless no consumer is left."""
        world, producer = self.streams, self.producer
        if state[world.dead] == (1 << world.scenario.consumers) - 1:
            return
        for payload in producer.payloads:
            if not state[world.consumed] >> payload & 1:
                waits = state[producer.waiting] >> payload & 1
                raise ViolationError(
                    StreamProperty.LOST_WAKE_UP if waits else StreamProperty.LOST, f"payload {payload}"
                )


def search(scenario: StreamScenario, defect: StreamDefect = NO_DEFECT) -> Result:
    """Search one scenario, with a defect or without."""
    return StreamModel(scenario, defect).search()


def scenario_named(name: str) -> StreamScenario:
    """The scenario of that name."""
    return next(scenario for scenario in SCENARIOS if scenario.name == name)
