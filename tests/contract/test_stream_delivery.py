"""What a stream promises, over every route: by name in place and over a socket, by address over tcp and ucx."""

import asyncio
import contextlib
import itertools
import os
import pickle
import signal
import threading
from typing import Literal

import numpy as np
import pytest
from stream_fixtures import SECONDS, Route, consumers_of, forked, in_thread, number, route, wait_for_consumers
from waiting import wait_until

import dray
from dray import Consumer, Payload, PayloadSchema, Producer, TensorSpec
from dray.clock import Deadline
from dray.errors import (
    BufferClosedError,
    BufferFullError,
    ConfigError,
    PayloadTooLargeError,
    ProtocolError,
    SchemaError,
    StreamEnded,
    StreamTimeout,
    UndeliveredError,
)

__all__ = ["route"]


def put_numbers(producer: Producer, count: int, first: int = 0) -> None:
    for each in range(first, first + count):
        producer.put(number=each)


def test_arrays_come_out_as_they_went_in(route: Route) -> None:
    rng = np.random.default_rng(1)
    sent = [
        {"a": rng.random((size // 8, 2)), "b": rng.integers(0, 9, size, np.int8), "flag": np.array(True)}
        for size in (0, 1, 1000, 200_000)
    ]
    with route.producer() as producer, route.consumer() as consumer:
        with in_thread(lambda: [producer.put(arrays, timeout=SECONDS) for arrays in sent]) as put:
            for arrays in sent:
                payload = consumer.get(SECONDS)
                assert payload.keys() == arrays.keys()
                for name, array in arrays.items():
                    np.testing.assert_array_equal(payload[name], array)
                    assert payload[name].dtype == array.dtype
                assert payload.in_place is route.in_place
            consumer.close()
            assert len(put()) == len(sent)


def test_payloads_come_in_the_order_of_their_producer_and_the_loop_ends_with_it(route: Route) -> None:
    producer = route.producer()

    def produce() -> None:
        with producer:
            put_numbers(producer, 100)

    with in_thread(produce) as produced, route.consumer() as consumer:
        assert [number(payload) for payload in consumer] == list(range(100))
        produced()
        with pytest.raises(StreamEnded):
            consumer.get(SECONDS)
        statistics = consumer.statistics()
    assert (statistics.payloads, statistics.acknowledged, statistics.redelivered) == (100, 100, 0)


def test_each_payload_of_a_group_goes_to_one_consumer(route: Route) -> None:
    producers = [route.producer() for _ in range(3)]
    names = [producer.id for producer in producers]

    def consume() -> list[tuple[bytes, int]]:
        with route.consumer() as consumer:
            return [(payload.id.producer, number(payload)) for payload in consumer]

    with contextlib.ExitStack() as running:
        consuming = [running.enter_context(in_thread(consume)) for _ in range(3)]
        for producer in producers:
            wait_for_consumers(producer, 3)
        for producer in producers:
            running.enter_context(in_thread(lambda producer=producer: put_and_close(producer, 50)))
        found = [each for result in consuming for each in result()]
    assert sorted(found) == sorted((name, each) for name in names for each in range(50))


def put_and_close(producer: Producer, count: int) -> None:
    with producer:
        put_numbers(producer, count)


def test_every_group_gets_every_payload(route: Route) -> None:
    producer = route.producer(groups=("train", "log"))

    def consume(group: str) -> list[int]:
        with route.consumer(group=group) as consumer:
            return [number(payload) for payload in consumer]

    with in_thread(lambda: consume("train")) as trained, in_thread(lambda: consume("log")) as logged:
        put_and_close(producer, 40)
        assert trained() == logged() == list(range(40))


def test_a_group_that_the_producer_does_not_have_is_an_error_that_names_those_that_it_has(route: Route) -> None:
    with route.producer(groups=("train",)):
        with pytest.raises(ProtocolError, match="no group 'log', only 'train'"), route.consumer(group="log"):
            pass


# --- acknowledgement --------------------------------------------------------------------------------------------


def test_an_exception_that_leaves_the_block_gives_the_payload_to_another_consumer(route: Route) -> None:
    with route.producer() as producer:
        put_numbers(producer, 3)

        def consume() -> None:
            with route.consumer() as consumer:
                for payload in consumer:
                    if number(payload) == 1:
                        raise ValueError("bad")

        with pytest.raises(ValueError, match="bad"):
            consume()
        with route.consumer() as consumer:
            again = consumer.get(SECONDS)
            assert (number(again), again.redelivered, again.deliveries) == (1, True, 2)
            assert number(consumer.get(SECONDS)) == 2


def test_break_and_a_clean_exit_acknowledge(route: Route) -> None:
    with route.producer() as producer:
        put_numbers(producer, 3)
        with route.consumer() as consumer:
            for payload in consumer:
                if number(payload) == 1:
                    break
        with route.consumer() as consumer:
            payload = consumer.get(SECONDS)
            assert number(payload) == 2


def test_an_exception_that_the_loop_body_catches_acknowledges_with_the_next_payload(route: Route) -> None:
    with route.producer() as producer:
        put_numbers(producer, 2)

        def consume() -> None:
            with route.consumer() as consumer:
                assert number(next(consumer)) == 0
                with contextlib.suppress(ValueError):
                    raise ValueError("the consumer does not see this")
                assert number(next(consumer)) == 1
                raise KeyError

        with pytest.raises(KeyError):
            consume()
        with route.consumer() as consumer:
            assert number(consumer.get(SECONDS)) == 1


def test_with_manual_acknowledgement_only_what_is_acknowledged_is_consumed(route: Route) -> None:
    with route.producer() as producer:
        put_numbers(producer, 4)
        with route.consumer(ack="manual", prefetch=4) as consumer:
            payloads = consumer.batch(4, timeout=SECONDS)
            consumer.acknowledge(payloads[2])
            consumer.acknowledge([payloads[0].id, payloads[2].id])
            payloads[1].release()
        with route.consumer() as consumer:
            found = [number(payload) for payload in consumer.batch(2, timeout=SECONDS)]
        assert sorted(found) == [1, 3]


def test_an_id_can_be_acknowledged_by_another_consumer(route: Route) -> None:
    with route.producer() as producer, route.consumer(ack="manual") as consumer:
        producer.put(number=7)
        sent = pickle.dumps(consumer.get(SECONDS).id)
        with route.consumer(ack="manual") as trainer:
            trainer.acknowledge(pickle.loads(sent))  # noqa: S301
        assert producer.drain(SECONDS) == 0


def test_a_payload_that_is_released_comes_again_marked(route: Route) -> None:
    with route.producer() as producer, route.consumer(ack="manual") as consumer:
        producer.put(number=1)
        first = consumer.get(SECONDS)
        assert not first.redelivered
        first.release()
        again = consumer.get(SECONDS)
        assert again.id == first.id
        assert again.redelivered
        again.acknowledge()


def test_a_payload_that_fails_repeatedly_becomes_a_dead_letter(route: Route) -> None:
    letters: list[dray.streams.DeadLetter] = []
    with route.producer(max_deliveries=2, on_dead_letter=letters.append) as producer:
        with route.consumer(ack="manual") as consumer:
            producer.put(number=1)
            consumer.get(SECONDS).release()
            consumer.get(SECONDS).release()
            wait_until(lambda: letters, "the dead letter")
            producer.put(number=2)
            payload = consumer.get(SECONDS)
            assert number(payload) == 2
            consumer.acknowledge(payload)
    (letter,) = letters
    assert (letter.group, letter.deliveries, int(letter.arrays["number"])) == ("default", 2, 1)


# --- flow -------------------------------------------------------------------------------------------------------


def test_put_waits_and_then_names_the_stream_and_that_no_consumer_was_there() -> None:
    route = Route("name")
    producer = route.producer(slots=2)
    put_numbers(producer, 2)
    with pytest.raises(BufferFullError, match=rf"{route.name}.*'default', to which no consumer has ever attached"):
        producer.put(number=2, timeout=0.05)
    producer.close(drain=False)


def test_put_names_the_group_and_the_process_that_hold_the_oldest_payload(route: Route) -> None:
    producer = route.producer(slots=4, groups=("train", "log"))
    with route.consumer(group="train", prefetch=4) as trainer, route.consumer(group="log", ack="manual") as logger:
        put_numbers(producer, 1)
        slow = logger.get(SECONDS)
        put_numbers(producer, 3, first=1)
        assert [number(each) for each in trainer.batch(4, timeout=SECONDS)] == [0, 1, 2, 3]
        trainer.acknowledge([])
        holder = f"process {os.getpid()}" if route.by_name else "process None"
        with pytest.raises(BufferFullError, match=rf"'log', whose consumer, {holder}, uses it"):
            producer.put(number=4, timeout=0.05)
        slow.acknowledge()
    producer.close(drain=False)


def test_at_most_prefetch_payloads_lie_unbegun_at_a_consumer(route: Route) -> None:
    producers = [route.producer(drain_timeout=0.0) for _ in range(6)]
    with route.consumer(prefetch=2) as consumer:
        for producer in producers:
            wait_for_consumers(producer)
            put_numbers(producer, 3)
        consumer.get(SECONDS)  # the program works on it from now on

        if route.in_place:  # what is on its way over a socket comes back with the next call
            groups = [producer.statistics()[0] for producer in producers]
            assert sum(group.given - group.returned for group in groups) - 1 <= 2
        seen = [number(consumer.get(SECONDS)) for _ in range(17)]
        assert sorted([0, *seen]) == sorted(list(range(3)) * 6)
        assert consumer.statistics().redelivered == 0
    for producer in producers:
        producer.close()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_producers_that_join_get_their_turns_beside_one_that_never_pauses(route: Route, prefetch: int) -> None:
    ended = threading.Event()

    def put_on(producer: Producer) -> None:
        number = 0
        while not ended.is_set():
            with contextlib.suppress(BufferFullError):
                producer.put(number=number, timeout=0.1)
                number += 1

    def read_ids(consumer: Consumer, count: int) -> list[bytes]:
        found = []
        for payload in itertools.islice(consumer, count):
            found.append(payload.id.producer)
            threading.Event().wait(0.001)  # the program works: payloads wait for it
        return found

    with contextlib.ExitStack() as opened:
        first = opened.enter_context(route.producer(slots=4))
        opened.enter_context(in_thread(lambda: put_on(first)))
        opened.callback(ended.set)
        if route.by_name:
            consumer = opened.enter_context(route.consumer(prefetch=prefetch))
            assert set(read_ids(consumer, 20)) == {first.id}
        others = [opened.enter_context(route.producer(slots=4)) for _ in range(2)]
        if not route.by_name:
            consumer = opened.enter_context(route.consumer(prefetch=prefetch))
        for each in others:
            opened.enter_context(in_thread(lambda each=each: put_on(each)))
            opened.callback(ended.set)
        producers = (first, *others)
        deadline = Deadline.after(20)
        while not {each.id for each in producers} <= set(read_ids(consumer, 50)):
            assert not deadline.expired, "a producer that has joined gets no turn"
        found = read_ids(consumer, 150)
        shares = [found.count(each.id) for each in producers]
        assert min(shares) >= 5, shares
        ended.set()
        consumer.close()
        for each in producers:
            each.close(drain=False)


@pytest.mark.parametrize("on_full", ["block", "overwrite"])
def test_payloads_of_a_producer_come_in_their_order_also_where_some_are_given_back(
    on_full: Literal["block", "overwrite"],
) -> None:
    route = Route("name")  # where producers see raised credit before they know what was given back

    def produce(_: int) -> None:
        with route.producer(on_full=on_full) as producer:
            for each in itertools.count():
                producer.put(number=each)
                if each % 5 == 0:
                    threading.Event().wait(0.002)

    with contextlib.ExitStack() as opened:
        consumer = opened.enter_context(route.consumer(prefetch=8))
        for _ in range(6):
            opened.enter_context(forked(produce))
        last: dict[bytes, int] = {}
        for payload in itertools.islice(consumer, 4_000):
            if not payload.redelivered:
                assert payload.id.sequence > last.get(payload.id.producer, -1)
                last[payload.id.producer] = payload.id.sequence
        assert len(last) == 6
        assert consumer.statistics().returned > 0
        consumer.close()


def test_a_full_ring_that_overwrites_hands_out_the_newest_payloads(route: Route) -> None:
    with route.producer(slots=4, on_full="overwrite", drain_timeout=SECONDS) as producer:
        put_numbers(producer, 20)
        with route.consumer() as consumer:
            found = [number(consumer.get(SECONDS)) for _ in range(4)]
        assert found == [16, 17, 18, 19]


def test_kept_arrays_do_not_stop_the_loop(route: Route, caplog: pytest.LogCaptureFixture) -> None:
    producer = route.producer(slots=16)
    with in_thread(lambda: put_and_close(producer, 60)), route.consumer() as consumer:
        kept = list(consumer)
        copied = consumer.statistics().copied
    assert [number(payload) for payload in kept] == list(range(60))
    assert (copied > 0) is route.in_place
    warnings = [record for record in caplog.records if "payload.copy()" in record.message]
    assert len(warnings) == route.in_place


def test_copies_and_tensors_are_writable_and_the_arrays_are_not(route: Route) -> None:
    torch = pytest.importorskip("torch")
    with route.producer() as producer, route.consumer() as consumer:
        producer.put(x=np.arange(4.0))
        payload = consumer.get(SECONDS)
        if route.in_place:
            with pytest.raises(ValueError, match="read-only"):
                payload["x"][0] = 1
        copy, tensors = payload.copy(), payload.torch()
        copy["x"][0] = tensors["x"][0] = 9
        assert payload["x"][0] == 0
        assert torch.equal(tensors["x"][1:], torch.arange(1.0, 4.0, dtype=torch.float64))


# --- coming and going -------------------------------------------------------------------------------------------


def test_what_is_not_consumed_in_time_is_lost_and_counted(route: Route) -> None:
    producer = route.producer(drain_timeout=0.1)
    put_numbers(producer, 3)
    with pytest.raises(UndeliveredError, match="3 payloads were not consumed and are lost") as caught:
        producer.close()
    assert caught.value.lost == 3
    producer.close()
    with pytest.raises(BufferClosedError):
        producer.put(number=1)


def test_after_an_exception_in_its_block_a_producer_does_not_wait(
    route: Route, caplog: pytest.LogCaptureFixture
) -> None:

    def produce() -> None:
        with route.producer(drain_timeout=None) as producer:
            producer.put(number=1)
            raise KeyError

    with pytest.raises(KeyError):
        produce()
    assert "1 payloads were not consumed and are lost" in caplog.text


def test_a_payload_that_is_too_large_or_cannot_be_packed_leaves_the_stream_as_it_was(route: Route) -> None:
    with route.producer(slot_bytes=4096) as producer, route.consumer() as consumer:
        with pytest.raises(PayloadTooLargeError):
            producer.put(x=np.zeros(4096))
        with pytest.raises(dray.errors.PayloadFormatError):
            producer.put(x=np.array([object()]))
        with pytest.raises(ConfigError, match="a mapping, or keywords, not both"):
            producer.put({"x": 1}, y=2)
        producer.put({"timeout": np.ones(2)})
        assert list(consumer.get(SECONDS)) == ["timeout"]


def test_a_producer_with_another_schema_is_refused(route: Route) -> None:
    one, other = (PayloadSchema({"x": TensorSpec(dtype, (2,))}) for dtype in ("F32", "F64"))
    with route.producer(schema=one) as producer:
        with pytest.raises(SchemaError, match="another schema"), route.consumer(schema=other):
            pass
        with route.consumer(schema=one) as consumer:
            producer.put(x=np.ones(2, np.float32))
            assert consumer.get(SECONDS)["x"].dtype == np.float32


def test_close_in_another_thread_ends_a_wait(route: Route) -> None:
    with route.producer() as producer:
        consumer = route.consumer()
        with in_thread(lambda: consumer.get(None)) as got:
            wait_for_consumers(producer)
            consumer.close()
            with pytest.raises(BufferClosedError):
                got()
        consumer.close()


def test_a_consumer_of_a_producer_that_is_killed_counts_it_and_continues_with_the_others(route: Route) -> None:
    if not route.by_name:
        pytest.skip("the address of a producer in another process is not known here")

    def produce(ready: int) -> None:
        with route.producer() as producer:
            put_numbers(producer, 1)
            os.write(ready, b"x")
            threading.Event().wait()

    with forked(produce) as (pid, reading), route.consumer() as consumer:
        os.read(reading, 1)
        assert number(consumer.get(SECONDS)) == 0
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with pytest.raises(StreamTimeout, match="1 have died"):
            consumer.get(0.2)
        assert consumer.statistics().lost == 1
        with route.producer() as producer:
            producer.put(number=5)
            assert number(consumer.get(SECONDS)) == 5
            consumer.close()


def test_payloads_of_a_consumer_that_is_killed_go_to_another(route: Route) -> None:
    if route.kind == "ucx":
        pytest.skip("UCX does not work in a forked child of a process that has used it")
    with route.producer() as producer:

        def consume(ready: int) -> None:
            consumer = route.consumer()
            consumer.get(SECONDS)
            os.write(ready, b"x")
            threading.Event().wait()

        put_numbers(producer, 4)
        with forked(consume) as (pid, reading):
            os.read(reading, 1)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            with route.consumer() as consumer:
                found = [consumer.get(SECONDS) for _ in range(4)]
                assert sorted(number(each) for each in found) == [0, 1, 2, 3]
                first = next(each for each in found if number(each) == 0)
                assert first.redelivered


# --- ways to wait -----------------------------------------------------------------------------------------------


def test_get_raises_after_its_timeout_and_loses_nothing(route: Route) -> None:
    with route.producer() as producer, route.consumer() as consumer:
        with pytest.raises(TimeoutError):
            consumer.get(0.05)
        producer.put(number=1)
        assert number(consumer.get(SECONDS)) == 1


def test_a_batch_that_is_not_complete_in_time_is_kept_for_the_next_call(route: Route) -> None:
    with route.producer() as producer, route.consumer() as consumer:
        put_numbers(producer, 2)
        with pytest.raises(StreamTimeout):
            consumer.batch(3, timeout=0.2)
        put_numbers(producer, 2, first=2)
        assert [number(each) for each in consumer.batch(3, timeout=SECONDS)] == [0, 1, 2]
        assert number(consumer.get(SECONDS)) == 3


def test_a_batch_has_fewer_payloads_when_the_producers_put_no_more(route: Route) -> None:
    producer = route.producer()
    with in_thread(lambda: put_and_close(producer, 5)) as closed, route.consumer() as consumer:
        assert [number(each) for each in consumer.batch(3, timeout=SECONDS)] == [0, 1, 2]
        assert [number(each) for each in consumer.batch(3, timeout=SECONDS)] == [3, 4]
        with pytest.raises(StreamEnded):
            consumer.batch(3, timeout=SECONDS)
        closed()


def test_ready_reports_how_many_payloads_need_no_wait(route: Route) -> None:
    with route.producer() as producer, route.consumer() as consumer:
        assert consumer.ready == 0
        put_numbers(producer, 1)

        def is_ready() -> bool:
            with contextlib.suppress(StreamTimeout):
                consumer.batch(2, timeout=0.2)
            return consumer.ready == 1

        wait_until(is_ready, "the payload")
        assert number(consumer.get(SECONDS)) == 0


def test_async_for_gets_every_payload(route: Route) -> None:
    producer = route.producer()

    async def consume() -> list[int]:
        with route.consumer() as consumer:
            return [number(payload) async for payload in consumer]

    with in_thread(lambda: put_and_close(producer, 30)):
        assert asyncio.run(asyncio.wait_for(consume(), SECONDS)) == list(range(30))


def test_a_cancelled_wait_of_an_event_loop_loses_nothing(route: Route) -> None:
    async def consume(producer: Producer) -> int:
        with route.consumer() as consumer:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(consumer), 0.05)
            producer.put(number=3)
            payload: Payload = await asyncio.wait_for(anext(consumer), SECONDS)
            return number(payload)

    with route.producer() as producer:
        assert asyncio.run(consume(producer)) == 3


def test_a_consumer_travels_to_another_process_and_attaches_there(route: Route) -> None:
    with route.producer() as producer:
        consumer = route.consumer()
        copy: Consumer = pickle.loads(pickle.dumps(consumer))  # noqa: S301
        put_numbers(producer, 1)
        assert consumers_of(producer) == 0
        with copy:
            assert number(copy.get(SECONDS)) == 0


def test_a_forked_child_is_a_consumer_of_its_own(route: Route) -> None:
    if route.kind == "ucx":
        pytest.skip("UCX does not work in a forked child of a process that has used it")
    with route.producer() as producer, route.consumer(prefetch=1) as consumer:
        put_numbers(producer, 1)
        assert number(consumer.get(SECONDS)) == 0

        def consume(found: int) -> None:
            with consumer:
                mine = number(consumer.get(SECONDS))
            os.write(found, bytes([mine]))

        with forked(consume) as (_, reading):
            wait_for_consumers(producer, 2)
            put_numbers(producer, 1, first=1)
            put_numbers(producer, 1, first=2)
            both = {os.read(reading, 1)[0], number(consumer.get(SECONDS))}
        assert both == {1, 2}


def test_payloads_are_acknowledged_and_released_while_another_thread_waits(route: Route) -> None:
    with route.producer() as producer, route.consumer(ack="manual") as consumer:
        put_numbers(producer, 2)
        first, second = consumer.get(SECONDS), consumer.get(SECONDS)
        with in_thread(lambda: consumer.get(SECONDS)) as got:
            second.release()
            again = got()
            assert again.id == second.id
        with in_thread(lambda: consumer.get(SECONDS)) as got:
            consumer.acknowledge([first, again.id])
            producer.put(number=2, timeout=SECONDS)
            third = got()
        assert number(third) == 2
        third.acknowledge()
