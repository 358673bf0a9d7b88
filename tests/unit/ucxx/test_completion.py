"""Completions: JSON-safe, and recognised by one predicate."""

import json

import pytest
from prefetch_fixtures import ref

from dray.errors import ProtocolError
from dray.ucxx import completion_for, is_completion, reference_of


def test_a_completion_survives_json_and_keys_beside_its_own() -> None:
    completion = json.loads(json.dumps({**completion_for(ref(0)), "prompt": 3}))
    assert is_completion(completion)
    assert reference_of(completion) == ref(0)


@pytest.mark.parametrize("value", [None, 0, "", "text", "dray_payload", {}, {"text": "dray_payload"}, [1], b"x"])
def test_anything_else_is_none(value: object) -> None:
    assert not is_completion(value)


@pytest.mark.parametrize("inside", ["", "{}", 7, None, {"p": "00"}])
def test_a_broken_reference_is_an_error_and_not_some_other_output(inside: object) -> None:
    assert is_completion({"dray_payload": inside})
    with pytest.raises(ProtocolError):
        reference_of({"dray_payload": inside})
