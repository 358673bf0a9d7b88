"""``transfer = "inline"``: payloads and weights lie in Redis itself, for comparison with references."""

from __future__ import annotations

import base64
import secrets
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Final

from dray.clock import Deadline
from dray.errors import DrayError, PayloadFormatError, PayloadTooLargeError
from dray.identifiers import PayloadId
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
from dray.jobs.replica.base import Replica
from dray.jobs.replica.transfer import Arrays
from dray.payload import plan, unpack

_SLICE = 0.5
_CHECK_INTERVAL = 2.0

MAX_PAYLOAD: Final = 380 << 20
"""Bytes of a payload: Redis takes 512 MiB in one value, and weights are a third longer there."""


@contextmanager
def redis_rollout_ends(replica: Replica) -> Iterator[tuple[RedisPublisher, RedisWeightsSubscriber]]:
    """The ends of a rollout replica."""
    yield RedisPublisher(replica), RedisWeightsSubscriber(replica)


@contextmanager
def redis_policy_ends(replica: Replica) -> Iterator[tuple[RedisReader, RedisWeightsPublisher]]:
    """The ends of a policy replica."""
    yield RedisReader(), RedisWeightsPublisher(replica)


class RedisPublisher:
    """See `TrajectoryPublisher`. A copy of what may be unfinished is kept, to publish it again after a loss."""

    def __init__(self, replica: Replica) -> None:
        bound = replica.spec.config.work_items_in_flight * replica.spec.config.payloads_of_work_item
        self._replica = replica
        self._queue = RolloutProducer(replica.redis, replica.keys, max_backlog=bound)
        self._producer = secrets.token_hex(16)
        self._sequence = 0
        self._recent: deque[RolloutEntry] = deque(maxlen=bound)
        self._next_check = Deadline.after(_CHECK_INTERVAL)

    def put(
        self,
        arrays: Arrays,
        *,
        work_item: int,
        weight_version: int,
        part: int = 0,
        parts: int = 1,
        metadata: str = "",
    ) -> bool:
        image = bytes(_packed(arrays))
        entry = RolloutEntry(
            producer=self._producer,
            sequence=self._sequence,
            weight_version=weight_version,
            replica=self._replica.name,
            work_item=work_item,
            part=part,
            parts=parts,
            metadata=metadata,
            payload=image,
        )
        while not self._replica.stop.is_set:
            try:
                self._queue.publish(entry, timeout=self._replica.spec.config.timeouts.redis)
            except StreamLostError:
                self.refresh()
            except BacklogFullError:
                continue
            except ControlPlaneStopped:
                return False
            else:
                self._sequence += 1
                self._recent.append(entry)
                self._replica.activity.counters.add_all({"payloads": 1, "bytes": len(image)})
                return True
        return False

    def refresh(self) -> None:
        self._queue.restore(lambda: self._recent)
        if self._next_check.expired and not self._replica.stop.is_set:
            self._next_check = Deadline.after(_CHECK_INTERVAL)
            # What there is no room for now, or is lost with the stream, is published at one of the next times.
            with suppress(StreamLostError, BacklogFullError, ControlPlaneStopped):
                self._queue.publish_trimmed(self._recent, self._replica.spec.config.timeouts.redis)

    def drain(self, timeout: float) -> int:
        return 0


class RedisReader:
    """See `TrajectoryReader`."""

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
    """See `WeightsPublisher`. The reference is the packed image itself, in base64."""

    def __init__(self, replica: Replica) -> None:
        self._key = WeightsChannel(replica.redis, replica.keys)

    def publish(self, weights: Arrays, version: int, epoch: int | None) -> None:
        self._key.publish(base64.standard_b64encode(_packed(weights)).decode("ascii"), version, epoch=epoch)

    def restore(self) -> None:
        self._key.restore()

    def newest_version(self) -> int | None:
        newest = self._key.newest()
        return None if newest is None else newest.version


class RedisWeightsSubscriber:
    """See `WeightsSubscriber`."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._key = WeightsChannel(replica.redis, replica.keys)
        self._last: PublishedWeights | None = None

    def newer(self, timeout: float) -> tuple[int, Arrays] | None:
        found = self._key.wait_newer(self._last, timeout)
        if found is None:
            return None
        self._last = found
        self._replica.activity.counters.add("weight_payloads")
        return found.version, unpack(bytearray(base64.standard_b64decode(found.reference)))


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
