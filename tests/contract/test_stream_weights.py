"""Publishers and subscribers over every route: one consistent version, and the newest one, at any pace."""

import itertools
import os
import pickle
import signal
import threading
from typing import Any

import numpy as np
import pytest
from stream_fixtures import SECONDS, Route, forked, in_thread, route
from waiting import wait_until

from dray import Publisher, Subscriber, TensorSpec
from dray.errors import (
    BufferClosedError,
    BufferFullError,
    ConfigError,
    PayloadTooLargeError,
    SchemaError,
    SelectionError,
    StreamTimeout,
)

__all__ = ["route"]


def publisher_of(route: Route, **options: object) -> Publisher:
    options = {"scope": route.name, **options}
    if not route.by_name:
        options |= {"listen": f"{route.kind}://127.0.0.1:0", "secret": route.secret}
    publisher = Publisher(route.name, **options)  # type: ignore[arg-type]
    route.addresses += publisher.addresses
    return publisher


def subscriber_of(route: Route, **part: Any) -> Subscriber:
    if route.by_name:
        return Subscriber(route.name, scope=route.name, direct=route.in_place, **part)
    return Subscriber(route.addresses[-1], secret=route.secret, **part)


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
        # A read over a connection takes several milliseconds. Without any pause, thousands of versions come while
        # this process, which has both ends, lets the thread of the server run: it is luck then which one is there.
        version = 0
        while not stop.wait(0.0005):
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


@pytest.mark.parametrize("timeout", [0.0, SECONDS])
def test_large_versions_arrive_although_newer_ones_are_published_meanwhile(route: Route, timeout: float) -> None:
    stop = threading.Event()

    def publish(publisher: Publisher) -> None:
        while not stop.is_set():
            publisher.publish(weights(publisher.version + 1, 1 << 20), timeout=SECONDS)

    with (
        publisher_of(route) as publisher,
        in_thread(lambda: publish(publisher)),
        subscriber_of(route) as subscriber,
    ):
        seen = [0]

        def read() -> bool:
            try:
                found = subscriber.newest(after=seen[-1], timeout=timeout)
            except StreamTimeout:
                assert timeout == 0
                return False
            assert set(found["w"].tolist()) == {float(found.version)} == {float(found["b"])}
            assert (found.received_bytes > found["w"].nbytes) is not route.in_place
            seen.append(found.version)
            return len(seen) > 10

        try:
            wait_until(read, "ten versions", 60)
        finally:
            stop.set()
        assert seen == sorted(set(seen))


def test_the_version_that_an_earlier_call_began_to_read_comes_if_the_newest_one_does_not() -> None:
    route = Route("tcp")
    going, go = os.pipe()

    def publish(ready: int) -> None:
        with publisher_of(route) as publisher:
            os.write(ready, publisher.addresses[0].encode())
            while os.read(going, 1):
                publisher.publish(weights(publisher.version + 1, 1 << 22), timeout=SECONDS)
                os.write(ready, b"x")

    def publish_one() -> None:
        os.write(go, b"x")
        assert os.read(reading, 1) == b"x"

    with (
        forked(publish) as (pid, reading),
        Subscriber(os.read(reading, 1000).decode(), secret=route.secret) as one,
    ):

        def has_begun(number: int) -> bool | None:
            """Version `number` is being read; None if it has been read, and was returned."""
            try:
                assert one.newest(after=number - 1, timeout=0).version == number
            except StreamTimeout as error:
                return "the bytes have not come" in str(error)
            return None

        tries: list[bool | None] = []
        for number in itertools.count(1):
            publish_one()
            wait_until(lambda n=number: tries.append(has_begun(n)) or tries[-1] is not False, "the announcement")
            if tries[-1]:
                break
        publish_one()
        publish_one()  # has the place of the one that is being read, and so waits for that
        os.kill(pid, signal.SIGSTOP)
        found = one.newest(after=number - 1, timeout=0.3)
        os.kill(pid, signal.SIGCONT)
        assert (found.version, set(found["w"].tolist())) == (number, {float(number)})
        assert one.newest(after=number + 1, timeout=SECONDS).version == number + 2
    for each in (going, go):
        os.close(each)


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


# --- parts of versions ------------------------------------------------------------------------------------------

MODEL = {"q": np.arange(4000, dtype=np.float32).reshape(1000, 4), "k": np.zeros((3, 2)), "b": np.array(5)}


@pytest.mark.parametrize("delta", ["full", "sparse"])
@pytest.mark.parametrize("factor", [1, 100])
def test_a_subscriber_may_want_a_part_of_each_version(route: Route, delta: str, factor: int) -> None:
    model = {**MODEL, "q": np.repeat(MODEL["q"], factor, axis=0)}
    middle = slice(250 * factor, 500 * factor)
    with publisher_of(route, delta=delta) as publisher:
        with subscriber_of(route, fields=("b", "q"), rows={"q": middle}) as subscriber:
            for version in range(1, 4):
                model["q"][300 * factor, 1] = version
                publisher.publish(model)
                found = subscriber.newest(after=version - 1, timeout=SECONDS)
                assert (found.version, set(found)) == (version, {"q", "b"})
                np.testing.assert_array_equal(found["q"], model["q"][middle])
                assert found.in_place is route.in_place
                if delta == "full" and not route.by_name:
                    assert found.received_bytes == found["q"].nbytes + found["b"].nbytes
                del found


def test_a_part_that_a_version_does_not_have_is_an_error(route: Route) -> None:
    with publisher_of(route) as publisher, subscriber_of(route, fields=("v",)) as subscriber:
        publisher.publish(MODEL)
        with pytest.raises(SelectionError, match="has no field 'v'"):
            subscriber.newest(timeout=SECONDS)


def test_a_version_that_is_written_in_place_is_like_any_other(route: Route) -> None:
    fields = {"w": TensorSpec("F32", (1000,)), "b": TensorSpec("I64", ())}
    with publisher_of(route) as publisher, subscriber_of(route) as subscriber:
        for version in (1, 2, 3):
            with publisher.writing(fields) as arrays:
                arrays["w"][...] = version
                arrays["b"][...] = version
            assert publisher.version == version
            found = subscriber.newest(after=version - 1, timeout=SECONDS)
            assert set(found["w"].tolist()) == {float(version)} == {float(found["b"])}
            del found
        with pytest.raises(ValueError, match="read-only"):
            arrays["w"][...] = 0
        assert publisher.publish(weights(4)) == 4
        assert float(subscriber.newest(after=3, timeout=SECONDS)["w"][0]) == 4


def test_an_exception_while_a_version_is_written_leaves_the_one_before(route: Route) -> None:
    def fail(publisher: Publisher) -> None:
        with publisher.writing({"w": TensorSpec("F32", (1000,))}) as arrays:
            arrays["w"][...] = 5
            raise ZeroDivisionError

    with publisher_of(route) as publisher, subscriber_of(route) as subscriber:
        publisher.publish(weights(1))
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                fail(publisher)
        assert publisher.version == 1
        assert float(subscriber.newest(timeout=SECONDS)["w"][0]) == 1
        assert publisher.publish(weights(2)) == 2


def test_a_version_that_cannot_be_written_is_refused() -> None:
    with Publisher("refused", scope="refused", slot_bytes=4096) as publisher:
        with (
            pytest.raises(SchemaError, match="lengths must be numbers"),
            publisher.writing({"w": TensorSpec("F32", (None, 3))}),
        ):
            pass
        with pytest.raises(PayloadTooLargeError), publisher.writing({"w": TensorSpec("F32", (5000,))}):
            pass
        with pytest.raises(ConfigError, match="version"), publisher.writing({}, 0):
            pass
    with pytest.raises(BufferClosedError), publisher.writing({}):
        pass


def test_a_version_whose_number_another_thread_has_published_is_refused() -> None:
    with Publisher("overtaken", scope="overtaken", versions=3) as publisher:
        with pytest.raises(ConfigError, match="that no other thread has published"):
            with publisher.writing({"w": TensorSpec("F32", (3,))}):
                publisher.publish(weights(1))
        assert publisher.version == 1
