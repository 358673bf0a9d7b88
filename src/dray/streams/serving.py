"""What producers and publishers share: their stream as the server of their ring sees it."""

from __future__ import annotations

import abc
import contextlib
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from dray.errors import BufferClosedError, ConfigError, OutOfResources
from dray.protocol import streams
from dray.resources import Closing, needing
from dray.ring import SharedRingBuffer
from dray.ring.consumer_events import Descriptor
from dray.ring.stream_words import StreamWords
from dray.transport.service import ConsumerConnection, Subscriber

logger = logging.getLogger("dray.streams")


class RingOfStream:
    """What `dray.streams.delivery` asks of the ring."""

    def __init__(self, ring: SharedRingBuffer) -> None:
        self.has_finished = ring.is_stale
        self._ring = ring

    def barrier(self) -> bool:
        with contextlib.suppress(BufferClosedError):
            return self._ring.direct().barriers.pass_one()
        return False


class ServedConsumer:
    """The connection to a consumer."""

    def __init__(self, connection: ConsumerConnection, reader: int) -> None:
        self._connection = connection
        self._reader = reader

    def announce(self, given: streams.Given) -> None:
        self._connection.push(streams.give(given, self._reader))

    def take_back(self, slot: int, sequence: int, number: int) -> None:
        self._connection.push(streams.take_back(slot, sequence, number))

    def drain(self) -> None:
        self._connection.push(streams.draining())

    def end(self, lost: int) -> None:
        self._connection.push_last(streams.end(lost))

    def abort(self) -> None:
        self._connection.stream.abort()


class StreamServer(Closing):
    """The stream of a ring; see `dray.transport.service.StreamService`.

    Args:
        ring: the ring.
        about: what consumers get to know of the stream.
    """

    def __init__(self, ring: SharedRingBuffer, about: Mapping[str, Any]) -> None:
        self._ring = ring
        self._about = about
        with needing("the bell of a stream"):
            self.bell = Descriptor(os.eventfd, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    @property
    def remaining(self) -> float:
        return math.inf

    def describe(self) -> str:
        return json.dumps(self._about)

    @abc.abstractmethod
    def subscribe(self, connection: ConsumerConnection, reader: int) -> Subscriber: ...

    @abc.abstractmethod
    def serve(self) -> None: ...

    def words(self, connection: ConsumerConnection) -> StreamWords | None:
        """Memory to share with a consumer that leases directly; None if it does not, or if there is none."""
        if not connection.direct:
            return None
        slots = self._ring.slots
        with contextlib.suppress(OutOfResources, ConfigError):
            return StreamWords(self._ring.machine.words(StreamWords.count(slots)), slots)
        return None

    def log_attached(self, connection: ConsumerConnection, reader: int) -> None:
        """Log the process of a new consumer."""
        pid = connection.stream.peer_pid
        who = f"process {pid}" if pid else "a consumer on another host"
        logger.info(
            "stream %r: %s has attached to group %r", self._about["name"], who, self._about["groups"][reader]
        )

    @staticmethod
    def addresses(endpoints: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
        """The endpoints for this host, and the addresses for other hosts."""
        local = [each for each in endpoints if each.startswith("unix:")]
        return local, tuple(each.replace(":", "://", 1) for each in endpoints if each not in local)

    def close(self) -> None:
        self.bell.close()
