"""Consumers that want a part of each payload, over every route."""

import asyncio
import pickle
from typing import Any

import numpy as np
import pytest
from stream_fixtures import SECONDS, Route, route

from dray import Consumer, Payload
from dray.errors import SelectionError

__all__ = ["route"]

SAMPLE: dict[str, Any] = {
    "observations": np.arange(60_000, dtype=np.float32).reshape(1000, 60),
    "rewards": np.arange(1000, dtype=np.float64),
    "info": {"prompt": "Sort: 3 1 2", "hidden": np.ones((50, 100))},
}
SELECTED: dict[str, Any] = {"fields": ("info.prompt", "observations"), "rows": {"observations": (10, 20)}}


def copied(consumer: Consumer) -> Consumer:
    """The consumer as another process gets it."""
    made: Consumer = pickle.loads(pickle.dumps(consumer))  # noqa: S301
    return made


def check(payload: Payload) -> None:
    assert list(payload) == ["observations", "info"]
    assert np.array_equal(payload["observations"], SAMPLE["observations"][10:20])
    assert payload["info"] == {"prompt": "Sort: 3 1 2"}


def test_payloads_come_with_the_fields_and_rows_that_the_consumer_wants(route: Route) -> None:
    with route.producer() as producer:
        for _ in range(3):
            producer.put(SAMPLE)
        with route.consumer(**SELECTED) as consumer:
            payload = consumer.get(SECONDS)
            check(payload)
            assert payload.in_place is route.in_place
            assert payload["observations"].flags.writeable is not route.in_place
            for payload in consumer.batch(2, timeout=SECONDS):
                check(payload)


def test_a_consumer_in_an_event_loop_gets_the_part(route: Route) -> None:
    async def first(consumer: Consumer) -> Payload:
        async for payload in consumer:
            return payload
        raise AssertionError("the stream has ended")

    with route.producer() as producer:
        producer.put(SAMPLE)
        with route.consumer(**SELECTED) as consumer:
            check(asyncio.run(first(consumer)))


def test_parts_are_copied_when_the_program_keeps_many_of_them(route: Route) -> None:
    with route.producer(slots=16) as producer, route.consumer(ack="manual", **SELECTED) as consumer:
        kept = []
        for _ in range(12):
            producer.put(SAMPLE)
            kept.append(consumer.get(SECONDS))
        for payload in kept:
            check(payload)
        assert (consumer.statistics().copied > 0) is route.in_place
        consumer.acknowledge(kept)
        kept.clear()
        del payload


def test_a_pickled_consumer_wants_the_same_part(route: Route) -> None:
    with route.producer() as producer, copied(route.consumer(**SELECTED)) as consumer:
        producer.put(SAMPLE)
        check(consumer.get(SECONDS))


def test_g1_a_payload_without_the_part_is_an_error_and_is_given_back(route: Route) -> None:
    with route.producer() as producer:
        producer.put(other=np.arange(10_000))
        with route.consumer(fields=("rewards",)) as consumer:
            for _ in range(2):
                with pytest.raises(
                    SelectionError, match="the payload has no field 'rewards'; its fields: 'other'"
                ):
                    consumer.get(SECONDS)
        with route.consumer() as consumer:
            payload = consumer.get(SECONDS)
            assert payload["other"].shape == (10_000,)
            assert payload.redelivered


def test_a_selection_that_no_payload_can_have_is_refused_at_once() -> None:
    with pytest.raises(SelectionError, match="'rewards' is one name"):
        Consumer("test", fields="rewards")
