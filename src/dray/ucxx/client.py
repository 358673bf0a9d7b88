"""`UCXXClient`: reads payloads from asyncio, and makes the clients that this package reads with."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from dray.prefetch.batch import Arrays
from dray.protocol import PayloadRef
from dray.transport import ClientStatistics, PayloadClient
from dray.transport.lanes import LaneChoice
from dray.transport.lanes.ucx_worker import require


def open_client(lane: LaneChoice, secret: bytes | None, reader: int) -> PayloadClient:
    """A client that may use the ``ucx`` lane, unless another is required.

    Raises:
        ConfigError: an argument is not allowed.
        MissingDependencyError: `ucxx` is needed and not installed; it says what to install.
    """
    if lane == "auto":
        require()
    return PayloadClient(lane=lane, secret=secret, reader=reader)


class UCXXClient:
    """Layer 1 for asyncio: one payload at a time, over another endpoint if the first one fails.

    Args:
        lane: ``"auto"`` takes ``shm`` on the same host, else ``ucx``, else ``tcp``; or the lane to use.
        secret: the job's secret, where servers have one.
        reader: this reader's id, where payloads are meant for several.

    Raises:
        ConfigError: an argument is not allowed.
        MissingDependencyError: `ucxx` is needed and not installed; it says what to install.
    """

    def __init__(self, *, lane: LaneChoice = "auto", secret: bytes | None = None, reader: int = 0) -> None:
        self._client = open_client(lane, secret, reader)

    async def read(self, ref: PayloadRef, *, timeout: float | None = 30.0, consume: bool = True) -> Arrays:
        """The payload's arrays, in memory of their own; see `PayloadClient.read`."""
        return await self._client.read_async(ref, timeout=timeout, consume=consume)

    def statistics(self) -> ClientStatistics:
        """As `PayloadClient.statistics`."""
        return self._client.statistics()

    def close(self) -> None:
        """As `PayloadClient.close`. Twice is fine."""
        self._client.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
