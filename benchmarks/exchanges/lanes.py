"""dray's lanes: a `PayloadServer` in another process, a `PayloadClient` in this one."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from benchmarks.exchanges.payloads import one_array, six_fields
from benchmarks.partner import Partner
from benchmarks.plan import LaneName
from benchmarks.service import Reply
from dray import PayloadClient, PayloadRef, PayloadServer, SharedRingBuffer

READ_SECONDS = 60.0

How = Literal["read", "lease", "read_many", "read_many_bytes"]


class PayloadService:
    """Puts payloads into a ring when it is told to, and serves them on one lane."""

    def __init__(self) -> None:
        self._opened = ExitStack()
        self._arrays: dict[str, Any] = {}
        self._server: PayloadServer | None = None
        self._spinner = Spinner()

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
        if command == "spun":
            return Reply({"turns": self._spinner.turns})
        self.close()
        return Reply({})

    def close(self) -> None:
        self._server = None
        self._opened.close()

    def _open(
        self,
        nbytes: int,
        slots: int,
        lane: LaneName,
        checksum: bool,
        fields: int = 1,
        switch_interval: float | None = None,
    ) -> None:
        self._arrays = one_array(nbytes) if fields == 1 else six_fields(nbytes)
        ring = self._opened.enter_context(SharedRingBuffer(slots, nbytes, prefault=True))
        self._server = self._opened.enter_context(
            PayloadServer(ring, lane=(lane,), threads=1, checksum=checksum, drain_timeout=1.0)
        )
        if switch_interval is not None:
            sys.setswitchinterval(switch_interval)
            self._opened.enter_context(self._spinner.spinning())


class Spinner:
    """A thread that runs pure Python and never waits, as an environment's loop does.

    Attributes:
        turns: how often its loop went round; what else the process does takes turns away.
    """

    def __init__(self) -> None:
        self.turns = 0
        self._over = False

    @contextmanager
    def spinning(self) -> Iterator[None]:
        """For the length of the block."""
        self._over = False
        thread = threading.Thread(target=self._spin, name="busy")
        thread.start()
        try:
            yield
        finally:
            self._over = True
            thread.join()

    def _spin(self) -> None:
        value = 0.0
        while not self._over:
            for step in range(100):
                value = 0.5 * value + step
            self.turns += 1


class IdleReaderService:
    """Opens many connections to a server and then leaves them alone."""

    def __init__(self) -> None:
        self._opened = ExitStack()

    def do(self, command: str, **arguments: Any) -> Reply:
        refs = [PayloadRef.from_json(text) for text in arguments["refs"]]
        client = PayloadClient(lane=arguments["lane"], max_idle=len(refs))
        self._opened.enter_context(client)
        with ExitStack() as held:
            # Payloads held at the same time are held on as many connections.
            for ref in refs:
                held.enter_context(client.lease(ref, timeout=READ_SECONDS))
        return Reply({})

    def close(self) -> None:
        self._opened.close()


class LaneRead:
    """Read payloads over one lane; each was put just before, and is consumed.

    Args:
        lane: which lane.
        how: ``"read"`` copies into memory of its own, ``"lease"`` uses the slot in place and copies nothing;
            ``"read_many"`` and ``"read_many_bytes"`` read a whole batch in one operation.
        checksum: whether the server sends checksums (and the client verifies them).
        fields: 1 or 6 arrays in a payload.
        name: as the report calls it.
        switch_interval: the server's process is busy running Python, with this switch interval in seconds.
    """

    def __init__(
        self,
        lane: LaneName,
        how: How = "read",
        *,
        checksum: bool = False,
        fields: Literal[1, 6] = 1,
        name: str = "",
        switch_interval: float | None = None,
    ) -> None:
        plain = {"read": lane, "lease": f"{lane} in place"}.get(how, f"{lane} {how}")
        self.name = name or (f"{plain} with checksum" if checksum else plain)
        self._lane = lane
        self._served = {"checksum": checksum, "fields": fields, "switch_interval": switch_interval}
        self._partner = Partner("payloads")
        self._client: PayloadClient | None = None
        self._refs: deque[PayloadRef] = deque()
        self._how = how
        self.once = {"read": self._read, "lease": self._lease}.get(how, self._read_batch)

    @staticmethod
    def batches_as_bytes() -> bool:
        """Whether this `PayloadClient` reads batches without unpacking them."""
        return hasattr(PayloadClient, "read_many_bytes")

    def open(self, nbytes: int, batch: int) -> None:
        self._partner.ask("open", nbytes=nbytes, slots=batch, lane=self._lane, **self._served)
        self._client = PayloadClient(lane=self._lane)

    def prepare(self, count: int) -> None:
        self._refs.extend(PayloadRef.from_json(text) for text in self._partner.ask("put", count=count)["refs"])

    def spun(self) -> int:
        """How often the loop of a busy server went round."""
        return int(self._partner.ask("spun")["turns"])

    def shut(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
        self._partner.ask("shut")

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
        self._partner.close()

    def _read(self) -> None:
        assert self._client is not None
        self._client.read(self._refs.popleft(), timeout=READ_SECONDS)

    def _lease(self) -> None:
        assert self._client is not None
        with self._client.lease(self._refs.popleft(), timeout=READ_SECONDS):
            pass

    def _read_batch(self) -> None:
        for _ in getattr(self._client, self._how)(self._refs, timeout=READ_SECONDS):
            pass
        self._refs.clear()
