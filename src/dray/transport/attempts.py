"""The attempts of a request: which endpoint is next, for how long, and when to give up. Decides; never waits.

A `Quarantine` and `Latencies` last as long as a client, `Attempts` as long as one request or batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from dray.clock import Deadline
from dray.errors import (
    ConfigError,
    ConnectionClosed,
    ConnectionReset,
    DrayError,
    OutOfResources,
    ProducerLostError,
    ServerBusy,
    TransportError,
    TransportTimeout,
    Unreachable,
)
from dray.protocol.ref import HEIR
from dray.text import printable
from dray.transport.lanes import parse_endpoint
from dray.transport.lanes.base import Lane

QUARANTINE_SECONDS = 30.0
MAX_QUARANTINE_GROWTH = 16
"""The longest quarantine of an endpoint that fails repeatedly, as a multiple of the first one."""
MAX_REMEMBERED = 1024
"""Endpoints whose failures are remembered; the oldest failures are forgotten first."""
MAX_ATTEMPTS = 2

MIN_ATTEMPT_SECONDS = 1.0
"""The least time that an attempt has to connect and get its STATUS."""
UNKNOWN_ATTEMPT_SECONDS = 5.0
"""The same on a lane on which no endpoint has answered so far."""
MAX_LATENCY_FACTOR = 8.0
"""An attempt may take this many times the latency of a slow healthy endpoint."""
_LATENCY_WEIGHT = 0.1
"""How much of the difference to a lower latency is taken over with each answer."""

_NONE: frozenset[str] = frozenset()


class OtherProducerError(TransportError):
    """Another producer listens at the address; the requested one may be found at another address."""


class Latencies:
    """How long healthy endpoints of each lane take to connect and answer.

    A higher latency counts at once, lower ones gradually. Thread-safe: each step is one of a dict's.
    """

    def __init__(self) -> None:
        self._slowest: dict[Lane, float] = {}

    def add(self, lane: Lane, seconds: float) -> None:
        """Note the latency of one answer."""
        slowest = self._slowest.get(lane, 0.0)
        self._slowest[lane] = seconds if seconds > slowest else slowest + (seconds - slowest) * _LATENCY_WEIGHT

    def bound(self, lane: Lane) -> float:
        """Seconds after which another healthy endpoint is the better choice."""
        slowest = self._slowest.get(lane)
        if slowest is None:
            return UNKNOWN_ATTEMPT_SECONDS
        return max(MIN_ATTEMPT_SECONDS, slowest * MAX_LATENCY_FACTOR)


class Quarantine:
    """Endpoints that are skipped for a while: because they failed, or because they do not exist on this host.

    Only the former are in quarantine; the latter belong to another host, where they may be healthy. An endpoint
    that fails again after its quarantine, without an answer in between, is skipped for twice as long, up to 16
    times the first term. Each step is one of a dict's, so any thread may read; `fail` needs its owner's lock.
    """

    def __init__(self, seconds: float = QUARANTINE_SECONDS) -> None:
        self.seconds = seconds
        self._until: dict[str, tuple[float, bool]] = {}
        self._terms: dict[str, float] = {}

    def fail(self, endpoint: str, now: float) -> float:
        """Put an endpoint into quarantine; for how many seconds."""
        term = self._terms.get(endpoint)
        if term is None:
            term = self.seconds
        elif self.healthy(endpoint, now):  # within a quarantine, several threads may fail for one reason
            term = min(2 * term, MAX_QUARANTINE_GROWTH * self.seconds)
        self._terms[endpoint] = term
        self._until[endpoint] = now + term, True
        _forget_oldest(self._terms)
        _forget_oldest(self._until)
        return term

    def skip(self, endpoint: str, now: float) -> float:
        """Skip an endpoint that does not exist on this host; for how many seconds."""
        self._until[endpoint] = now + self.seconds, False
        _forget_oldest(self._until)
        return self.seconds

    def clear(self, endpoint: str) -> None:
        """End the quarantine of an endpoint that has answered."""
        if self._terms and self._terms.pop(endpoint, None) is not None:
            self._until.pop(endpoint, None)

    def healthy(self, endpoint: str, now: float) -> bool:
        """The endpoint is not skipped. One whose time has passed is forgotten."""
        until, _ = self._until.get(endpoint, (None, False))
        if until is None:
            return True
        if now < until:
            return False
        self._until.pop(endpoint, None)
        return True

    @property
    def empty(self) -> bool:
        """No endpoint is skipped."""
        return not self._until

    def endpoints(self, now: float) -> tuple[str, ...]:
        """The endpoints in quarantine."""
        return tuple(e for e, (_, failed) in list(self._until.items()) if not self.healthy(e, now) and failed)

    def __repr__(self) -> str:
        return f"<Quarantine of {', '.join(self._until) or 'no endpoint'}>"


def _forget_oldest(remembered: dict[str, Any]) -> None:
    while len(remembered) > MAX_REMEMBERED:
        remembered.pop(next(iter(list(remembered))), None)


def is_elsewhere(error: DrayError) -> bool:
    """The endpoint does not exist on this host, which is no failure of it."""
    return isinstance(error, Unreachable) and error.elsewhere


def is_unusable(error: DrayError) -> bool:
    """This machine cannot use the endpoint's lane at all."""
    return isinstance(error, Unreachable) and error.lane_unusable


@functools.lru_cache(maxsize=1024)
def by_lane(endpoints: tuple[str, ...], lanes: tuple[Lane, ...]) -> tuple[tuple[str, ...], ...]:
    """The distinct endpoints of each lane that has any, in the order of `lanes`.

    An address that is no endpoint, or one of a later version, is left out if another one is on one of the lanes.

    Raises:
        ConfigError: no endpoint is on one of the lanes, and not all are endpoints.
    """
    found: dict[Lane, list[str]] = {lane: [] for lane in lanes}
    unusable = []
    for endpoint in dict.fromkeys(endpoints):
        if endpoint.startswith(HEIR):
            continue
        try:
            lane = parse_endpoint(endpoint).lane
        except ConfigError as error:
            unusable.append(error)
        else:
            found.get(lane, []).append(endpoint)
    if unusable and not any(found.values()):
        raise ConfigError.of(unusable)
    return tuple(tuple(each) for each in found.values() if each)


@functools.lru_cache(maxsize=1024)
def heirs_by_lane(endpoints: tuple[str, ...], lanes: tuple[Lane, ...]) -> tuple[tuple[str, ...], ...]:
    """As `by_lane`, the addresses of the producer's heir without their prefix; empty if there is none."""
    heirs = tuple(each.removeprefix(HEIR) for each in endpoints if each.startswith(HEIR))
    try:
        return by_lane(heirs, lanes)
    except ConfigError:  # of a later version
        return ()


class Failure(NamedTuple):
    """What follows a failed attempt.

    It is the `final` error of the request, or the endpoint of the `following` attempt. The failed endpoint is
    skipped for `quarantine` seconds.
    """

    final: DrayError | None
    following: str | None
    quarantine: float


class Attempts:
    """The attempts of one request or batch at the endpoints of one producer.

    They rotate over the endpoints of the best lane that has a healthy one, then over those of the next lane. A
    transport failure puts its endpoint into quarantine and uses up one of two attempts. An endpoint where no
    server listens, or another producer's, uses up none, because it cannot hold the payload; if every endpoint is
    like that, the producer is lost. An endpoint that does not exist on this host is skipped without quarantine.
    If this process has no descriptor or memory left for a lane, the other lanes are tried; that uses up none and
    causes no quarantine. The producer's heir is asked where the producer would be lost otherwise, or
    where the last attempt found a connection that has broken, which may be the first sign of the producer's death.

    Args:
        producer: the id of the producer.
        endpoints: the endpoints that may be tried, as `by_lane` orders them; at least one.
        heirs: those of its heir, as `heirs_by_lane` orders them.
        deadline: for the whole request or batch.
        quarantine, latencies: those of the client.
        rotation: the number of the request, so that each begins with another endpoint.
        attempts: how many transport failures end the request.

    Attributes:
        endpoint: where the present or last attempt is made.
        status_deadline: when the present attempt must have connected and received its first STATUS.
        under_way: an attempt has begun and has not failed.
    """

    __slots__ = (
        "_by_lane", "_heirs", "_latencies", "_left", "_quarantine", "_rotation", "_ruled_out", "_tried",
        "deadline", "endpoint", "producer", "status_deadline", "under_way",
    )  # fmt: skip

    def __init__(
        self,
        producer: bytes,
        endpoints: Sequence[Sequence[str]],
        deadline: Deadline,
        *,
        heirs: Sequence[Sequence[str]] = (),
        quarantine: Quarantine,
        latencies: Latencies,
        rotation: int = 0,
        attempts: int = MAX_ATTEMPTS,
    ) -> None:
        self.producer = producer
        self.deadline = deadline
        self.endpoint = ""
        self.status_deadline = deadline
        self.under_way = False
        self._by_lane = endpoints
        self._heirs = heirs
        self._quarantine = quarantine
        self._latencies = latencies
        self._rotation = rotation
        self._left = attempts
        self._tried = self._ruled_out = _NONE

    @property
    def last(self) -> bool:
        """No attempt follows the next one, or the present one, if that fails."""
        return self._left == 1

    def end(self) -> None:
        """Make the present attempt the last one."""
        self._left = 1

    def begin(self, now: float) -> None:
        """Begin the next attempt.

        The last attempt gets all the time that is left, any other half of it. If another endpoint is healthy and
        not tried so far, the latencies of the lane limit that further, so that a wedged endpoint costs little.

        Raises:
            TransportTimeout: the deadline has passed.
        """
        deadline = self.deadline
        if not self._tried and self._quarantine.empty:  # as below, faster
            best = self._by_lane[0]
            self.endpoint = endpoint = best[self._rotation % len(best)]
            other = len(best) > 1 or len(self._by_lane) > 1
        else:
            self.endpoint = endpoint = self.choose(now)
            other = self.has_other(endpoint, now)
        if now >= deadline.at:
            raise TransportTimeout("no time is left to ask", endpoint=endpoint, elapsed=deadline.elapsed)
        self.under_way = True
        if self._left == 1:
            self.status_deadline = deadline
        else:
            bound = self._latencies.bound(parse_endpoint(endpoint).lane) if other else math.inf
            self.status_deadline = deadline.fraction(0.5, now, bound)

    def has_other(self, endpoint: str, now: float) -> bool:
        """Another endpoint that has not been tried is healthy."""
        return any(
            other != endpoint and other not in self._tried and self._quarantine.healthy(other, now)
            for lane in self._by_lane
            for other in lane
        )

    def choose(self, now: float) -> str:
        """The endpoint of the next attempt: one not tried yet, if possible a healthy one. Changes nothing."""
        for lane in self._by_lane:
            healthy = [e for e in lane if e not in self._tried and self._quarantine.healthy(e, now)]
            if healthy:
                return healthy[self._rotation % len(healthy)]
        fresh = ([e for e in lane if e not in self._tried] for lane in self._by_lane)
        possible = [e for lane in self._by_lane for e in lane if e not in self._ruled_out]
        for choice in (*fresh, possible):
            if choice:
                return choice[self._rotation % len(choice)]
        raise AssertionError("choose was called after the last attempt")

    def succeed(self, lane: Lane, latency: float | None) -> None:
        """Note that an attempt has succeeded, and how long its first answer took, if that is known."""
        if latency is not None:
            self._latencies.add(lane, latency)
        self._quarantine.clear(self.endpoint)

    def fail(self, endpoint: str, error: TransportError, now: float) -> Failure:
        """Note that an attempt has failed."""
        self.under_way = False
        final, quarantine = self._fail(endpoint, error, now)
        if final is None and now >= self.deadline.at and not is_unusable(error):
            final = error
        return Failure(final, self.choose(now) if final is None else None, quarantine)

    def _fail(self, endpoint: str, error: TransportError, now: float) -> tuple[DrayError | None, float]:
        if isinstance(error, OutOfResources):  # no endpoint of the lane can be reached; another lane may need less
            self._tried = self._tried.union(next(lane for lane in self._by_lane if endpoint in lane))
            fresh = any(e not in self._tried for lane in self._by_lane for e in lane)
            return None if fresh else error, 0.0
        quarantine = 0.0
        if is_unusable(error) and len(self._by_lane) > 1:
            # This lane never leads to the producer from here; the other lanes decide whether it is lost.
            self._by_lane = [lane for lane in self._by_lane if endpoint not in lane]
        else:
            self._tried = self._tried | {endpoint}
            if isinstance(error, OtherProducerError) or (isinstance(error, Unreachable) and error.refused):
                self._ruled_out = self._ruled_out | {endpoint}
            else:
                self._left -= 1
            if is_elsewhere(error):
                quarantine = self._quarantine.skip(endpoint, now)
            elif not isinstance(error, ServerBusy):
                quarantine = self._quarantine.fail(endpoint, now)
        gone = self._ruled_out.issuperset(e for lane in self._by_lane for e in lane)
        if self._heirs and (gone or (self._left == 0 and isinstance(error, ConnectionReset | ConnectionClosed))):
            self._by_lane, self._heirs = [*self._by_lane, *self._heirs], ()
            self._left = max(self._left, 1)
        asked = [e for lane in self._by_lane for e in lane]
        if self._ruled_out.issuperset(asked):
            where = printable(", ".join(asked))
            lost = ProducerLostError(
                f"the producer is gone: no server answers for it at {where}", endpoint=endpoint
            )
            return lost, quarantine
        return error if self._left == 0 else None, quarantine

    def __repr__(self) -> str:
        return f"<Attempts: {self._left} left, tried {', '.join(self._tried) or 'none'}>"
