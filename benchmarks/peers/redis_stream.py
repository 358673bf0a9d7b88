"""The rollout stream of a job in a Redis server of its own, as the runtime uses it."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from dray.jobs.queue import (
    JobKeys,
    RedisAddress,
    RedisConnection,
    RolloutConsumer,
    RolloutEntry,
    RolloutProducer,
    start_redis,
)

_KEYS = JobKeys("bench")
_SECONDS = 60.0


class _Opened:
    """Everything that is open ends with the ``with`` block."""

    def __init__(self) -> None:
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()


class StreamSender(_Opened):
    """Publishes entries."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._queue = RolloutProducer(self._opened.enter_context(RedisConnection(RedisAddress(url))), _KEYS)
        self._producer = secrets.token_hex(16)
        self._sequence = 0

    def publish(self, *, reference: str | None = None, payload: bytes | None = None) -> None:
        self._sequence += 1
        entry = RolloutEntry(
            producer=self._producer,
            sequence=self._sequence,
            weight_version=0,
            replica="rollout-0",
            work_item=self._sequence,
            reference=reference,
            payload=payload,
        )
        self._queue.publish(entry, timeout=_SECONDS)


class StreamReceiver(_Opened):
    """Starts the server, and receives entries.

    Attributes:
        url: for the sender, with its password.
    """

    def __init__(self) -> None:
        super().__init__()
        folder = self._opened.enter_context(tempfile.TemporaryDirectory(prefix="dray-bench-"))
        server = self._opened.enter_context(start_redis(Path(folder)))
        self.url = server.address.url
        connection = self._opened.enter_context(RedisConnection(server.address))
        self._queue = RolloutConsumer(connection, _KEYS, "policy-0")
        self._queue.attach()

    @contextmanager
    def received(self, most: int) -> Iterator[list[RolloutEntry]]:
        """The next entry, and what is there as well; they are committed when the block ends."""
        deliveries = self._queue.receive(most, timeout=_SECONDS)
        yield [delivery.entry for delivery in deliveries]
        self._queue.commit(deliveries, timeout=_SECONDS)
