"""R1: after Redis was restarted empty, a rollout replica publishes again every payload still needed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from dray.jobs.process import StopFlag
from dray.jobs.queue import (
    JobKeys,
    RedisConnection,
    RedisServer,
    RolloutConsumer,
    RolloutEntry,
    RolloutProducer,
    start_redis,
)
from dray.jobs.replica.heartbeat import Activity, Heartbeat
from dray.jobs.replica.ring_transfer import RingPublisher
from dray.jobs.replica.stages import StageLog
from dray.jobs.replica.user_code import RolloutPayload
from dray.ring import SharedRingBuffer
from dray.transport import PayloadServer

KEYS = JobKeys("again")
SLOTS = 4


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with start_redis(tmp_path / "redis") as started:
        yield started


@pytest.fixture
def connection(redis: RedisServer) -> Iterator[RedisConnection]:
    with RedisConnection(redis.address) as opened:
        yield opened


@pytest.fixture
def ring() -> Iterator[SharedRingBuffer]:
    with SharedRingBuffer(SLOTS, 1 << 12) as made:
        yield made


@pytest.fixture
def publisher(ring: SharedRingBuffer, connection: RedisConnection, tmp_path: Path) -> Iterator[RingPublisher]:
    with PayloadServer(ring, lane="shm", threads=1, drain_timeout=0.1) as server:
        yield RingPublisher(
            ring,
            server,
            RolloutProducer(connection, KEYS),
            "rollout-0",
            StopFlag(),
            Activity(),
            cast(Heartbeat, None),  # a payload that is reclaimed is reported to it: there is none here
            StageLog(tmp_path, "rollout-0", every=0, max_bytes=1, warn=print),
            inline_bytes=0,
            serve=1.0,
            timeout=10.0,
        )


def put(publisher: RingPublisher, count: int = 1) -> None:
    for _ in range(count):
        assert publisher.put(RolloutPayload({"rewards": np.ones(3, np.float32)}, work_item=0, weight_version=0))


def listed(connection: RedisConnection) -> list[int]:
    """Sequence numbers of what a new consumer is given."""
    consumer = RolloutConsumer(connection, KEYS, "late")
    return sorted(delivery.entry.sequence for delivery in consumer.receive(100))


def test_r1_a_payload_that_others_have_passed_many_times_is_published_again(
    publisher: RingPublisher, ring: SharedRingBuffer, redis: RedisServer, connection: RedisConnection
) -> None:
    put(publisher)
    for _ in range(5 * SLOTS):
        put(publisher)
        newest = ring.ready()[-1]
        ring.consume(newest.slot, newest.sequence)
    redis.restart()
    publisher.refresh()
    assert listed(connection) == [0]


def test_r1_a_payload_that_is_being_read_is_published_again(
    publisher: RingPublisher, ring: SharedRingBuffer, redis: RedisServer, connection: RedisConnection
) -> None:
    put(publisher, 2)
    lease = ring.read_raw(ring.ready()[0].slot, 0)
    redis.restart()
    publisher.refresh()
    lease.release()  # its reader has died, and another reader must receive it
    assert listed(connection) == [0, 1]


def test_r1_a_second_restart_while_payloads_are_published_again_begins_it_anew(
    publisher: RingPublisher, redis: RedisServer, connection: RedisConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(publisher, 3)
    publish = RolloutProducer.publish
    calls: list[int] = []

    def publish_and_restart_once(self: RolloutProducer, entry: RolloutEntry, *args: Any, **named: Any) -> bool:
        calls.append(entry.sequence)
        if len(calls) == 2:
            redis.restart()
        return publish(self, entry, *args, **named)

    monkeypatch.setattr(RolloutProducer, "publish", publish_and_restart_once)
    redis.restart()
    publisher.refresh()
    assert calls == [0, 1, 0, 1, 2]
    assert listed(connection) == [0, 1, 2]
