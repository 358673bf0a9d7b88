"""What streams do after exceptions of signal handlers and callbacks, slow programs and lost producers."""

from __future__ import annotations

import contextlib
import math
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from stream_fixtures import SECONDS, Route, consumers_of, in_thread, number, route
from waiting import wait_until

from dray import Consumer, Publisher, Subscriber
from dray.errors import BufferClosedError, BufferFullError, StreamEnded, StreamTimeout
from dray.identifiers import PayloadId
from dray.payload.codec import PackPlan
from dray.streams import DeadLetter

__all__ = ["route"]


class Alarm(Exception):
    """What the signal handler of a test raises."""


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """A signal handler raises after some time in the block."""

    def handler(*_: object) -> None:
        raise Alarm

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        with pytest.raises(Alarm):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def get_all(consumer: Consumer) -> None:
    """Get payloads until the stream ends."""
    while True:
        consumer.get(SECONDS)


# --- exceptions -------------------------------------------------------------------------------------------------


def test_an_exception_of_a_signal_handler_ends_a_wait_and_loses_nothing(route: Route) -> None:
    with route.producer() as producer, route.consumer() as consumer:
        with alarm(0.1):
            consumer.get(SECONDS)
        producer.put(number=1)
        assert number(consumer.get(SECONDS)) == 1
        consumer.close()


def test_an_exception_while_a_payload_is_taken_gives_it_to_the_next_call(
    route: Route, monkeypatch: pytest.MonkeyPatch
) -> None:
    with route.producer() as producer, route.consumer() as consumer:
        producer.put(number=1)

        def interrupted(*_: object) -> None:
            monkeypatch.undo()
            raise Alarm

        monkeypatch.setattr("dray.streams.source.Payload", interrupted)
        with pytest.raises(Alarm):
            consumer.get(SECONDS)
        assert number(consumer.get(SECONDS)) == 1
        consumer.close()


def test_an_exception_while_a_payload_is_written_leaves_the_stream_as_it_was(
    route: Route, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        monkeypatch.undo()
        raise Alarm

    with route.producer(slots=2) as producer, route.consumer() as consumer:
        for each in range(4):
            monkeypatch.setattr(PackPlan, "write", interrupted)
            with pytest.raises(Alarm):
                producer.put(number=99)
            producer.put(number=each)
            assert number(consumer.get(SECONDS)) == each
        consumer.close()


def test_an_exception_while_a_version_is_written_leaves_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        monkeypatch.undo()
        raise Alarm

    route = Route("name")
    with (
        Publisher(route.name, scope=route.name) as publisher,
        Subscriber(route.name, scope=route.name) as subscriber,
    ):
        publisher.publish({"w": [1]})
        for version in (2, 3, 4):
            monkeypatch.setattr(PackPlan, "write", interrupted)
            with pytest.raises(Alarm):
                publisher.publish({"w": [99]})
            assert subscriber.newest(timeout=SECONDS)["w"].tolist() == [version - 1]
            assert publisher.publish({"w": [version]}) == version


def test_a_callback_that_raises_does_not_end_the_stream(route: Route, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(letter: DeadLetter) -> None:
        raise ValueError(f"bad: {int(letter.arrays['number'])}")

    with (
        route.producer(max_deliveries=1, on_dead_letter=refuse) as producer,
        route.consumer(ack="manual") as consumer,
    ):
        producer.put(number=7)
        consumer.get(SECONDS).release()
        wait_until(lambda: producer.statistics()[0].dead_letters, "the dead letter")
        producer.put(number=8)
        payload = consumer.get(SECONDS)
        assert number(payload) == 8
        payload.acknowledge()
    assert "on_dead_letter of stream" in caplog.text
    assert "bad: 7" in caplog.text


# --- what is not begun ------------------------------------------------------------------------------------------


def test_what_a_slow_program_has_not_begun_goes_to_one_that_waits_and_to_no_other(
    route: Route, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dray.streams.delivery.BEGIN_SECONDS", 0.2)
    with route.producer() as producer, route.consumer(ack="manual") as slow:
        for each in range(3):
            producer.put(number=each)
        begun = slow.get(SECONDS)
        wait_until(lambda: slow.ready == 2, "two payloads that are not begun")
        with route.consumer(ack="manual") as quick:
            found = [quick.get(SECONDS) for _ in range(2)]
            assert sorted(number(each) for each in found) == [1, 2]
            assert all(each.redelivered for each in found)
            with pytest.raises(StreamTimeout):
                slow.get(0.2)
            assert slow.statistics().gone == 2
            quick.acknowledge(found)
        slow.acknowledge(begun)
        assert producer.drain(SECONDS) == 0


# --- lost producers ---------------------------------------------------------------------------------------------


def test_a_producer_that_gives_up_notifies_its_consumers_of_what_is_lost(
    route: Route, caplog: pytest.LogCaptureFixture
) -> None:
    producer = route.producer()
    with route.consumer(prefetch=1) as consumer:
        for each in range(3):
            producer.put(number=each)
        assert number(consumer.get(SECONDS)) == 0

        def is_closing() -> bool:
            try:
                producer.put(number=9, timeout=0)
            except BufferClosedError:
                return True
            except BufferFullError:
                pass
            return False

        with in_thread(lambda: producer.close(drain=False)):
            wait_until(is_closing, "the beginning of the end")
            with pytest.raises(StreamEnded):
                get_all(consumer)
        assert consumer.statistics().ended == 1
    assert "payloads are lost" in caplog.text


def test_ids_of_an_unknown_producer_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dray.streams.consumer.FIND_SECONDS", 0.1)
    unknown = PayloadId(bytes(16), 1, 0, 64)
    with Consumer("unknown", scope="unknown", ack="manual") as consumer:
        consumer.acknowledge(unknown)  # by name, a producer that is not there is gone
    monkeypatch.setattr("dray.streams.inbox.FIRST_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with Consumer([address], secret=bytes(32), ack="manual") as consumer:
            with pytest.raises(StreamTimeout, match="no producer is attached"):
                consumer.acknowledge(unknown)


def test_a_read_that_takes_too_long_ends_the_connection_and_the_payload_comes_again(
    route: Route, monkeypatch: pytest.MonkeyPatch
) -> None:
    if route.in_place:
        pytest.skip("nothing is read over a connection")
    monkeypatch.setattr("dray.streams.source.READ_SECONDS", 0.0)
    monkeypatch.setattr("dray.streams.source.PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr("dray.streams.source.MIN_BYTES_PER_SECOND", math.inf)
    with route.producer() as producer, route.consumer() as consumer:
        producer.put(number=1)
        with in_thread(lambda: consumer.get(SECONDS)) as got:
            wait_until(lambda: consumers_of(producer) == 1, "the consumer")
            wait_until(lambda: producer.statistics()[0].given > 1, "another hand-out")
            monkeypatch.undo()
            payload = got()
        assert (number(payload), payload.redelivered) == (1, True)
        assert consumer.statistics().attached > 1
        consumer.close()


# --- memory that is kept ----------------------------------------------------------------------------------------


def test_put_names_the_process_that_keeps_arrays_of_payloads_that_are_consumed() -> None:
    route = Route("name")
    with route.producer(slots=2) as producer, route.consumer() as consumer:
        kept = []
        for each in range(2):
            producer.put(number=each)
            kept.append(consumer.get(SECONDS)["number"])
        with contextlib.suppress(StreamTimeout):
            consumer.get(0)  # acknowledges the last one
        with pytest.raises(
            BufferFullError, match=r"all payloads are consumed, and arrays of them are kept by process"
        ):
            producer.put(number=2, timeout=0.05)
        assert [int(each) for each in kept] == [0, 1]
        kept.clear()
        producer.put(number=2)
        assert number(consumer.get(SECONDS)) == 2
        consumer.close()


def test_a_payload_that_is_released_by_another_thread_comes_to_a_consumer_that_waits(route: Route) -> None:
    with route.producer() as producer, route.consumer(ack="manual") as consumer:
        producer.put(x=np.arange(3))
        payload = consumer.get(SECONDS)
        with in_thread(lambda: consumer.get(SECONDS)) as got:
            threading.Event().wait(0.02)
            payload.release()
            again = got()
        assert again.redelivered
        again.acknowledge()


def test_a_consumer_keeps_nothing_of_producers_that_have_ended(route: Route) -> None:
    if not route.by_name:
        pytest.skip("a consumer knows the addresses from its beginning")
    descriptors = []
    with route.consumer() as consumer:
        for _ in range(4):
            with route.producer() as producer:
                producer.put(number=1)
                consumer.get(SECONDS)
                with in_thread(producer.close), pytest.raises(StreamEnded):
                    consumer.get(SECONDS)
            descriptors.append(len(list(Path("/proc/self/fd").iterdir())))
    assert descriptors[1:] == descriptors[:-1]
