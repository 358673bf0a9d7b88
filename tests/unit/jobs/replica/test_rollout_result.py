import json
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from dray.jobs import Rollout
from dray.jobs.replica.user_code import (
    MAX_METADATA,
    RolloutPayload,
    UserValueError,
    decoded_metadata,
    returned_payloads,
)


class Worker: ...


def payloads_of(found: object, expected: int | None = None) -> list[RolloutPayload]:
    return returned_payloads(Worker(), found, expected, 7, 3)


ONE = {"x": np.ones(3)}


@pytest.mark.parametrize(
    ("found", "count"),
    [
        (ONE, 1),
        (MappingProxyType(ONE), 1),
        ([ONE], 1),
        ((ONE, ONE), 2),
        ([Rollout(ONE), ONE], 2),
        (Rollout(ONE), 1),
    ],
)
def test_rollout_returns_one_payload_or_several(found: object, count: int) -> None:
    payloads = payloads_of(found)
    assert [list(each.arrays) for each in payloads] == [["x"]] * count
    assert [each.metadata for each in payloads] == [""] * count
    assert [(each.part, each.parts) for each in payloads] == [(part, count) for part in range(count)]
    assert {(each.work_item, each.weight_version) for each in payloads} == {(7, 3)}


def test_metadata_comes_as_it_was_given() -> None:
    metadata = {"prompt": "\u00e4", "turns": [1, 2.5, None, True], "nested": {"a": {}}}
    (payload,) = payloads_of(Rollout(ONE, metadata=metadata))
    assert decoded_metadata(payload.metadata) == metadata
    assert decoded_metadata("") == {}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([], "returned an empty list: it must hold at least one mapping"),
        ((), "returned an empty tuple"),
        ([ONE, None], "returned a list whose item 1 is None: it must return a mapping of names to arrays"),
        ((ONE, {}), "returned a tuple whose item 1 is an empty mapping"),
        ([np.ones(3)], "returned a list whose item 0 is a ndarray"),
        (Rollout(np.ones(3)), "returned a Rollout whose arrays are a ndarray"),  # type: ignore[arg-type]
        ([Rollout({})], "returned a list whose item 0 is a Rollout whose arrays are an empty mapping"),
        (Rollout(ONE, metadata=[1]), "metadata that cannot be carried: it must be a mapping"),  # type: ignore[arg-type]
        (Rollout(ONE, metadata={1: 2}), "metadata that cannot be carried"),  # type: ignore[dict-item]
        (Rollout(ONE, metadata={"a": np.ones(2)}), "metadata that cannot be carried (Object of type ndarray"),
        (Rollout(ONE, metadata={"a": float("nan")}), "metadata that cannot be carried"),
    ],
)
def test_what_rollout_returns_wrongly_is_named(found: object, words: str) -> None:
    with pytest.raises(UserValueError) as caught:
        payloads_of(found)
    assert words in str(caught.value)
    assert str(caught.value).startswith("Worker.rollout()")


def test_metadata_is_bounded() -> None:
    room = MAX_METADATA - len(json.dumps({"a": ""}, separators=(",", ":")))
    payloads_of(Rollout(ONE, metadata={"a": "x" * room}))
    with pytest.raises(UserValueError, match="16,385 bytes of metadata: at most 16,384 are allowed"):
        payloads_of(Rollout(ONE, metadata={"a": "x" * (room + 1)}))


@pytest.mark.parametrize("found", [ONE, [ONE], [ONE] * 3])
def test_number_of_payloads_is_that_of_the_job_file(found: Any) -> None:
    assert len(payloads_of([ONE, ONE], 2)) == 2
    with pytest.raises(UserValueError, match=r"payloads?: rollout\.payloads_per_work_item is 2"):
        payloads_of(found, 2)
