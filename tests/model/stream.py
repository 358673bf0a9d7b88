"""The words that a producer shares with the consumers of its stream: credit, pending, given, begun.

The producer hands payloads out under one lock, so its threads are one actor here. A consumer begins one payload
after the other. Sending a frame and ringing the bell are system calls, which empty the buffer of their processor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from model.machine import Machine, State
from model.properties import ViolationError

_MESSAGES = 4
"""The messages that one direction of a connection holds; the search fails if a scenario needs more."""

_HAND_OUTS = 10

# Steps of the producer.
IDLE, READ_CREDIT, CHOOSE, ANNOUNCE, MARK, BARRIER, TIME, CLEAR, TIME_BARRIER, DECIDE = range(10)

# Steps of a consumer.
RAISE, ASK, RING, SLEEP, SPREAD, BEGIN, CHECK, WORK, ACKNOWLEDGE = range(9)


class StreamProperty(Enum):
    """The properties of streams, as the violations name them."""

    TWICE = "two programs have one payload, or one has it after it was consumed"
    EXCEEDED = "a consumer is given more than its credit"
    LOST_WAKE_UP = "a payload waits although a consumer has credit"
    LOST = "a payload is with no program, and does not wait"


@dataclass(frozen=True)
class StreamScenario:
    """One configuration.

    Attributes:
        name: how commands and defects refer to it.
        covers: what can happen at the same time.
        payloads: how many payloads the producer puts, in slots of their own unless there are fewer.
        consumers: how many consumers there are.
        slots: how many slots the ring has.
        spread: the credit of a consumer that works.
        late: how often the producer may take a payload back.
        crashes: consumers that may be killed between any two steps.
        reaches: events that must occur in the search.
        quick: `make test` searches it too.
    """

    name: str
    covers: str
    payloads: int = 2
    consumers: int = 1
    slots: int = 2
    spread: int = 0
    late: int = 0
    crashes: tuple[int, ...] = ()
    reaches: tuple[str, ...] = ()
    quick: bool = True


class StreamWorld(Machine):
    """The words of a scenario, and what producer, consumers and kernel know."""

    def __init__(self, scenario: StreamScenario) -> None:
        super().__init__()
        self.scenario = scenario
        self.reached: set[str] = set()
        self.always = self.variable("1", 1)
        consumers, slots = range(scenario.consumers), range(scenario.slots)
        self.credit = [self.variable(f"credit of consumer {c}") for c in consumers]
        self.pending = [self.variable(f"pending of consumer {c}") for c in consumers]
        self.given = [[self.variable(f"given {s} of consumer {c}") for s in slots] for c in consumers]
        self.begun = [[self.variable(f"begun {s} of consumer {c}") for s in slots] for c in consumers]
        self.bell = self.variable("bell")
        self.dead = self.variable("consumers that were killed")
        self.noticed = self.variable("consumers whose end is noticed")
        self.consumed = self.variable("consumed payloads")
        # To each consumer the numbers of hand-outs; from each the numbers of those that it returns.
        self.down = [self._queue(f"to consumer {c}") for c in consumers]
        self.up = [self._queue(f"from consumer {c}") for c in consumers]
        self.largest = [self.variable(f"largest credit of consumer {c}") for c in consumers]
        self.holds = [self.variable(f"payload with the program of consumer {c}") for c in consumers]

    def _queue(self, name: str) -> list[int]:
        return [self.variable(f"messages {name}"), *(self.variable(f"message {name}") for _ in range(_MESSAGES))]

    def send(self, state: State, queue: list[int], number: int) -> None:
        """Append a message."""
        state[queue[0]] += 1
        state[queue[state[queue[0]]]] = number
        if self.tracing:
            self.note(f"sends hand-out {number}")

    def receive(self, state: State, queue: list[int]) -> int:
        """Take the oldest message."""
        number, count = state[queue[1]], state[queue[0]]
        state[queue[1] : queue[1] + count] = state[queue[1] + 1 : queue[1] + count] + b"\0"
        state[queue[0]] = count - 1
        return number


class StreamProducer:
    """The producer. Its payloads are given out as in `dray.streams.delivery`."""

    name = "producer"

    def __init__(self, world: StreamWorld) -> None:
        self.world = world
        scenario = world.scenario
        self.consumers, self.payloads = range(scenario.consumers), range(scenario.payloads)
        self.processor = world.processor(self.name)
        self.step = world.variable("step of the producer")
        self.at = world.variable("consumer at which the producer is")
        self.best = world.variable("consumer with credit, plus 1")
        self.put = world.variable("payloads that were put")
        self.waiting = world.variable("payloads that wait")
        self.marked = world.variable("consumers know that payloads wait")
        self.numbers = world.variable("hand-outs so far")
        self.holder = [world.variable(f"holder of payload {p}, plus 1") for p in self.payloads]
        self.number = [world.variable(f"hand-out of payload {p}") for p in self.payloads]
        self.is_begun = world.variable("payloads that are begun")
        self.count = [world.variable(f"hand-outs to consumer {c}") for c in self.consumers]
        self.stalled = [world.variable(f"credit at which consumer {c} stalled, plus 1") for c in self.consumers]
        self.late = world.variable("payloads that were late")
        self.taken = world.variable("payload that is taken back")
        self.payload_of = [world.variable(f"payload of hand-out {n}") for n in range(_HAND_OUTS)]
        self.awaited = world.variable("consumers that the barrier has not reached")
        self.steps: dict[int, Callable[[State], None]] = {
            READ_CREDIT: self.read_credit, CHOOSE: self.choose, ANNOUNCE: self.announce, MARK: self.mark,
            TIME: self.time, CLEAR: self.clear, DECIDE: self.decide,
        }  # fmt: skip

    # --- what begins in IDLE ----------------------------------------------------------------------------------

    def can_step(self, state: bytes) -> bool:
        return state[self.step] in self.steps

    def do_step(self, state: State) -> None:
        self.steps[state[self.step]](state)

    def slot(self, payload: int) -> int:
        """The slot of a payload."""
        return payload % self.world.scenario.slots

    def can_put(self, state: bytes) -> bool:
        put, slots = state[self.put], self.world.scenario.slots
        if state[self.step] != IDLE or put == len(self.payloads):
            return False
        return put < slots or bool(state[self.world.consumed] >> put - slots & 1)

    def do_put(self, state: State) -> None:
        if self.world.tracing:
            self.world.note(f"puts payload {state[self.put]}")
        state[self.waiting] |= 1 << state[self.put]
        state[self.put] += 1
        self.begin_giving(state)

    def is_rung(self, state: bytes) -> bool:
        return state[self.step] == IDLE and state[self.world.bell] != 0

    def answer_bell(self, state: State) -> None:
        self.world.reached.add("bell")
        state[self.world.bell] = 0
        self.world.drain(state, self.processor)
        self.begin_giving(state)

    def can_receive(self, state: bytes, consumer: int) -> bool:
        return state[self.step] == IDLE and state[self.world.up[consumer][0]] > 0

    def receive(self, state: State, consumer: int) -> None:
        number = self.world.receive(state, self.world.up[consumer])
        for payload in self.payloads:
            if state[self.number[payload]] == number and state[self.holder[payload]] == consumer + 1:
                self.world.reached.add("returned")
                self.come_back(state, payload)
        self.begin_giving(state)

    def can_notice(self, state: bytes, consumer: int) -> bool:
        unnoticed = state[self.world.dead] & ~state[self.world.noticed]
        return state[self.step] == IDLE and bool(unnoticed >> consumer & 1)

    def notice(self, state: State, consumer: int) -> None:
        self.world.reached.add("redelivered")
        state[self.world.noticed] |= 1 << consumer
        for payload in self.payloads:
            if state[self.holder[payload]] == consumer + 1:
                self.come_back(state, payload)
        self.begin_giving(state)

    def can_be_late(self, state: bytes, payload: int) -> bool:
        return (
            state[self.step] == IDLE
            and state[self.holder[payload]] != 0
            and not state[self.is_begun] >> payload & 1
            and state[self.late] < self.world.scenario.late
        )

    def be_late(self, state: State, payload: int) -> None:
        state[self.late] += 1
        state[self.taken] = payload
        state[self.at] = 0
        state[self.step] = TIME

    # --- hand-outs --------------------------------------------------------------------------------------------

    def begin_giving(self, state: State) -> None:
        """See `Delivery._give`."""
        state[self.at] = state[self.best] = 0
        state[self.step] = READ_CREDIT if state[self.waiting] else MARK

    def allowance(self, state: State, consumer: int) -> int:
        """How many payloads a consumer may be given; one load."""
        credit = self.world.load(state, self.processor, self.world.credit[consumer])
        if state[self.stalled[consumer]] not in (0, credit + 1):
            state[self.stalled[consumer]] = 0
        return 0 if state[self.stalled[consumer]] else credit - state[self.count[consumer]]

    def read_credit(self, state: State) -> None:
        """The credit of one consumer."""
        consumer = state[self.at]
        if not state[self.world.noticed] >> consumer & 1 and self.allowance(state, consumer) > 0:
            state[self.best] = consumer + 1
        state[self.at] += 1
        if state[self.at] == len(self.consumers):
            state[self.step] = CHOOSE if state[self.best] else MARK
            state[self.at] = 0

    def next_payload(self, state: State) -> int:
        """The oldest payload that waits."""
        return (state[self.waiting] & -state[self.waiting]).bit_length() - 1

    def choose(self, state: State) -> None:
        """Give the oldest payload to the consumer: the word, then the frame."""
        consumer, payload = state[self.best] - 1, self.next_payload(state)
        if state[self.world.consumed] >> payload & 1:
            state[self.waiting] &= ~(1 << payload)
            self.begin_giving(state)
            return
        state[self.numbers] += 1
        self.world.store(
            state, self.processor, self.world.given[consumer][self.slot(payload)], state[self.numbers]
        )
        state[self.step] = ANNOUNCE

    def announce(self, state: State) -> None:
        world = self.world
        consumer, payload = state[self.best] - 1, self.next_payload(state)
        state[self.waiting] &= ~(1 << payload)
        state[self.holder[payload]] = consumer + 1
        state[self.number[payload]] = state[self.numbers]
        state[self.payload_of[state[self.numbers]]] = payload
        state[self.is_begun] &= ~(1 << payload)
        state[self.count[consumer]] += 1
        if state[self.count[consumer]] > state[world.largest[consumer]]:
            raise ViolationError(StreamProperty.EXCEEDED, f"consumer {consumer}")
        world.drain(state, self.processor)
        world.send(state, world.down[consumer], state[self.numbers])
        self.begin_giving(state)

    def mark(self, state: State) -> None:
        """Let the consumers know whether payloads wait; if so, read the credit again after a barrier."""
        left = int(state[self.waiting] != 0)
        if left == state[self.marked]:
            state[self.step] = IDLE
            return
        consumer = state[self.at]
        self.world.store(state, self.processor, self.world.pending[consumer], left)
        state[self.at] += 1
        if state[self.at] == len(self.consumers):
            state[self.marked] = left
            if left:
                self.begin_barrier(state, BARRIER)
            else:
                state[self.step] = IDLE

    # --- the barrier ------------------------------------------------------------------------------------------

    def begin_barrier(self, state: State, step: int) -> None:
        self.world.drain(state, self.processor)
        state[self.awaited] = (1 << len(self.consumers)) - 1
        state[self.step] = step

    def barrier_can_reach(self, state: bytes, consumer: StreamConsumer) -> bool:
        return bool(state[self.awaited] >> consumer.number & 1)

    def barrier_reaches(self, state: State, consumer: StreamConsumer) -> None:
        self.world.drain(state, consumer.processor)
        state[self.awaited] &= ~(1 << consumer.number)
        if not state[self.awaited]:
            if state[self.step] == BARRIER:
                self.world.reached.add("credit read again")
                self.begin_giving(state)
            else:
                state[self.step] = DECIDE

    # --- what is not begun in time ----------------------------------------------------------------------------

    def time(self, state: State) -> None:
        """Another consumer must have credit: the load of one of them."""
        consumer, payload = state[self.at], state[self.taken]
        other = consumer + 1 != state[self.holder[payload]] and not state[self.world.noticed] >> consumer & 1
        if other and self.allowance(state, consumer) > 0:
            state[self.step] = CLEAR
            return
        state[self.at] += 1
        if state[self.at] == len(self.consumers):
            state[self.step] = IDLE

    def clear(self, state: State) -> None:
        holder, payload = state[self.holder[state[self.taken]]] - 1, state[self.taken]
        self.world.store(state, self.processor, self.world.given[holder][self.slot(payload)], 0)
        self.begin_barrier(state, TIME_BARRIER)

    def decide(self, state: State) -> None:
        """It was begun meanwhile, or it is taken back."""
        world, payload = self.world, state[self.taken]
        holder, slot = state[self.holder[payload]] - 1, self.slot(payload)
        number = state[self.number[payload]]
        if world.load(state, self.processor, world.begun[holder][slot]) == number:
            world.reached.add("begun meanwhile")
            state[self.is_begun] |= 1 << payload
            world.store(state, self.processor, world.given[holder][slot], number)
            state[self.step] = IDLE
            return
        world.reached.add("taken back")
        state[self.stalled[holder]] = world.load(state, self.processor, world.credit[holder]) + 1
        self.come_back(state, payload)
        self.begin_giving(state)

    def come_back(self, state: State, payload: int) -> None:
        """A payload waits again, unless it is consumed."""
        state[self.holder[payload]] = state[self.number[payload]] = 0
        state[self.is_begun] &= ~(1 << payload)
        if not state[self.world.consumed] >> payload & 1:
            state[self.waiting] |= 1 << payload


class StreamConsumer:
    """A consumer that waits for payloads and acknowledges each."""

    def __init__(self, world: StreamWorld, producer: StreamProducer, number: int) -> None:
        self.world = world
        self.producer = producer
        self.number = number
        self.name = f"consumer {number}"
        self.processor = world.processor(self.name)
        self.step = world.variable(f"step of {self.name}")
        self.received = world.variable(f"hand-outs that {self.name} has received")
        self.current = world.variable(f"hand-out that {self.name} begins")
        self.payload = world.variable(f"payload that {self.name} begins")
        self.known = world.variable(f"credit that {self.name} has stored last")
        self.steps: list[Callable[[State], None]] = [
            self.raise_credit, self.ask, self.ring, self.receive, self.spread, self.begin, self.check, self.work,
            self.acknowledge,
        ]  # fmt: skip

    def can_step(self, state: bytes) -> bool:
        if state[self.world.dead] >> self.number & 1:
            return False
        return state[self.step] != SLEEP or state[self.world.down[self.number][0]] > 0

    def do_step(self, state: State) -> None:
        self.steps[state[self.step]](state)

    def set_credit(self, state: State, total: int) -> None:
        """Store the credit, if it changes."""
        if total != state[self.known]:
            state[self.known] = total
            self.world.store(state, self.processor, self.world.credit[self.number], total)
            largest = self.world.largest[self.number]
            state[largest] = max(state[largest], total)

    # --- a wait -----------------------------------------------------------------------------------------------

    def raise_credit(self, state: State) -> None:
        self.set_credit(state, state[self.received] + 1)
        state[self.step] = ASK

    def ask(self, state: State) -> None:
        pending = self.world.load(state, self.processor, self.world.pending[self.number])
        state[self.step] = RING if pending else SLEEP

    def ring(self, state: State) -> None:
        self.world.drain(state, self.processor)
        state[self.world.bell] = 1
        state[self.step] = SLEEP

    # --- a payload --------------------------------------------------------------------------------------------

    def receive(self, state: State) -> None:
        """Receive the next frame, and find out which payload it names."""
        number = self.world.receive(state, self.world.down[self.number])
        state[self.received] += 1
        state[self.current] = number
        state[self.step] = SPREAD

    def spread(self, state: State) -> None:
        self.set_credit(state, state[self.received] + self.world.scenario.spread)
        state[self.step] = BEGIN

    def slot(self, state: State) -> int:
        """The slot of the hand-out: the frame names it."""
        return self.producer.slot(state[self.producer.payload_of[state[self.current]]])

    def begin(self, state: State) -> None:
        word = self.world.begun[self.number][self.slot(state)]
        self.world.store(state, self.processor, word, state[self.current])
        state[self.step] = CHECK

    def check(self, state: State) -> None:
        word = self.world.given[self.number][self.slot(state)]
        if self.world.load(state, self.processor, word) == state[self.current]:
            self.hold(state)
        else:
            self.refuse(state)

    def hold(self, state: State) -> None:
        """The program gets the payload."""
        world = self.world
        payload = state[self.producer.payload_of[state[self.current]]]
        for other, place in enumerate(world.holds):
            if state[place] == payload + 1 and not state[world.dead] >> other & 1:
                raise ViolationError(StreamProperty.TWICE, f"payload {payload}")
        if state[world.consumed] >> payload & 1:
            raise ViolationError(StreamProperty.TWICE, f"payload {payload}")
        state[world.holds[self.number]] = payload + 1
        state[self.step] = WORK

    def refuse(self, state: State) -> None:
        """It was taken back: return it, in case the producer has left it here."""
        self.world.drain(state, self.processor)
        self.world.send(state, self.world.up[self.number], state[self.current])
        state[self.step] = RAISE

    def work(self, state: State) -> None:
        state[self.step] = ACKNOWLEDGE

    def acknowledge(self, state: State) -> None:
        holds = self.world.holds[self.number]
        self.world.drain(state, self.processor)
        state[self.world.consumed] |= 1 << state[holds] - 1
        state[holds] = 0
        state[self.step] = RAISE
