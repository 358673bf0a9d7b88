"""``transfer = "inline"``: payloads and weights lie in Redis itself, for comparison with references.

The classes have the methods of those in `ring_transfer` and `weights_stream`.
"""

from __future__ import annotations

import base64
import secrets
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Final

from dray.clock import MONOTONIC, Deadline
from dray.counters import Counters
from dray.errors import DrayError, PayloadFormatError, PayloadTooLargeError
from dray.identifiers import PayloadId
from dray.jobs.process import StopFlag
from dray.jobs.queue import (
    BacklogFullError,
    ControlPlaneStopped,
    Delivery,
    PublishedWeights,
    RolloutEntry,
    RolloutProducer,
    StreamLostError,
    WeightsChannel,
)
from dray.jobs.replica.stages import StageLog, handed_on
from dray.jobs.replica.user_code import RolloutPayload
from dray.payload import Arrays, plan, unpack

_CHECK_INTERVAL = 2.0

MAX_PAYLOAD: Final = 380 << 20
"""Bytes of a payload: Redis takes 512 MiB in one value, and weights are a third longer there."""


class RedisPublisher:
    """As `RingPublisher`.

    Args:
        name: of the replica.
        stages: where the time that a payload takes is written.
        kept: copies of the newest payloads that are kept, to publish them again after a loss.
        timeout: seconds that Redis may take to answer.
    """

    def __init__(
        self,
        queue: RolloutProducer,
        name: str,
        stop: StopFlag,
        counters: Counters,
        stages: StageLog,
        *,
        kept: int,
        timeout: float,
    ) -> None:
        self._queue = queue
        self._name = name
        self._stop = stop
        self._counters = counters
        self._stages = stages
        self._timeout = timeout
        self._producer = secrets.token_hex(16)
        self._sequence = 0
        self._recent: deque[RolloutEntry] = deque(maxlen=kept)
        self._next_check = Deadline.after(_CHECK_INTERVAL)

    def put(self, payload: RolloutPayload) -> bool:
        began = MONOTONIC.now()
        image = bytes(_packed(payload.arrays))
        packed = MONOTONIC.now()
        entry = payload.entry(self._name, self._producer, self._sequence, image=image)
        while not self._stop.is_set:
            try:
                self._queue.publish(entry, timeout=self._timeout)
            except StreamLostError:
                self.refresh()
            except BacklogFullError:
                continue
            except ControlPlaneStopped:
                return False
            else:
                self._sequence += 1
                self._recent.append(entry)
                self._stages.add(handed_on(self._stages, payload, entry.identity, began, packed))
                self._counters.add_all({"payloads": 1, "bytes": len(image)})
                return True
        return False

    def refresh(self) -> None:
        self._queue.restore(lambda: self._recent)
        if self._next_check.expired and not self._stop.is_set:
            self._next_check = Deadline.after(_CHECK_INTERVAL)
            # What there is no room for now, or is lost with the stream, is published at one of the next times.
            with suppress(StreamLostError, BacklogFullError, ControlPlaneStopped):
                self._queue.publish_trimmed(self._recent, self._timeout)

    def drain(self, timeout: float) -> int:
        return 0


class RedisReader:
    """As `RingReader`."""

    transfer = "inline"
    lane = ""

    def __init__(self) -> None:
        self._bytes = 0

    def read(self, deliveries: Sequence[Delivery]) -> Iterator[tuple[Delivery, Arrays | DrayError]]:
        for delivery in deliveries:
            payload = delivery.entry.payload
            try:
                if payload is None:
                    raise PayloadFormatError(f"entry {delivery.entry.identity} holds a reference, not a payload")
                # A copy, because trainers may write to what they are given.
                arrays = unpack(bytearray(payload))
            except PayloadFormatError as error:
                yield delivery, error
            else:
                self._bytes += len(payload)
                yield delivery, arrays

    def consume(self, entries: Sequence[RolloutEntry]) -> None:
        """The commit has removed the entries, and the payloads with them."""

    def unfreed(self) -> list[PayloadId]:
        return []

    def statistics(self) -> Mapping[str, float]:
        return {"bytes": self._bytes, "retries": 0, "unfreed": 0}


class RedisWeightsPublisher:
    """As `StreamWeightsPublisher`. The reference is the packed image itself, in base64."""

    def __init__(self, channel: WeightsChannel) -> None:
        self._channel = channel

    def publish(self, weights: Arrays, version: int, epoch: int | None) -> None:
        self._channel.publish(base64.standard_b64encode(_packed(weights)).decode("ascii"), version, epoch=epoch)

    def restore(self) -> None:
        self._channel.restore()

    def newest_version(self) -> int | None:
        newest = self._channel.newest()
        return None if newest is None else newest.version


class RedisWeightsSubscriber:
    """As `StreamWeightsSubscriber`."""

    def __init__(self, channel: WeightsChannel, counters: Counters) -> None:
        self._channel = channel
        self._counters = counters
        self._last: PublishedWeights | None = None

    def newer(self, timeout: float) -> tuple[int, Arrays] | None:
        found = self._channel.wait_newer(self._last, timeout)
        if found is None:
            return None
        self._last = found
        image = base64.standard_b64decode(found.reference)
        sizes = {"weight_bytes": len(image), "weight_received_bytes": len(found.reference)}
        self._counters.add_all({"weight_payloads": 1, **sizes})
        return found.version, unpack(image)


def _packed(arrays: Arrays) -> bytearray:
    planned = plan(arrays)
    if planned.nbytes > MAX_PAYLOAD:
        raise PayloadTooLargeError(
            f"{planned.nbytes:,} bytes, where Redis takes at most {MAX_PAYLOAD:,}: "
            'job.transfer = "reference" has no such bound'
        )
    image = bytearray(planned.nbytes)
    planned.write(image)
    return image
