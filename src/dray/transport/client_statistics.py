"""What a client counts, and the one place where the events of its connections are counted and logged."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dray.errors import (
    ConnectionClosed,
    ConnectionReset,
    DrayError,
    MessageTruncated,
    OutOfResources,
    ServerBusy,
    TransportTimeout,
    Unreachable,
)
from dray.transport.attempts import OtherProducerError, is_elsewhere, is_unusable
from dray.transport.connection import Connection
from dray.transport.lanes import SHM, parse_endpoint
from dray.transport.trace import Connect, FailedAttempt, Trace, TraceEvent

logger = logging.getLogger("dray.client")

MAX_WARNED = 1024
"""Endpoints whose first failure is remembered, so that only the first is a warning."""

RETRY_CAUSES: dict[type[DrayError], str] = {
    TransportTimeout: "timeout",
    ConnectionReset: "reset",
    ConnectionClosed: "closed",
    MessageTruncated: "truncated",
    Unreachable: "unreachable",
    OutOfResources: "out_of_resources",
    ServerBusy: "busy",
    OtherProducerError: "other_producer",
}
"""What a retry is counted as, by the error before it."""


@dataclass(frozen=True)
class ClientStatistics:
    """The counters of a `PayloadClient`, which only grow, and its state now.

    Attributes:
        reads, bytes: payloads that were handed out, and their size.
        reads_by_lane: the payloads by the name of the lane they came over.
        direct_reads: those of the shm lane that were leased without asking the server.
        failed_reads: references of batches that could not be read.
        consumed: payloads that `consume` has freed.
        retries: attempts after a failed one.
        retries_by_cause: the same by how the attempt before failed: ``timeout``, ``reset``, ``closed``,
            ``truncated``, ``unreachable``, ``out_of_resources``, ``busy`` or ``other_producer``.
        elsewhere: endpoints that were skipped because they do not exist on this host.
        connects: connections that were opened.
        connections_given_up: idle connections that were closed to free descriptors for another one.
        acks_replayed: acknowledgements that were sent again because their connection had failed.
        leases_ended_late: leases whose end could not be sent; they end with their connection.
        open_connections, idle_connections: connections now, and how many of them no call uses.
        unconfirmed_acks: acknowledgements of closed connections that are still to be sent again.
        quarantined: the endpoints in quarantine now.
    """

    reads: int
    bytes: int
    reads_by_lane: Mapping[str, int]
    direct_reads: int
    failed_reads: int
    consumed: int
    retries: int
    retries_by_cause: Mapping[str, int]
    elsewhere: int
    connects: int
    connections_given_up: int
    acks_replayed: int
    leases_ended_late: int
    open_connections: int
    idle_connections: int
    unconfirmed_acks: int
    quarantined: tuple[str, ...]


class Recorder:
    """Counts and logs the events of a client, and passes them on. Thread-safe.

    Args:
        trace: receives the events.
    """

    def __init__(self, trace: Trace | None) -> None:
        self._trace = trace
        self._lock = threading.Lock()  # guards all that follows
        self._counts: Counter[str] = Counter()
        self._reads: Counter[str] = Counter()  # over connections that are closed, by lane
        self._retries: Counter[str] = Counter()
        self._warned: dict[str, None] = {}  # endpoints and lanes that a warning has named

    def report(self, event: TraceEvent) -> None:
        """Count and log an event, and pass it on."""
        if isinstance(event, Connect):
            self.count("connects")
        elif isinstance(event, FailedAttempt):
            self._report_failure(event)
        if self._trace is not None:
            self._trace(event)

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a counter of `ClientStatistics`."""
        with self._lock:
            self._counts[name] += amount

    def add_reads(self, connection: Connection) -> None:
        """Keep what a connection has counted, which is closed."""
        with self._lock:
            self._reads[connection.lane.name] += connection.reads
            self._counts["bytes"] += connection.read_bytes

    def statistics(
        self, connections: Collection[Connection], *, direct: tuple[int, int], **others: Any
    ) -> ClientStatistics:
        """The statistics, with what open connections have counted, and figures that are counted elsewhere.

        `direct` are the direct reads and their size.
        """
        with self._lock:
            counts, reads, retries = self._counts.copy(), self._reads.copy(), dict(self._retries)
        for connection in connections:
            reads[connection.lane.name] += connection.reads
            counts["bytes"] += connection.read_bytes
        direct_reads, direct_bytes = direct
        reads[SHM.name] += direct_reads
        counts["bytes"] += direct_bytes
        return ClientStatistics(
            direct_reads=direct_reads,
            reads=reads.total(),
            bytes=counts["bytes"],
            reads_by_lane=dict(+reads),
            retries=sum(retries.values()),
            retries_by_cause=retries,
            elsewhere=counts["elsewhere"],
            connects=counts["connects"],
            connections_given_up=counts["connections_given_up"],
            acks_replayed=counts["acks_replayed"],
            leases_ended_late=counts["leases_ended_late"],
            open_connections=len(connections),
            **others,
        )

    def _report_failure(self, event: FailedAttempt) -> None:
        error, lane, following = event.error, parse_endpoint(event.endpoint).lane, event.following or "none"
        if is_elsewhere(error):
            self.count("elsewhere")
            logger.debug("%s does not exist on this host; next attempt: %s", event.endpoint, following)
            return
        unusable = is_unusable(error)
        with self._lock:
            if event.following is not None and not unusable:
                self._retries[RETRY_CAUSES[type(error)]] += 1
            warned = lane.name if unusable else event.endpoint
            known = warned in self._warned
            self._warned[warned] = None
            while len(self._warned) > MAX_WARNED:
                del self._warned[next(iter(self._warned))]
        if not unusable:
            logger.log(
                logging.DEBUG if known else logging.WARNING,
                "attempt at %s failed: %s: %s; quarantine: %g s; next attempt: %s",
                event.endpoint,
                type(error).__name__,
                str(error),  # not the error, whose frames a kept record would keep
                event.quarantine,
                following,
            )
        elif not known:
            logger.warning("this client cannot use the %s lane: %s", lane.name, error.message)
