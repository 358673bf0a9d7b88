"""Weights of a job from the policy's end to a rollout replica's, without a replica, a Redis and a job."""

import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from waiting import wait_until

from dray import make_secret
from dray.counters import Counters
from dray.errors import ProtocolError
from dray.jobs.process import StopFlag
from dray.jobs.queue import PublishedWeights
from dray.jobs.replica.user_code import UserValueError
from dray.jobs.replica.weights_stream import StreamWeightsPublisher, StreamWeightsSubscriber, WeightsReference

SECRET = make_secret()


class Channel:
    """A `WeightsChannel` in memory."""

    def __init__(self) -> None:
        self.published: list[PublishedWeights] = []
        self.accepts = True
        self._changed = threading.Condition()

    def publish(self, reference: str, version: int, *, epoch: int | None) -> None:
        with self._changed:
            if self.accepts:
                self.published.append(PublishedWeights(reference, version, str(len(self.published))))
                self._changed.notify_all()

    def newest(self, timeout: float | None = None) -> PublishedWeights | None:
        return self.published[-1] if self.published else None

    def wait_newer(self, than: PublishedWeights | None, timeout: float | None) -> PublishedWeights | None:
        with self._changed:
            self._changed.wait_for(lambda: self.newest() not in (None, than), timeout)
            newest = self.newest()
            return None if newest == than else newest


class Ends:
    """Publishers and subscribers of one job."""

    def __init__(self) -> None:
        self.channel = Channel()
        self.stop = StopFlag()
        self.counters = Counters()

    def publisher(self, lane: str = "auto", timeout: float = 10.0, **options: Any) -> StreamWeightsPublisher:
        defaults = {"host": None, "replicas": 1, "delta": "full", "secret": SECRET, "close_timeout": 1.0}
        channel: Any = self.channel
        return StreamWeightsPublisher(channel, self.stop, lane=lane, timeout=timeout, **(defaults | options))

    def subscriber(self, lane: str = "auto", timeout: float = 10.0) -> StreamWeightsSubscriber:
        channel: Any = self.channel
        return StreamWeightsSubscriber(
            channel, self.stop, self.counters, lane=lane, secret=SECRET, timeout=timeout
        )


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    monkeypatch.setenv("DRAY_SCOPE", "a job of these tests")
    made = Ends()
    yield made
    made.stop.set("the end of the test")


def arrays(value: float, elements: int = 1000) -> dict[str, Any]:
    return {"w": np.full(elements, value, np.float32), "about": {"step": int(value)}}


def newer(subscriber: StreamWeightsSubscriber) -> tuple[int, Any]:
    """As a rollout replica does: on a busy machine a connection may take longer than it waits once."""
    found: list[tuple[int, Any]] = []
    wait_until(lambda: found.extend(filter(None, [subscriber.newer(0.0)])) or found, "newer weights")
    return found[0]


@pytest.mark.parametrize("lane", ["auto", "shm", "tcp"])
def test_the_newest_weights_come_once_whatever_their_size(ends: Ends, lane: str) -> None:
    with ends.publisher(lane) as publisher, ends.subscriber(lane) as subscriber:
        assert subscriber.newer(0.0) is None
        for version in range(5):
            publisher.publish(arrays(version, 1000 * (version + 1)), version, 1)
        version, found = newer(subscriber)
        assert (version, found["w"].tolist(), found["about"]["step"]) == (4, [4.0] * 5000, 4)
        assert not found["w"].flags.writeable
        assert subscriber.newer(0.0) is None
        assert publisher.newest_version() == 4
    in_place = lane != "tcp"
    assert (ends.counters["weight_payloads"], ends.counters["weights_in_place"]) == (1, int(in_place))
    assert ends.counters["weight_bytes"] >= 20_000
    assert (ends.counters["weight_received_bytes"] == 0) is in_place


def test_sparse_weights_travel_as_what_has_changed(ends: Ends) -> None:
    with ends.publisher("tcp", delta="sparse") as publisher, ends.subscriber("tcp") as subscriber:
        weights = np.zeros(100_000, np.float32)
        for version in range(4):
            weights[version] = -0.0 if version == 2 else np.nan
            publisher.publish({"w": weights}, version, 1)
            _, found = newer(subscriber)
            assert found["w"].tobytes() == weights.tobytes()
    assert (ends.counters["weight_payloads"], ends.counters["weight_deltas"]) == (4, 3)
    assert ends.counters["weight_received_bytes"] < ends.counters["weight_bytes"] / 3


def test_a_restarted_policy_with_an_older_version_is_followed(ends: Ends) -> None:
    with ends.subscriber() as subscriber:
        with ends.publisher() as first:
            first.publish(arrays(7), 7, 1)
            assert newer(subscriber)[0] == 7
        with ends.publisher() as second:
            second.publish(arrays(3), 3, 2)
            version, found = newer(subscriber)
            assert (version, found["w"][0]) == (3, 3.0)


@pytest.mark.parametrize("lane", ["auto", "tcp"])
def test_weights_of_a_policy_that_has_died_let_rollouts_continue(ends: Ends, lane: str) -> None:
    with ends.publisher(lane) as publisher:
        publisher.publish(arrays(0), 0, 1)
    with ends.subscriber(lane, timeout=60.0) as subscriber:
        assert subscriber.newer(0.0) is None
        assert ends.counters["weight_stale"] == 1
        with ends.publisher(lane) as successor:
            successor.publish(arrays(1), 1, 2)
            assert newer(subscriber)[0] == 1


def test_weights_that_redis_has_refused_do_not_act(ends: Ends) -> None:
    with ends.publisher() as publisher, ends.subscriber(timeout=1.0) as subscriber:
        publisher.publish(arrays(0), 0, 1)
        ends.channel.accepts = False  # the group has a newer epoch
        publisher.publish(arrays(1), 1, 1)
        assert subscriber.newer(0.0) is None
        ends.channel.accepts = True
        publisher.publish(arrays(2), 2, 1)
        version, found = newer(subscriber)
        assert (version, found["w"][0]) == (2, 2.0)


def test_workers_that_keep_the_arrays_of_every_version_are_named(ends: Ends) -> None:
    with ends.publisher(timeout=0.2) as publisher, ends.subscriber() as subscriber:
        kept: list[Any] = []

        def publish_and_load() -> None:
            for version in range(10):
                publisher.publish(arrays(version), version, 1)
                kept.append(subscriber.newer(0.0))

        with pytest.raises(UserValueError, match=r"must copy what it keeps: .* process \d+ still uses"):
            publish_and_load()
        assert len(kept) >= 4  # the versions of one replica: acting and loading, the newest, and one to write
        assert [each[0] for each in kept if each] == list(range(len(kept)))


def test_a_publisher_that_is_stopped_waits_no_longer(ends: Ends) -> None:
    with ends.publisher(timeout=60.0) as publisher, ends.subscriber() as subscriber:
        kept = []
        threading.Timer(0.2, ends.stop.set, ["the end of the job"]).start()
        for version in range(10):
            publisher.publish(arrays(version), version, 1)
            kept.append(None if ends.stop.is_set else subscriber.newer(0.0))
        assert (publisher.newest_version() or 0) < 9


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"stream": "a", "scope": "b", "addresses": [], "number": "1"}', "[" * 100_000]
)
def test_what_is_no_reference_of_weights_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError, match="not a reference of weights"):
        WeightsReference.from_json(text)


def test_a_reference_of_weights_comes_back_as_it_was() -> None:
    reference = WeightsReference("weights-1", "a job", ("tcp://127.0.0.1:5",), 3)
    assert WeightsReference.from_json(reference.to_json()) == reference


def test_an_end_that_is_closed_twice_stays_closed(ends: Ends) -> None:
    with closing(ends.publisher()) as publisher:
        publisher.close()
    with closing(ends.subscriber()) as subscriber:
        subscriber.close()
