"""Completions: JSON-safe, and recognised by one predicate."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from prefetch_fixtures import ref

from dray.errors import ProtocolError
from dray.ucxx import completion_for, is_completion, reference_of

REFERENCE = ref(0)
FORMS: dict[str, Any] = {
    "mapping": completion_for(REFERENCE),
    "reference": REFERENCE,
    "text of a mapping": json.dumps({"work_item": 3, **completion_for(REFERENCE)}),
    "text of a reference": REFERENCE.to_json(),
}


def test_a_completion_survives_json_and_keys_beside_its_own() -> None:
    completion = json.loads(json.dumps({**completion_for(ref(0)), "work_item": 3}))
    assert is_completion(completion)
    assert reference_of(completion) == ref(0)


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_completion_is_one_also_as_the_attribute_of_an_object(form: str) -> None:
    for value in (FORMS[form], SimpleNamespace(completion=FORMS[form], work_item="text")):
        assert is_completion(value)
        assert reference_of(value) == REFERENCE


@pytest.mark.parametrize(
    "value",
    [
        None, 0, "", "text", "dray_payload", {}, {"text": "dray_payload"}, [1], b"x", "{", '["dray_payload"]',
        "[" * 9999, '{"text": "dray_payload"}',
        '{"p": 1, "s": 2}', {"completion": completion_for(REFERENCE)}, [REFERENCE],
    ],
)  # fmt: skip
def test_anything_else_is_none_also_as_the_attribute_of_an_object(value: object) -> None:
    for each in (value, SimpleNamespace(completion=value)):
        assert not is_completion(each)
        with pytest.raises(ProtocolError):
            reference_of(each)


def test_an_object_in_an_object_is_not_looked_into() -> None:
    assert not is_completion(SimpleNamespace(completion=SimpleNamespace(completion=REFERENCE)))


@pytest.mark.parametrize("inside", ["", "{}", 7, None, {"p": "00"}])
def test_a_broken_reference_is_an_error_and_not_some_other_output(inside: object) -> None:
    broken = {"dray_payload": inside}
    for value in (broken, json.dumps(broken), SimpleNamespace(completion=broken)):
        assert is_completion(value)
        with pytest.raises(ProtocolError):
            reference_of(value)
