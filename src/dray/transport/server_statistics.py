"""The statistics of a server, and their JSON form, which answers STAT."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, TypeVar

from dray.errors import ProtocolError
from dray.ring import RingStatistics

_T = TypeVar("_T")
_WIRE_NAMES = {"double_releases": "late_finalises"}
"""Fields whose key in STAT is older than their name."""


@dataclass(frozen=True, slots=True)
class ServerCounters:
    """What has happened on the connections of a server since it was made.

    Attributes:
        connections: connections accepted.
        reads: payloads sent, or leased in place.
        bytes: their size; of a part of a payload, that of the part.
        acks_consumed: reads whose reader has consumed the payload.
        acks_returned: reads whose reader has released the payload.
        late_acks: acknowledgements whose read was not known (any more); a payload that they consume is consumed.
        consumed: CONSUMEs of payloads that were there.
        consumed_stale: CONSUMEs of payloads that were gone.
        stale: READs answered STALE.
        busy: READs answered BUSY.
        denied: READs answered DENIED.
        error: READs answered ERROR or UNSELECTABLE.
        malformed: connections closed because the client broke the protocol.
        other_versions: connections refused because the client offered a version that this server does not speak.
        failed_connections: connections that failed.
        auth_failures: connections whose client did not prove the secret, or is another user.
        evicted: connections closed because they were idle, or held a lease without progress, for too long.
        unproven_closed: connections closed because their proof of the secret was late, or newer ones displaced
            them.
        accept_failures: failures to accept a connection.
    """

    connections: int = 0
    reads: int = 0
    bytes: int = 0
    acks_consumed: int = 0
    acks_returned: int = 0
    late_acks: int = 0
    consumed: int = 0
    consumed_stale: int = 0
    stale: int = 0
    busy: int = 0
    denied: int = 0
    error: int = 0
    malformed: int = 0
    other_versions: int = 0
    failed_connections: int = 0
    auth_failures: int = 0
    evicted: int = 0
    unproven_closed: int = 0
    accept_failures: int = 0


COUNTED = tuple(field.name for field in dataclasses.fields(ServerCounters))


@dataclass(frozen=True, slots=True)
class LeaseInfo:
    """A live lease.

    Attributes:
        pid: the reader's process; None where the lane does not report it.
        slot: index of the slot.
        sequence: the payload's sequence number.
        reader: the reader's id.
        age: seconds since the reader's last message, or since bytes last travelled to it; of a direct lease, since
            the server found it first.
    """

    pid: int | None
    slot: int
    sequence: int
    reader: int
    age: float


@dataclass(frozen=True, slots=True)
class ServerStatistics:
    """A server at one moment.

    Attributes:
        producer: the ring's 16 random bytes.
        endpoints: the addresses that references carry.
        open_connections: connections that are open now.
        leases: live leases, those of the longest silent readers first; at most 200.
        counters: what has happened since the server was made.
        ring: the ring.
    """

    producer: bytes
    endpoints: tuple[str, ...]
    open_connections: int
    leases: tuple[LeaseInfo, ...]
    counters: ServerCounters
    ring: RingStatistics

    def to_dict(self) -> dict[str, Any]:
        """The values under their keys in STAT, ready for JSON."""
        return {
            "producer": self.producer.hex(),
            "endpoints": list(self.endpoints),
            "open_connections": self.open_connections,
            # Version 1 has an entry for each reader: `leases` counts what one entry stands for.
            "leases": [{**dataclasses.asdict(lease), "leases": 1} for lease in self.leases],
            "server": dataclasses.asdict(self.counters),
            "ring": {_WIRE_NAMES.get(key, key): value for key, value in dataclasses.asdict(self.ring).items()},
        }

    def to_json(self) -> str:
        """The text that answers STAT."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str | bytes) -> ServerStatistics:
        """Parse the answer to STAT; the text is untrusted.

        Unknown keys of a newer server are ignored. Counters that an older server does not have are 0, and its
        leases, which name no slot, are left out.

        Raises:
            ProtocolError: it is no such text; the message names the key.
        """
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"statistics must be JSON: {error}") from error
        if not isinstance(found, dict):
            raise ProtocolError("statistics must be a JSON object")
        producer, endpoints, leases = (found.get(key) for key in ("producer", "endpoints", "leases"))
        if not isinstance(endpoints, list) or not all(isinstance(each, str) for each in endpoints):
            raise _mistake("endpoints", endpoints)
        if not isinstance(leases, list):
            raise _mistake("leases", leases)
        try:
            identity = bytes.fromhex(producer)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise _mistake("producer", producer) from None
        return cls(
            identity,
            tuple(endpoints),
            _number("open_connections", found.get("open_connections"), "int"),
            tuple(_parse(LeaseInfo, "leases", each) for each in leases if not _is_older_lease(each)),
            _parse(ServerCounters, "server", found.get("server")),
            _parse(RingStatistics, "ring", found.get("ring")),
        )


def _is_older_lease(found: Any) -> bool:
    return isinstance(found, dict) and "slot" not in found


def _parse(kind: type[_T], key: str, found: Any) -> _T:
    """An instance of a dataclass of numbers."""
    if not isinstance(found, dict):
        raise _mistake(key, found)
    values = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        name = _WIRE_NAMES.get(field.name, field.name)
        if name in found or field.default is dataclasses.MISSING:
            values[field.name] = _number(f"{key}.{name}", found.get(name), str(field.type))
    return kind(**values)


def _number(key: str, found: Any, annotation: str) -> Any:
    """A value of the annotated type: ``int``, ``float``, or one of them ``| None``."""
    if found is None and annotation.endswith("| None"):
        return None
    if type(found) is int or (type(found) is float and annotation.startswith("float")):
        return found
    raise _mistake(key, found)


def _mistake(key: str, found: Any) -> ProtocolError:
    return ProtocolError(f"statistics: {key} = {found!r} is not allowed")
