"""Which endpoint to try next, and for how long. Decides; never waits.

Quarantine and latencies last as long as a client, attempts as long as one read.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from dray.errors import ConfigError, OutOfResources, ProducerLostError, ServerBusy, TransportError, Unreachable
from dray.printable import printable
from dray.transport.lanes import parse_endpoint
from dray.transport.lanes.base import Lane

QUARANTINE_SECONDS = 30.0
MAX_QUARANTINE_GROWTH = 16
"""An endpoint that fails again and again is skipped for so many times the first quarantine at most."""
MAX_REMEMBERED = 1024
"""Endpoints whose failures are remembered; those that failed first are forgotten first."""
MOST_ATTEMPTS = 2

MIN_ATTEMPT_SECONDS = 1.0
"""An attempt has this long to connect and get its STATUS, however fast healthy endpoints are."""
UNKNOWN_ATTEMPT_SECONDS = 5.0
"""The same for a lane on which no endpoint has answered so far."""
MAX_LATENCY_FACTOR = 8.0
"""An attempt has so many times the latency of a slow healthy one."""
_LATENCY_WEIGHT = 0.1
"""How much of the way the slowest latency goes towards one that is lower."""


class Latencies:
    """How long healthy endpoints of each lane take to connect and to answer, and so how long to wait for one.

    The slowest of the last ones counts: one that is higher at once, lower ones little by little. Thread-safe: each
    step is one of a dict's.
    """

    def __init__(self) -> None:
        self._slowest: dict[Lane, float] = {}

    def answered(self, lane: Lane, seconds: float) -> None:
        """An endpoint of the lane took so long."""
        slowest = self._slowest.get(lane, 0.0)
        self._slowest[lane] = max(seconds, slowest + (seconds - slowest) * _LATENCY_WEIGHT)

    def bound(self, lane: Lane) -> float:
        """Seconds after which another endpoint is a better choice than to go on waiting."""
        slowest = self._slowest.get(lane)
        if slowest is None:
            return UNKNOWN_ATTEMPT_SECONDS
        return max(MIN_ATTEMPT_SECONDS, slowest * MAX_LATENCY_FACTOR)


class OtherProducerError(TransportError):
    """Another producer listens on the address; the one that was asked for may be found on another."""


class Quarantine:
    """Endpoints that are skipped for a while: those that failed lately, and those that do not exist on this host.

    Only the former are in quarantine; the latter belong to another host, where they may be healthy. One that fails
    again after its quarantine, and has not answered meanwhile, is in quarantine for twice as long, up to 16 times.
    Thread-safe: each step is one of a dict's.
    """

    def __init__(self, seconds: float = QUARANTINE_SECONDS) -> None:
        self.seconds = seconds
        self._until: dict[str, tuple[float, bool]] = {}
        self._terms: dict[str, float] = {}

    def failed(self, endpoint: str, now: float) -> None:
        """Skip the endpoint for a while, from now, in quarantine."""
        term = self._terms.get(endpoint)
        if term is None:
            term = self.seconds
        elif self.healthy(endpoint, now):  # within a quarantine, several readers may fail for one reason
            term = min(2 * term, MAX_QUARANTINE_GROWTH * self.seconds)
        self._terms[endpoint] = term
        self._until[endpoint] = now + term, True
        _forget_oldest(self._terms)
        _forget_oldest(self._until)

    def elsewhere(self, endpoint: str, now: float) -> None:
        """Skip the endpoint for a while, from now: it does not exist on this host."""
        self._until[endpoint] = now + self.seconds, False
        _forget_oldest(self._until)

    def answered(self, endpoint: str) -> None:
        """The endpoint is healthy, whatever it was before."""
        if self._terms.pop(endpoint, None) is not None:
            self._until.pop(endpoint, None)

    def term(self, endpoint: str) -> float:
        """Seconds of the endpoint's last quarantine."""
        return self._terms.get(endpoint, self.seconds)

    def healthy(self, endpoint: str, now: float) -> bool:
        """The endpoint is not to be skipped; one whose time is over is forgotten."""
        until, _ = self._until.get(endpoint, (None, False))
        if until is None:
            return True
        if now < until:
            return False
        self._until.pop(endpoint, None)
        return True

    @property
    def empty(self) -> bool:
        """No endpoint is to be skipped."""
        return not self._until

    def listed(self, now: float) -> list[str]:
        """The endpoints in quarantine."""
        return [e for e, (_, failed) in list(self._until.items()) if not self.healthy(e, now) and failed]


def _forget_oldest(remembered: dict[str, Any]) -> None:
    while len(remembered) > MAX_REMEMBERED:
        remembered.pop(next(iter(list(remembered))), None)


def is_elsewhere(error: TransportError) -> bool:
    """The endpoint does not exist on this host: that is no failure of it."""
    return isinstance(error, Unreachable) and error.elsewhere


def is_unusable(error: TransportError) -> bool:
    """This machine cannot use the endpoint's lane at all."""
    return isinstance(error, Unreachable) and error.lane_unusable


@functools.lru_cache(maxsize=1024)
def by_lane(endpoints: tuple[str, ...], lanes: tuple[Lane, ...]) -> tuple[tuple[str, ...], ...]:
    """The distinct endpoints of each lane that has any, in the order of `lanes`.

    What is no endpoint, or one of a later version, is left out where another one is on one of the lanes.

    Raises:
        ConfigError: no endpoint is on one of the lanes, and not all are endpoints.
    """
    found: dict[Lane, list[str]] = {lane: [] for lane in lanes}
    unusable = []
    for endpoint in dict.fromkeys(endpoints):
        try:
            lane = parse_endpoint(endpoint).lane
        except ConfigError as error:
            unusable.append(error)
        else:
            found.get(lane, []).append(endpoint)
    if unusable and not any(found.values()):
        raise ConfigError.of(unusable)
    return tuple(tuple(each) for each in found.values() if each)


class ReadAttempts:
    """Layer 1: the endpoints one read tries, in which order, and when it gives up.

    A read rotates over the endpoints of the best lane that has a healthy one, then over those of the next lane.
    A transport failure puts its endpoint in quarantine and uses up one of two attempts. An endpoint where no
    server listens, or another producer's, uses up none: it cannot hold the payload. If every endpoint is like
    that, the producer is lost. One that does not exist on this host is skipped without quarantine. Where this
    process has no descriptor or memory left for a lane, the other lanes are tried, without quarantine; that uses
    up none either.

    Args:
        endpoints: those that may be tried, as `by_lane` puts them; at least one.
        rotation: counts the client's reads, so that each begins with another endpoint.
    """

    def __init__(
        self,
        endpoints: Sequence[Sequence[str]],
        quarantine: Quarantine,
        rotation: int,
        most: int = MOST_ATTEMPTS,
    ) -> None:
        self._by_lane = endpoints
        self._quarantine = quarantine
        self._rotation = rotation
        self._left = most
        self._tried: set[str] = set()
        self._ruled_out: set[str] = set()

    @property
    def last(self) -> bool:
        """The next attempt is the last one: it gets all the time that is left."""
        return self._left == 1

    def has_other(self, endpoint: str, now: float) -> bool:
        """Another endpoint that has not been tried is healthy."""
        if not self._tried and self._quarantine.empty:
            return len(self._by_lane) > 1 or len(self._by_lane[0]) > 1
        return any(
            other != endpoint and other not in self._tried and self._quarantine.healthy(other, now)
            for lane in self._by_lane
            for other in lane
        )

    def choose(self, now: float) -> str:
        """The endpoint of the next attempt: one not tried yet, if possible a healthy one. Changes nothing."""
        if not self._tried and self._quarantine.empty:
            best = self._by_lane[0]
            return best[self._rotation % len(best)]
        for lane in self._by_lane:
            healthy = [e for e in lane if e not in self._tried and self._quarantine.healthy(e, now)]
            if healthy:
                return healthy[self._rotation % len(healthy)]
        fresh = ([e for e in lane if e not in self._tried] for lane in self._by_lane)
        possible = [e for lane in self._by_lane for e in lane if e not in self._ruled_out]
        for choice in (*fresh, possible):
            if choice:
                return choice[self._rotation % len(choice)]
        raise AssertionError("choose was called after give_up")

    def give_up(
        self, endpoint: str, error: TransportError, now: float
    ) -> TransportError | ProducerLostError | None:
        """Note a failed attempt: None to go on, else the error to raise."""
        if isinstance(error, OutOfResources):
            return self._lane_is_out(endpoint, error)
        if is_unusable(error) and len(self._by_lane) > 1:
            # No way to the producer from here: what the other lanes say is all that can be known of it.
            self._by_lane = [lane for lane in self._by_lane if endpoint not in lane]
        else:
            self._count(endpoint, error, now)
        asked = [e for lane in self._by_lane for e in lane]
        if self._ruled_out.issuperset(asked):
            return ProducerLostError(
                f"the producer is gone: nobody answers for it at {printable(', '.join(asked))}", endpoint=endpoint
            )
        return error if self._left == 0 else None

    def _count(self, endpoint: str, error: TransportError, now: float) -> None:
        """Note what a failed attempt says of its endpoint."""
        self._tried.add(endpoint)
        if isinstance(error, OtherProducerError) or (isinstance(error, Unreachable) and error.refused):
            self._ruled_out.add(endpoint)
        else:
            self._left -= 1
        if is_elsewhere(error):
            self._quarantine.elsewhere(endpoint, now)
        elif not isinstance(error, ServerBusy):
            self._quarantine.failed(endpoint, now)

    def _lane_is_out(self, endpoint: str, error: OutOfResources) -> OutOfResources | None:
        """This process cannot reach any endpoint of the lane: another lane is tried, which may need less."""
        self._tried.update(next(lane for lane in self._by_lane if endpoint in lane))
        return None if any(e not in self._tried for lane in self._by_lane for e in lane) else error
