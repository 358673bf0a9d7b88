"""Publishers and subscribers over every route: one consistent version, and the newest one, at any pace."""

import os
import pickle
import signal
import threading

import numpy as np
import pytest
from stream_fixtures import SECONDS, Route, forked, in_thread, route
from waiting import wait_until

from dray import Publisher, Subscriber
from dray.errors import BufferClosedError, BufferFullError, ConfigError, StreamTimeout

__all__ = ["route"]


def publisher_of(route: Route, **options: object) -> Publisher:
    options = {"scope": route.name, **options}
    if not route.by_name:
        options |= {"listen": f"{route.kind}://127.0.0.1:0", "secret": route.secret}
    publisher = Publisher(route.name, **options)  # type: ignore[arg-type]
    route.addresses += publisher.addresses
    return publisher


def subscriber_of(route: Route) -> Subscriber:
    if route.by_name:
        return Subscriber(route.name, scope=route.name, direct=route.in_place)
    return Subscriber(route.addresses[-1], secret=route.secret)


def weights(version: int, size: int = 1000) -> dict[str, np.ndarray]:
    return {"w": np.full(size, version, np.float32), "b": np.array(version)}


def test_a_subscriber_gets_the_newest_version_and_waits_for_a_newer_one(route: Route) -> None:
    with publisher_of(route) as publisher, subscriber_of(route) as subscriber:
        with pytest.raises(StreamTimeout):
            subscriber.newest(timeout=0.05)
        assert publisher.publish(weights(1)) == 1
        assert publisher.publish(weights(2)) == 2
        found = subscriber.newest(timeout=SECONDS)
        assert (found.version, float(found["w"][0]), found.in_place) == (2, 2.0, route.in_place)
        assert subscriber.newest(timeout=SECONDS).version == 2
        with pytest.raises(StreamTimeout):
            subscriber.newest(after=2, timeout=0.05)
        with in_thread(lambda: subscriber.newest(after=found, timeout=SECONDS).version) as newer:
            publisher.publish(weights(3))
            assert newer() == 3


def test_a_version_is_never_a_mixture_however_fast_they_come(route: Route) -> None:
    stop = threading.Event()

    def publish(publisher: Publisher) -> int:
        version = 0
        while not stop.is_set():
            version = publisher.publish(weights(version + 1), timeout=SECONDS)
        return version

    with publisher_of(route) as publisher, in_thread(lambda: publish(publisher)) as last:
        with subscriber_of(route) as subscriber:
            seen = []
            try:
                for _ in range(30):
                    found = subscriber.newest(timeout=SECONDS)
                    assert set(found["w"].tolist()) == {float(found.version)} == {float(found["b"])}
                    seen.append(found.version)
                del found
            finally:
                stop.set()
            end = last()
            assert seen == sorted(seen)
            assert subscriber.newest(timeout=SECONDS).version == end


def test_a_subscriber_that_did_not_look_for_long_gets_the_newest_version(route: Route) -> None:
    with publisher_of(route) as publisher, subscriber_of(route) as subscriber:
        publisher.publish(weights(1))
        assert subscriber.newest(timeout=SECONDS).version == 1
        for version in range(2, 101):
            publisher.publish(weights(version))
        assert subscriber.newest(timeout=SECONDS).version == 100
        assert subscriber.newest(timeout=SECONDS).version == 100


def test_publish_waits_for_a_subscriber_that_keeps_an_old_version_and_then_names_it() -> None:
    route = Route("name")
    with publisher_of(route) as publisher, subscriber_of(route) as subscriber:
        publisher.publish(weights(1))
        kept = subscriber.newest(timeout=SECONDS)
        publisher.publish(weights(2))
        with pytest.raises(BufferFullError, match=f"process {os.getpid()} still uses an older version"):
            publisher.publish(weights(3), timeout=0.05)
        assert float(kept["w"][0]) == 1.0
        del kept
        assert publisher.publish(weights(3), timeout=SECONDS) == 3
        assert subscriber.newest(timeout=SECONDS).version == 3


def test_there_is_one_publisher_of_a_name_in_a_scope() -> None:
    route = Route("name")
    with publisher_of(route):
        with pytest.raises(ConfigError, match="this process"):
            publisher_of(route)
        with publisher_of(Route("name", name=route.name), scope=f"{route.name}-other"):
            pass

        def publish(found: int) -> None:
            try:
                publisher_of(route)
            except ConfigError as error:
                os.write(found, str(error).encode())

        with forked(publish) as (_, reading):
            assert f"process {os.getpid()}" in os.read(reading, 1000).decode()
    with publisher_of(route):
        pass


def test_after_a_publisher_that_was_killed_subscribers_get_the_versions_of_the_next_one() -> None:
    route = Route("name")

    def publish(ready: int) -> None:
        with publisher_of(route) as publisher:
            publisher.publish(weights(7), version=7)
            os.write(ready, b"x")
            threading.Event().wait()

    with subscriber_of(route) as subscriber:
        with forked(publish) as (pid, reading):
            os.read(reading, 1)
            old = subscriber.newest(timeout=SECONDS)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        with publisher_of(route) as publisher:
            publisher.publish(weights(1))
            new = subscriber.newest(after=old, timeout=SECONDS)
            assert (old.version, new.version) == (7, 1)
            assert (float(old["w"][0]), float(new["w"][0])) == (7.0, 1.0)


def test_versions_have_rising_numbers(route: Route) -> None:
    with publisher_of(route) as publisher, subscriber_of(route) as subscriber:
        assert publisher.publish(weights(10), version=10) == 10
        for wrong in (10, 9, -1, "11"):
            with pytest.raises(ConfigError, match="version"):
                publisher.publish(weights(1), version=wrong)  # type: ignore[arg-type]
        assert publisher.publish(weights(11)) == 11
        assert subscriber.newest(after=10, timeout=SECONDS).version == 11


def test_a_subscriber_can_be_pickled_and_closed_while_it_waits(route: Route) -> None:
    with publisher_of(route) as publisher:
        subscriber: Subscriber = pickle.loads(pickle.dumps(subscriber_of(route)))  # noqa: S301
        with in_thread(lambda: subscriber.newest(timeout=None)) as newest:
            wait_until(lambda: publisher.subscribers == 1, "the subscriber")
            subscriber.close()
            with pytest.raises(BufferClosedError):
                newest()
