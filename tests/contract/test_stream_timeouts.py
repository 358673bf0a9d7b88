"""A call with a time limit, and a payload that takes longer: nothing is lost, and no other consumer waits."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from stream_fixtures import SECONDS, Route, forked, in_thread, number, route
from waiting import wait_until

from dray import Consumer, Payload, Producer, Publisher, Subscriber
from dray.errors import BufferClosedError, StreamTimeout

__all__ = ["route"]


@contextlib.contextmanager
def producer_elsewhere(route: Route, count: int) -> Iterator[int]:
    """A process that has put the numbers 0 … count - 1 into the stream; its pid."""
    if route.kind == "ucx":
        pytest.skip("UCX does not work in a forked child of a process that has used it")

    def produce(ready: int) -> None:
        with route.producer(drain_timeout=None) as producer:
            for each in range(count):
                producer.put(number=each)
            os.write(ready, "".join(producer.addresses).encode() or b"-")
            threading.Event().wait()

    with forked(produce) as (pid, reading):
        address = os.read(reading, 200).decode()
        if not route.by_name:
            route.addresses.append(address)
        yield pid


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[Callable[[], None]]:
    """The process stands still in the block, or until it is resumed."""
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)

    def resume() -> None:
        os.kill(pid, signal.SIGCONT)

    try:
        yield resume
    finally:
        resume()


def wait_for_hand_out(consumer: Consumer) -> None:
    wait_until(lambda: consumer.ready, "a payload that is announced")


def polled(call: Callable[[], Payload]) -> Payload:
    """What a call without a wait returns as soon as it returns something."""
    found: list[Payload] = []

    def poll() -> bool:
        with contextlib.suppress(StreamTimeout):
            found.append(call())
        return bool(found)

    wait_until(poll, "a call that has something")
    return found[0]


def test_a_payload_whose_bytes_come_late_is_got_by_a_later_call_and_by_no_other_consumer(route: Route) -> None:
    with producer_elsewhere(route, 2) as pid, route.consumer(ack="manual") as consumer:
        first = consumer.get(SECONDS)
        wait_for_hand_out(consumer)
        with stopped(pid), route.consumer() if route.by_name else contextlib.nullcontext():
            if route.in_place:
                assert number(consumer.get(0.05)) == 1  # no process is needed for it
                return
            for _ in range(3):
                with pytest.raises(StreamTimeout, match="the bytes have not come of payload"):
                    consumer.get(0.05)
        second = consumer.get(SECONDS)
        assert (number(first), number(second), second.deliveries) == (0, 1, 1)
        assert (consumer.statistics().lost, consumer.statistics().attached) == (0, 1)
        consumer.acknowledge([first, second])


def test_payloads_of_other_producers_come_while_one_stands_still(route: Route) -> None:
    with producer_elsewhere(route, 1) as pid, route.producer() as producer, route.consumer() as consumer:
        wait_for_hand_out(consumer)
        with stopped(pid) as resume:
            for each in range(10, 20):
                producer.put(number=each)
                if route.in_place and each == 10:
                    assert number(consumer.get(SECONDS)) == 0
                assert number(consumer.get(SECONDS)) == each
            resume()
            if not route.in_place:
                assert number(consumer.get(SECONDS)) == 0
            consumer.close()


def test_calls_without_a_wait_get_every_payload(route: Route) -> None:
    with route.producer() as producer, route.consumer() as consumer:
        with pytest.raises(StreamTimeout):
            consumer.get(timeout=0)
        for each in range(6):
            producer.put(number=each)
        found = [polled(lambda: consumer.get(timeout=0)) for _ in range(6)]
        assert [number(payload) for payload in found] == list(range(6))
        assert not any(payload.redelivered for payload in found)
        consumer.close()


def test_newest_without_a_wait_gets_the_version(route: Route) -> None:
    options = {} if route.by_name else {"listen": f"{route.kind}://127.0.0.1:0", "secret": route.secret}
    with Publisher(route.name, scope=route.name, **options) as publisher:  # type: ignore[arg-type]
        source = route.name if route.by_name else publisher.addresses[0]
        options = {"scope": route.name, "direct": route.in_place} if route.by_name else {"secret": route.secret}
        with Subscriber(source, **options) as subscriber:  # type: ignore[arg-type]
            for version in (1, 2, 3):
                publisher.publish({"w": [version] * 1000})
                found: list[int] = []

                def poll(found: list[int] = found, version: int = version) -> bool:
                    with contextlib.suppress(StreamTimeout):
                        weights = subscriber.newest(after=version - 1, timeout=0)
                        assert set(weights["w"].tolist()) == {weights.version}
                        found.append(weights.version)
                    return bool(found)

                wait_until(poll, "the version")
                assert found == [version]


def test_an_event_loop_runs_on_while_bytes_do_not_come(route: Route) -> None:
    async def consume(pid: int) -> tuple[int, int]:
        with route.consumer() as consumer:
            wait_for_hand_out(consumer)
            with stopped(pid) as resume:
                getting = asyncio.ensure_future(anext(consumer))
                turns = 0
                while not getting.done() and turns < 5:
                    await asyncio.wait((getting,), timeout=0.02)
                    turns += 1
                resume()
                payload: Payload = await asyncio.wait_for(getting, SECONDS)
                return number(payload), turns

    with producer_elsewhere(route, 1) as pid:
        found, turns = asyncio.run(consume(pid))
    assert found == 0
    assert turns == (1 if route.in_place else 5)


def test_close_ends_a_read_that_is_under_way(route: Route) -> None:
    with producer_elsewhere(route, 1) as pid:
        consumer = route.consumer()
        wait_for_hand_out(consumer)
        with stopped(pid):
            if not route.in_place:
                with pytest.raises(StreamTimeout):
                    consumer.get(0.05)
            threads = [each for each in threading.enumerate() if each.name == "dray-stream-read"]
            assert len(threads) == (not route.in_place)
            consumer.close()
            assert not any(each.is_alive() for each in threads)
            with pytest.raises(BufferClosedError):
                consumer.get(0)


def test_a_producer_that_dies_while_its_payload_is_read_is_counted(route: Route) -> None:
    if route.in_place:
        pytest.skip("nothing is read from the process")
    with producer_elsewhere(route, 1) as pid, route.consumer() as consumer:
        wait_for_hand_out(consumer)
        with stopped(pid):
            with pytest.raises(StreamTimeout):
                consumer.get(0.05)
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with in_thread(lambda: consumer.get(0.5)) as got, pytest.raises(StreamTimeout, match="1 have died"):
            got()
        assert consumer.statistics().lost == 1


def test_a_host_that_does_not_answer_delays_no_other_producer() -> None:
    route = Route("tcp")
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        route.producer() as producer,
        Consumer(
            [f"tcp://127.0.0.1:{silent.getsockname()[1]}", *producer.addresses], secret=route.secret
        ) as consumer,
    ):
        connection, _ = silent.accept()
        with connection:
            connection.recv(1000)
            for each in range(100):
                producer.put(number=each)
                assert number(consumer.get(SECONDS)) == each
            connection.setblocking(False)
            with pytest.raises(BlockingIOError):  # it waits for the answer still
                connection.recv(1000)
            assert consumer.producers == (f"tcp:{producer.addresses[0].removeprefix('tcp://')}",)
            consumer.close()
            assert connection.recv(1000) == b""


def test_a_producer_that_comes_where_another_has_ended_is_found() -> None:
    route = Route("tcp")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {"scope": route.name, "listen": f"tcp://127.0.0.1:{port}", "secret": route.secret}
    with route.producer() as other, Producer(route.name, **options) as first:  # type: ignore[arg-type]
        with Consumer([*first.addresses, *other.addresses], secret=route.secret, ack="manual") as consumer:
            first.put(number=1)
            old = consumer.get(SECONDS)
            first.close(drain=False)
            with Producer(route.name, **options) as second:  # type: ignore[arg-type]
                second.put(number=2)
                new = consumer.get(SECONDS)
                assert (number(old), number(new)) == (1, 2)
                consumer.acknowledge([old.id, new])  # what is gone is not an error
                consumer.close()
