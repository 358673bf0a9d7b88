"""The plan of a soak: its members and its faults with their times. One seed determines all of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


@dataclass(frozen=True, slots=True)
class ProducerPlan:
    """A producer: its ring, how fast it fills it, and what is done to it.

    Args:
        steady: it is neither killed nor ended, so that leaks have time to show.
        proxied: its first tcp endpoint is reached through the proxy.
        port: first port to try; if it is set, the next run of this producer listens where the last one did.
    """

    name: str
    slots: int
    slot_bytes: int
    on_full: str
    rate: float
    threads: int
    port: int
    proxied: bool
    steady: bool


@dataclass(frozen=True, slots=True)
class ConsumerPlan:
    """A consumer: how it reads, over which lanes (one run after the other), how slowly."""

    name: str
    roles: tuple[str, ...]
    lanes: tuple[str, ...]
    steady: bool


PRODUCERS = (
    ProducerPlan("p0", 8, 4 << 20, "block", 30, 2, 0, proxied=False, steady=True),
    ProducerPlan("p1", 6, 1 << 20, "overwrite", 50, 1, 42_000, proxied=True, steady=False),
    ProducerPlan("p2", 16, 256 << 10, "error", 80, 2, 0, proxied=True, steady=False),
)
CONSUMERS = (
    ConsumerPlan("c0", ("step",), ("auto",), steady=True),
    ConsumerPlan("c1", ("prefetch",), ("tcp",), steady=True),
    ConsumerPlan("c2", ("in_place",), ("shm", "shm", "ucx"), steady=False),
    ConsumerPlan("c3", ("handed_over",), ("ucx", "tcp", "shm"), steady=False),
    ConsumerPlan("c4", ("step", "prefetch", "handed_over"), ("ucx", "shm", "auto", "tcp"), steady=False),
)

DEAD_AFTER = 6.0
"""Seconds for which a consumer may be stopped before it is declared dead."""


class Fault(StrEnum):
    """What can happen."""

    KILL = "killed"
    END = "ended by SIGTERM"
    STOP = "stopped"
    BLACKHOLE = "endpoints blackholed"
    REJECT = "endpoints rejecting"
    PROXY_STALL = "proxy stalled"
    PROXY_RESET = "proxy reset"
    PROXY_TRUNCATE = "proxy truncated"
    REDIS_KILL = "Redis killed"


@dataclass(frozen=True, slots=True)
class Event:
    """A fault at a time.

    Args:
        at: seconds from the beginning.
        target: name of a producer or consumer; none for Redis.
        seconds: how long it lasts, or how long a killed process or server is away.
        same_name: a killed consumer comes back under its name, and is not declared dead.
        whole: all traffic of the producer is hit, not one endpoint.
    """

    at: float
    fault: Fault
    target: str = ""
    seconds: float = 0.0
    same_name: bool = False
    whole: bool = True


Make = Callable[[random.Random, float], Event]


@dataclass(frozen=True, slots=True)
class Plan:
    """A soak. The same arguments give the same plan."""

    seed: int
    seconds: float
    namespaces: bool
    producers: tuple[ProducerPlan, ...] = PRODUCERS
    consumers: tuple[ConsumerPlan, ...] = CONSUMERS
    events: tuple[Event, ...] = field(init=False)

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)
        events = [event for make, every in self._kinds() for event in self._series(rng, make, every)]
        object.__setattr__(self, "events", tuple(sorted(events, key=lambda event: event.at)))

    def document(self) -> dict[str, Any]:
        """The plan in JSON's types."""
        return asdict(self)

    def _kinds(self) -> list[tuple[Make, float]]:
        """Each kind of fault, and how many seconds pass between two of it on average."""
        kinds: list[tuple[Make, float]] = [
            (self._kill_producer, 12.0),
            (self._kill_consumer, 6.0),
            (self._end_member, 25.0),
            (self._stop_member, 6.0),
            (self._stop_for_long, 30.0),
            (self._proxy, 6.0),
            (self._kill_redis, 25.0),
        ]
        return [*kinds, (self._cut_network, 8.0)] if self.namespaces else kinds

    def _series(self, rng: random.Random, make: Make, every: float) -> list[Event]:
        # At least one of each kind, however short the soak.
        events, at = [], min(rng.expovariate(1 / every), self.seconds * rng.uniform(0.2, 0.8))
        while at < self.seconds:
            events.append(make(rng, at))
            at += 0.3 + rng.expovariate(1 / every)
        return events

    def _unsteady(self, members: Sequence[ProducerPlan | ConsumerPlan]) -> list[str]:
        return [member.name for member in members if not member.steady]

    def _kill_producer(self, rng: random.Random, at: float) -> Event:
        return Event(at, Fault.KILL, rng.choice(self._unsteady(self.producers)), rng.uniform(0.0, 2.0))

    def _kill_consumer(self, rng: random.Random, at: float) -> Event:
        name = rng.choice(self._unsteady(self.consumers))
        return Event(at, Fault.KILL, name, rng.uniform(0.0, 2.0), same_name=rng.random() < 0.3)

    def _end_member(self, rng: random.Random, at: float) -> Event:
        name = rng.choice(self._unsteady(self.producers) + self._unsteady(self.consumers))
        return Event(at, Fault.END, name, rng.uniform(0.0, 1.0))

    def _stop_member(self, rng: random.Random, at: float) -> Event:
        name = rng.choice([each.name for each in self.producers] + [each.name for each in self.consumers])
        return Event(at, Fault.STOP, name, rng.uniform(0.05, 3.0))

    def _stop_for_long(self, rng: random.Random, at: float) -> Event:
        return Event(
            at, Fault.STOP, rng.choice(self._unsteady(self.consumers)), DEAD_AFTER + rng.uniform(1.0, 4.0)
        )

    def _cut_network(self, rng: random.Random, at: float) -> Event:
        fault = Fault.REJECT if rng.random() < 0.35 else Fault.BLACKHOLE
        name = rng.choice([producer.name for producer in self.producers])
        return Event(at, fault, name, rng.uniform(0.3, 6.0), whole=rng.random() < 0.5)

    def _proxy(self, rng: random.Random, at: float) -> Event:
        fault = rng.choice([Fault.PROXY_STALL, Fault.PROXY_RESET, Fault.PROXY_TRUNCATE])
        name = rng.choice([producer.name for producer in self.producers if producer.proxied])
        return Event(at, fault, name, rng.uniform(0.3, 5.0))

    def _kill_redis(self, rng: random.Random, at: float) -> Event:
        return Event(at, Fault.REDIS_KILL, seconds=rng.choice([0.0, 0.2, 1.0, 3.0]))
