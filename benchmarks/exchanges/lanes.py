"""dray's lanes: a `PayloadServer` in another process, a `PayloadClient` in this one."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal

from benchmarks.exchanges.payloads import MANY, many_fields, one_array, six_fields
from benchmarks.partner import Partner
from benchmarks.plan import LaneName
from benchmarks.service import Reply
from dray import PayloadClient, PayloadRef, PayloadServer, SharedRingBuffer

READ_SECONDS = 60.0

How = Literal["read", "lease", "lease_bytes", "read_many", "read_many_bytes"]


class PayloadService:
    """Puts payloads into a ring on request, and serves them on one lane."""

    def __init__(self) -> None:
        self._opened = ExitStack()
        self._arrays: dict[str, Any] = {}
        self._server: PayloadServer | None = None

    def do(self, command: str, **arguments: Any) -> Reply:
        if command == "open":
            self._open(**arguments)
            return Reply({})
        if command == "put":
            assert self._server is not None
            refs = [self._server.put(self._arrays, timeout=READ_SECONDS) for _ in range(arguments["count"])]
            return Reply({"refs": [ref.to_json() for ref in refs]})
        if command == "connections":
            assert self._server is not None
            return Reply({"open": self._server.statistics().open_connections})
        self.close()
        return Reply({})

    def close(self) -> None:
        self._server = None
        self._opened.close()

    def _open(self, nbytes: int, slots: int, lane: LaneName, checksum: bool, fields: int = 1) -> None:
        make = {1: one_array, 6: six_fields, MANY: many_fields}[fields]
        self._arrays = make(nbytes)
        ring = self._opened.enter_context(SharedRingBuffer(slots, nbytes, prefault=True))
        self._server = self._opened.enter_context(
            PayloadServer(ring, lane=(lane,), threads=1, checksum=checksum, drain_timeout=1.0)
        )


class IdleReaderService:
    """Opens many connections to a server and then leaves them alone."""

    def __init__(self) -> None:
        self._opened = ExitStack()

    def do(self, command: str, **arguments: Any) -> Reply:
        refs = [PayloadRef.from_json(text) for text in arguments["refs"]]
        # Direct leases need no connections.
        client = PayloadClient(lane=arguments["lane"], max_idle=len(refs), direct=False)
        self._opened.enter_context(client)
        with ExitStack() as held:
            # Payloads held at the same time are held on as many connections.
            for ref in refs:
                held.enter_context(client.lease(ref, timeout=READ_SECONDS))
        return Reply({})

    def close(self) -> None:
        self._opened.close()


class ClientSide:
    """A client of a server in another process, the partner."""

    def __init__(self, partner: Partner) -> None:
        self._partner = partner
        self._client: PayloadClient | None = None

    def shut(self) -> None:
        """Close the client, and what the partner has opened."""
        self._close_client()
        self._partner.ask("shut")

    def close(self) -> None:
        """Close the client and the partner."""
        self._close_client()
        self._partner.close()

    def _close_client(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


class LaneRead(ClientSide):
    """Read payloads over one lane; each was put just before, and is consumed.

    Args:
        lane: which lane.
        how: ``"read"`` copies into memory of its own, ``"lease"`` and ``"lease_bytes"`` use the slot in place and
            copy nothing; ``"read_many"`` and ``"read_many_bytes"`` read a whole batch in one operation.
        checksum: whether the server sends checksums (and the client verifies them).
        fields: 1 or 6 arrays in a payload.
        name: as the report calls it.
        kind: the service that puts the payloads.
        descriptors: what that service gets.
    """

    def __init__(
        self,
        lane: LaneName,
        how: How = "read",
        *,
        checksum: bool = False,
        fields: Literal[1, 6] = 1,
        name: str = "",
        kind: str = "payloads",
        descriptors: Sequence[int] = (),
    ) -> None:
        in_place = {"lease": f"{lane} in place", "lease_bytes": f"{lane} in place, as bytes"}
        plain = lane if how == "read" else in_place.get(how, f"{lane} {how}")
        self.name = name or (f"{plain} with checksum" if checksum else plain)
        self._lane = lane
        self._served = {"checksum": checksum, "fields": fields}
        super().__init__(Partner(kind, descriptors))
        self._refs: deque[PayloadRef] = deque()
        self._how = how
        ways = {"read": self._read, "lease": self._lease, "lease_bytes": self._lease_bytes}
        self.once = ways.get(how, self._read_batch)

    def open(self, nbytes: int, batch: int) -> None:
        self._partner.ask("open", nbytes=nbytes, slots=batch, lane=self._lane, **self._served)
        self._client = PayloadClient(lane=self._lane)

    def prepare(self, count: int) -> None:
        self._refs.extend(PayloadRef.from_json(text) for text in self._partner.ask("put", count=count)["refs"])

    def _read(self) -> None:
        assert self._client is not None
        self._client.read(self._refs.popleft(), timeout=READ_SECONDS)

    def _lease(self) -> None:
        assert self._client is not None
        with self._client.lease(self._refs.popleft(), timeout=READ_SECONDS):
            pass

    def _lease_bytes(self) -> None:
        assert self._client is not None
        with self._client.lease_bytes(self._refs.popleft(), timeout=READ_SECONDS) as leased:
            len(leased.data)

    def _read_batch(self) -> None:
        for _ in getattr(self._client, self._how)(self._refs, timeout=READ_SECONDS):
            pass
        self._refs.clear()
