"""Reads of one field of payloads that have many."""

from __future__ import annotations

from collections import deque

from benchmarks.exchanges.lanes import READ_SECONDS, ClientSide
from benchmarks.exchanges.payloads import MANY, field_name
from benchmarks.partner import Partner
from benchmarks.plan import LaneName
from dray import PayloadClient, PayloadRef


class FieldRead(ClientSide):
    """Read one of the fields of payloads over one lane; they were put just before.

    Args:
        lane: which lane.
        in_place: lease each payload once, for one field, in its slot. Otherwise each field is read once, with a
            copy, and the payload is consumed afterwards, outside of the measured time.
        checksum: whether the server sends checksums (and the client verifies them).
    """

    def __init__(self, lane: LaneName, *, in_place: bool = False, checksum: bool = False) -> None:
        how = f"{lane} in place" if in_place else f"{lane} with checksum" if checksum else lane
        self.name = f"{how}, one of {MANY} fields"
        self._lane = lane
        self._checksum = checksum
        super().__init__(Partner("payloads"))
        self._refs: list[PayloadRef] = []
        self._due: deque[tuple[PayloadRef, str]] = deque()
        self._fields = 1 if in_place else MANY
        self.once = self._lease if in_place else self._read

    def open(self, nbytes: int, batch: int) -> None:
        """Get ready for payloads of `nbytes` bytes, all fields together; `batch` counts reads."""
        slots = -(-batch // self._fields)
        self._partner.ask(
            "open", nbytes=nbytes, slots=slots, lane=self._lane, checksum=self._checksum, fields=MANY
        )
        self._client = PayloadClient(lane=self._lane)

    def prepare(self, count: int) -> None:
        assert self._client is not None
        self._client.consume(self._refs)
        found = self._partner.ask("put", count=-(-count // self._fields))["refs"]
        self._refs = [PayloadRef.from_json(text) for text in found]
        names = [field_name(number) for number in range(self._fields)]
        self._due = deque([(ref, name) for ref in self._refs for name in names][:count])

    def shut(self) -> None:
        self._refs = []
        super().shut()

    def _read(self) -> None:
        assert self._client is not None
        ref, name = self._due.popleft()
        self._client.read(ref, timeout=READ_SECONDS, consume=False, fields=(name,))

    def _lease(self) -> None:
        assert self._client is not None
        ref, name = self._due.popleft()
        with self._client.lease(ref, timeout=READ_SECONDS, fields=(name,)):
            pass
