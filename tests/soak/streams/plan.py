"""What a storm is made of: the plans of its rounds and of its processes, drawn from a seed."""

from __future__ import annotations

import random
import signal
from dataclasses import dataclass
from enum import Enum
from typing import Final

MAX_EACH: Final = 8
"""Producers and consumers of a round, at most."""

BLOCKED: Final = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that a new process must not get before it has handlers for them."""

SECRET: Final = b"a secret of the storm: 32 bytes."
LONG_STOP_SECONDS: Final = 33.0
"""A consumer that is stopped so long loses what it has not begun."""


class Fault(Enum):
    """What the supervisor does to a process."""

    KILL_CONSUMER = "consumers killed"
    KILL_PRODUCER = "producers killed"
    STOP_CONSUMER = "consumers stopped"
    STOP_PRODUCER = "producers stopped"
    END_CONSUMER = "consumers ended"
    END_PRODUCER = "producers ended"
    INTERRUPT_PRODUCER = "producers interrupted"
    START_CONSUMER = "consumers that joined"
    START_PRODUCER = "producers that joined"


WEIGHTS: Final = {
    Fault.KILL_CONSUMER: 6, Fault.KILL_PRODUCER: 2, Fault.STOP_CONSUMER: 3, Fault.STOP_PRODUCER: 2,
    Fault.END_CONSUMER: 2, Fault.END_PRODUCER: 1, Fault.INTERRUPT_PRODUCER: 3, Fault.START_CONSUMER: 2,
    Fault.START_PRODUCER: 1,
}  # fmt: skip


class Way(Enum):
    """How the processes of a round find each other."""

    STEADY = "by name, with the steady ones"
    NAME = "by a name of their own"
    TCP = "by tcp addresses"


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """One round.

    Attributes:
        index: its number.
        seed: of the faults.
        way: how the processes find each other.
        seconds: how long faults come.
        producers, consumers: how many there are at its start.
        groups: those of its producers.
        faults: how many each second.
        long_stop: a consumer is stopped for longer than 30 s.
    """

    index: int
    seed: int
    way: Way
    seconds: float
    producers: int
    consumers: int
    groups: tuple[str, ...]
    faults: float
    long_stop: bool = False

    @property
    def name(self) -> str:
        """The name of its stream."""
        return "storm" if self.way is Way.STEADY else f"round-{self.index}"


def draw_round(rng: random.Random, index: int, ways: tuple[Way, ...], most: float) -> RoundPlan:
    """The next round, of at most so many seconds."""
    way = ways[index % len(ways)] if index < len(ways) else rng.choice(ways)
    groups = ("default",) if way is Way.STEADY or rng.random() < 0.3 else ("default", "log")
    return RoundPlan(
        index, rng.getrandbits(40), way, min(most, rng.uniform(6.0, 14.0)),
        producers=rng.randint(1, MAX_EACH), consumers=rng.randint(len(groups), MAX_EACH), groups=groups,
        faults=rng.choice((1.0, 3.0, 8.0)), long_stop=most > 60.0 and rng.random() < 0.1,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ProducerPlan:
    """A producer's process.

    Attributes:
        key: names it in the contents of its payloads.
        stream, scope: where it is found.
        groups: its groups.
        seed: of what it puts.
        listen: an address for consumers elsewhere.
        steady: it runs through all rounds, and pauses between them.
    """

    key: int
    stream: str
    scope: str
    groups: tuple[str, ...]
    seed: int
    listen: str = ""
    steady: bool = False


@dataclass(frozen=True, slots=True)
class ConsumerPlan:
    """A consumer's process.

    Attributes:
        key: names it in reports.
        stream: the name, or addresses.
        scope: where the name is known.
        group: its group.
        seed: of what it does.
        steady: it runs through all rounds, with one consumer.
    """

    key: int
    stream: str | tuple[str, ...]
    scope: str
    group: str
    seed: int
    steady: bool = False

    @property
    def by_address(self) -> bool:
        """It reaches producers at addresses."""
        return not isinstance(self.stream, str)
