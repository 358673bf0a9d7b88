"""dray's lanes: a `PayloadServer` in another process, a `PayloadClient` in this one."""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack
from typing import Any, Literal

import numpy as np

from benchmarks.peer import Peer, Reply
from dray import PayloadClient, PayloadRef, PayloadServer, SharedRingBuffer
from dray.payload.codec import plan

FIELD = "payload"
READ_SECONDS = 60.0

How = Literal["read", "lease"]


def arrays_of(nbytes: int) -> dict[str, np.ndarray[Any, np.dtype[np.uint8]]]:
    """One array whose packed image has exactly `nbytes` bytes (a multiple of 64, 1 KiB or more)."""
    source = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
    overhead = plan({FIELD: source}).nbytes - nbytes
    arrays = {FIELD: source[: nbytes - overhead]}
    packed = plan(arrays).nbytes
    if packed != nbytes:
        raise ValueError(f"a payload of {nbytes} bytes cannot be made; it has {packed}")
    return arrays


class PayloadService:
    """Puts payloads into a ring and serves them on one lane."""

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
            return Reply({"open": self._server.statistics()["open_connections"]})
        self.close()
        return Reply({})

    def close(self) -> None:
        self._server = None
        self._opened.close()

    def _open(self, nbytes: int, slots: int, lane: Any, checksum: bool) -> None:
        self._arrays = arrays_of(nbytes)
        ring = self._opened.enter_context(SharedRingBuffer(slots, nbytes, prefault=True))
        self._server = self._opened.enter_context(
            PayloadServer(ring, lanes=(lane,), threads=1, checksum=checksum, drain_timeout=1.0)
        )


class IdleReaderService:
    """Opens many connections to a server and then leaves them alone."""

    def __init__(self) -> None:
        self._opened = ExitStack()

    def do(self, command: str, **arguments: Any) -> Reply:
        refs = [PayloadRef.from_json(text) for text in arguments["refs"]]
        client = PayloadClient(lanes=arguments["lane"], most_idle=len(refs))
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
        how: ``"read"`` copies into memory of its own, ``"lease"`` uses the slot in place and copies nothing.
        checksum: whether the server sends checksums (and the client verifies them).
    """

    def __init__(self, lane: Literal["shm", "tcp", "ucx"], how: How = "read", *, checksum: bool = False) -> None:
        self.name = f"{lane} in place" if how == "lease" else f"{lane} with checksum" if checksum else lane
        self._lane = lane
        self._checksum = checksum
        self._peer = Peer("payloads")
        self._client: PayloadClient | None = None
        self._refs: deque[PayloadRef] = deque()
        self.once = self._lease if how == "lease" else self._read

    def open(self, nbytes: int, batch: int) -> None:
        self._peer.ask("open", nbytes=nbytes, slots=batch, lane=self._lane, checksum=self._checksum)
        self._client = PayloadClient(lanes=self._lane)

    def prepare(self, count: int) -> None:
        self._refs.extend(PayloadRef.from_json(text) for text in self._peer.ask("put", count=count)["refs"])

    def shut(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
        self._peer.ask("shut")

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
        self._peer.close()

    def _read(self) -> None:
        assert self._client is not None
        self._client.read(self._refs.popleft(), timeout=READ_SECONDS)

    def _lease(self) -> None:
        assert self._client is not None
        with self._client.lease(self._refs.popleft(), timeout=READ_SECONDS):
            pass
