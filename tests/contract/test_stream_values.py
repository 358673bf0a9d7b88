"""Nested values through a stream, over every route."""

import numpy as np
import pytest
from stream_fixtures import Route, route
from values import assert_same

from dray import Payload, PayloadSchema, Ragged, RaggedSpec, TextSpec
from dray.errors import SchemaError

__all__ = ["route"]

SAMPLE = {
    "prompt": "Sort: 3 1 2",
    "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": ""}],
    "turns": Ragged.from_rows([np.arange(3), np.arange(0), np.arange(40_000)]),
    "info": {"reward": 0.5, "steps": 3, "hidden": np.ones((50, 100), np.float32), "pair": (np.zeros(2), None)},
}


def hidden(payload: Payload) -> np.ndarray:
    found: np.ndarray = payload["info"]["hidden"]
    return found


def test_nested_values_come_out_as_they_went_in(route: Route) -> None:
    with route.producer() as producer:
        producer.put(**SAMPLE)
        with route.consumer() as consumer:
            payload = consumer.get()
            assert_same(dict(payload), SAMPLE)
            assert payload.in_place == route.in_place
            assert hidden(payload).flags.writeable != route.in_place
            assert str(payload).endswith("info dict>")


def test_copies_of_nested_values_are_writable(route: Route) -> None:
    with route.producer() as producer:
        producer.put(SAMPLE)
        with route.consumer() as consumer:
            payload = consumer.get()
            copied = payload.copy()
            assert_same(copied, SAMPLE)
            copied["info"]["hidden"] += 1
            copied["turns"].values[0] = 7
            assert_same(dict(payload), SAMPLE)


def test_tensors_of_nested_values_are_tensors_and_jagged_ones(route: Route) -> None:
    torch = pytest.importorskip("torch")
    with route.producer() as producer:
        producer.put(SAMPLE)
        with route.consumer() as consumer:
            payload = consumer.get()
            for copy in (True, False):
                tensors = payload.torch(copy=copy)
                assert tensors["turns"].is_nested
                assert [len(row) for row in tensors["turns"].unbind()] == [3, 0, 40_000]
                assert tensors["info"]["hidden"].dtype is torch.float32
                assert tensors["info"]["pair"][1] is None
                assert (tensors["prompt"], tensors["info"]["steps"]) == ("Sort: 3 1 2", 3)
            del tensors


def test_payloads_of_text_alone_are_freed_one_after_the_other(route: Route) -> None:
    with route.producer(slots=2) as producer, route.consumer() as consumer:
        for number in range(20):
            producer.put(text=f"number {number}")
            assert consumer.get()["text"] == f"number {number}"


def test_a_schema_of_nested_values_is_checked_at_both_ends(route: Route) -> None:
    schema = PayloadSchema({"turns": RaggedSpec("I64"), "prompt": TextSpec(max_bytes=20)})
    with route.producer(schema=schema) as producer:
        with pytest.raises(SchemaError, match="'prompt' is a int, expected text"):
            producer.put(turns=[[1]], prompt=3)
        producer.put(turns=[[1, 2], [3]], prompt="text")
        with route.consumer(schema=schema) as consumer:
            payload = consumer.get()
            assert [row.tolist() for row in payload["turns"]] == [[1, 2], [3]]
            assert payload["prompt"] == "text"
