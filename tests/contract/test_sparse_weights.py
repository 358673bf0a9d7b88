"""Publishers of deltas, over the routes between hosts: each version is right, bit for bit, whatever travels."""

import logging
import os
import signal
import threading
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest
from stream_fixtures import SECONDS, Route, forked
from values import assert_same
from waiting import wait_until

from dray import Publisher, Ragged, Subscriber
from dray.errors import ConfigError
from dray.payload.schema import DTYPES
from dray.streams import Weights


@pytest.fixture(params=["tcp", "ucx"])
def remote(request: pytest.FixtureRequest) -> Route:
    if request.param == "ucx":
        pytest.importorskip("ucxx")
    return Route(request.param)


def publisher_of(route: Route, **options: object) -> Publisher:
    options = {"delta": "sparse", "listen": f"{route.kind}://127.0.0.1:0", "secret": route.secret, **options}
    publisher = Publisher(route.name, scope=route.name, **options)  # type: ignore[arg-type]
    route.addresses += publisher.addresses
    return publisher


def subscriber_of(route: Route) -> Subscriber:
    return Subscriber(route.addresses[-1], secret=route.secret)


def model(size: int = 100_000) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    arrays = {
        name: random.integers(0, 2 if name == "BOOL" else 256, size * dtype.itemsize, np.uint8).view(dtype)
        for name, dtype in DTYPES.items()
    }
    return arrays | {"empty": np.empty((0, 3), np.float32), "scalar": np.array(1.0)}


def change(arrays: dict[str, np.ndarray], share: float, seed: int) -> None:
    """Give some elements of each array other bits."""
    random = np.random.default_rng(seed)
    for name, array in arrays.items():
        if array.size > 1 and name != "BOOL":
            elements = array.view(np.uint8).reshape(-1, array.dtype.itemsize)
            elements[random.random(len(elements)) < share, 0] += 1


def assert_version(found: Weights, number: int, arrays: dict[str, np.ndarray]) -> None:
    assert found.version == number
    assert_same(dict(found), arrays)


def test_what_has_changed_travels_and_the_version_is_right(remote: Route) -> None:
    arrays = model()
    with publisher_of(remote) as publisher, subscriber_of(remote) as subscriber:
        found = None
        for number in range(1, 6):
            change(arrays, 0.02, number)
            publisher.publish(arrays)
            found = subscriber.newest(after=found, timeout=SECONDS)
            assert_version(found, number, arrays)
            assert found.delta is (number > 1)
            nbytes = sum(array.nbytes for array in arrays.values())
            if found.delta:
                assert found.received_bytes <= 0.12 * nbytes
            else:
                assert found.received_bytes >= nbytes


def test_values_that_were_kept_do_not_change_with_later_versions(remote: Route) -> None:
    arrays = model(1000)
    with publisher_of(remote) as publisher, subscriber_of(remote) as subscriber:
        kept, expected = [], []
        for number in range(1, 6):
            change(arrays, 0.05, number)
            publisher.publish(arrays)
            kept.append(subscriber.newest(after=kept[-1] if kept else None, timeout=SECONDS))
            expected.append({name: array.copy() for name, array in arrays.items()})
        assert [found.delta for found in kept] == [False, True, True, True, True]
        for number, (found, values) in enumerate(zip(kept, expected, strict=True), 1):
            assert_version(found, number, values)
        with pytest.raises(ValueError, match="read-only"):
            kept[-1]["F32"][0] = 1.0
        assert kept[-1].copy()["F32"].flags.writeable


def test_g4_one_that_comes_late_or_has_missed_a_version_gets_a_whole_one(remote: Route) -> None:
    arrays = model(5000)
    with publisher_of(remote) as publisher, subscriber_of(remote) as early:

        def publish() -> int:
            change(arrays, 0.01, publisher.version)
            return publisher.publish(arrays)

        publish()
        assert not early.newest(timeout=SECONDS).delta
        publish()
        with subscriber_of(remote) as late:
            found = late.newest(timeout=SECONDS)
            assert (found.version, found.delta) == (2, False)
            publish()  # `early` does not read version 2
            publish()
            found, other = early.newest(after=3, timeout=SECONDS), late.newest(after=3, timeout=SECONDS)
            assert (found.delta, other.delta) == (False, False)
            assert_version(found, 4, arrays)
            assert_version(other, 4, arrays)
            publish()
            found, other = early.newest(after=4, timeout=SECONDS), late.newest(after=4, timeout=SECONDS)
            assert (found.delta, other.delta) == (True, True)
            assert_version(found, 5, arrays)
            assert_version(other, 5, arrays)


def test_one_that_did_not_receive_for_long_gets_a_whole_version(remote: Route) -> None:
    arrays = model(1000)
    with publisher_of(remote) as publisher, subscriber_of(remote) as subscriber:
        publisher.publish(arrays)
        subscriber.newest(timeout=SECONDS)
        for number in range(2, 60):
            change(arrays, 0.01, number)
            publisher.publish(arrays)
        found = subscriber.newest(timeout=SECONDS)
        while found.version < 59:
            found = subscriber.newest(after=found, timeout=SECONDS)
        assert_version(found, 59, arrays)


def test_signs_of_zero_and_bits_of_nan_are_kept(remote: Route) -> None:
    with publisher_of(remote) as publisher, subscriber_of(remote) as subscriber:
        found = None
        for number, bits in enumerate((0, 0x80000000, 0x7FC00000, 0xFFC00001, 0x7F800001, 0), 1):
            arrays = {"w": np.full(10_000, 1.5, np.float32), "b": np.zeros(10, ml_dtypes.bfloat16)}
            arrays["w"].view(np.uint32)[77] = bits
            arrays["b"].view(np.uint16)[3] = bits >> 16
            publisher.publish(arrays)
            found = subscriber.newest(after=found, timeout=SECONDS)
            assert_version(found, number, arrays)
            assert found.delta is (number > 1)


def test_other_names_shapes_or_dtypes_make_a_whole_version(remote: Route) -> None:
    versions = [
        {"w": np.zeros(1000, np.float32)},
        {"w": np.zeros((10, 100), np.float32)},
        {"w": np.zeros((10, 100), np.int32)},
        {"v": np.zeros((10, 100), np.int32)},
        {"v": np.zeros((10, 100), np.int32), "w": np.ones(3)},
        {"v": {"nested": [np.zeros(3), "text"]}, "r": Ragged(np.arange(5), np.array([0, 2, 5]))},
    ]
    with publisher_of(remote) as publisher, subscriber_of(remote) as subscriber:
        found = None
        for number, values in enumerate(versions, 1):
            for again in (False, True):
                publisher.publish(values)
                found = subscriber.newest(after=found, timeout=SECONDS)
                assert (found.version, found.delta) == (2 * number - 1 + again, again)
                assert_same({name: value for name, value in found.items() if name != "r"}, {
                    name: value for name, value in values.items() if name != "r"
                })  # fmt: skip


def test_what_is_no_smaller_as_a_delta_travels_whole(remote: Route) -> None:
    arrays = {"w": np.zeros(100_000, np.float32)}
    with publisher_of(remote) as publisher, subscriber_of(remote) as subscriber:
        publisher.publish(arrays)
        found = subscriber.newest(timeout=SECONDS)
        arrays["w"] += 1
        publisher.publish(arrays)
        found = subscriber.newest(after=found, timeout=SECONDS)
        assert not found.delta
        assert_version(found, 2, arrays)
        arrays["w"][3] = 5
        publisher.publish(arrays)
        found = subscriber.newest(after=found, timeout=SECONDS)
        assert found.delta
        assert_version(found, 3, arrays)


def test_g4_a_base_that_the_program_has_written_to_costs_a_whole_version(
    remote: Route, caplog: pytest.LogCaptureFixture
) -> None:
    arrays = {"w": np.zeros(100_000, np.float32)}
    with publisher_of(remote) as publisher, subscriber_of(remote) as subscriber:
        publisher.publish(arrays)
        found = subscriber.newest(timeout=SECONDS)
        alias = found["w"]
        while isinstance(alias.base, np.ndarray):
            alias = alias.base
        alias.flags.writeable = True  # as a tensor does that shares the memory
        alias[-1] ^= 1
        arrays["w"][3] = 5
        publisher.publish(arrays)
        with caplog.at_level(logging.WARNING, "dray.streams"):
            found = subscriber.newest(after=found, timeout=SECONDS)
        assert "version 2 is read whole" in caplog.text
        assert not found.delta
        assert_version(found, 2, arrays)
        arrays["w"][4] = 5
        publisher.publish(arrays)
        found = subscriber.newest(after=found, timeout=SECONDS)
        assert found.delta
        assert_version(found, 3, arrays)


def test_after_a_publisher_that_was_killed_the_next_one_begins_with_a_whole_version() -> None:
    route = Route("tcp")

    def publish(ready: int, address: str, numbers: range, fill: int) -> None:
        with publisher_of(route, listen=address) as publisher:
            os.write(ready, publisher.addresses[0].encode())
            wait_until(lambda: publisher.subscribers == 1, "the subscriber")
            for number in numbers:
                publisher.publish({"w": np.full(10_000, fill), "number": np.array(number)}, version=number)
            threading.Event().wait()

    with forked(lambda ready: publish(ready, "tcp://127.0.0.1:0", range(1, 3), 7)) as (pid, reading):
        address = os.read(reading, 1000).decode()
        with Subscriber(address, secret=route.secret) as subscriber:
            old = subscriber.newest(after=1, timeout=SECONDS)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            with forked(lambda ready: publish(ready, address, range(3, 5), 8)) as (pid, reading):
                os.read(reading, 1000)
                new = subscriber.newest(after=old, timeout=SECONDS)
                while new.version < 4:
                    new = subscriber.newest(after=new, timeout=SECONDS)
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    assert (old.version, set(old["w"].tolist()), int(old["number"])) == (2, {7}, 2)
    assert (new.version, set(new["w"].tolist()), int(new["number"])) == (4, {8}, 4)
    assert old.publisher != new.publisher


@pytest.fixture
def stop() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def test_g3_versions_that_come_faster_than_they_are_read_are_right(remote: Route, stop: threading.Event) -> None:
    arrays = {"w": np.zeros(200_000, np.float32), "number": np.array(0)}

    def publish(publisher: Publisher) -> None:
        random = np.random.default_rng(3)
        while not stop.is_set():
            number = publisher.version + 1
            arrays["w"][random.integers(0, 200_000, 1000)] = number
            arrays["w"][:2] = number
            arrays["number"][...] = number
            publisher.publish(arrays, timeout=SECONDS)

    with publisher_of(remote) as publisher, subscriber_of(remote) as subscriber:
        thread = threading.Thread(target=publish, args=(publisher,), daemon=True)
        thread.start()
        try:
            found = None
            for _ in range(40):
                found = subscriber.newest(after=found, timeout=SECONDS)
                assert {float(found.version)} == {*found["w"][:2].tolist(), float(found["number"])}
                assert found["w"].max() == found.version
        finally:
            stop.set()
            thread.join(SECONDS)
        last = subscriber.newest(timeout=SECONDS)
        while last.version < publisher.version:
            last = subscriber.newest(after=last, timeout=SECONDS)
        assert_version(last, publisher.version, arrays)


def test_on_one_host_versions_are_used_in_place(remote: Route) -> None:
    arrays = model(1000)
    with (
        publisher_of(remote) as publisher,
        Subscriber(remote.name, scope=remote.name, secret=remote.secret) as near,
        subscriber_of(remote) as far,
    ):
        for number in range(1, 4):
            change(arrays, 0.01, number)
            publisher.publish(arrays)
            found = near.newest(after=number - 1, timeout=SECONDS)
            assert (found.in_place, found.delta, found.received_bytes) == (True, False, 0)
            assert_version(found, number, arrays)
            del found
            assert_version(far.newest(after=number - 1, timeout=SECONDS), number, arrays)


def test_other_kinds_of_delta_are_refused() -> None:
    with pytest.raises(ConfigError, match="delta"):
        Publisher("never", delta="dense")  # type: ignore[arg-type]
