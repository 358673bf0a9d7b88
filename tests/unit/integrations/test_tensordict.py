"""TensorDicts in and out of payloads."""

import secrets
import sys
from typing import Any

import numpy as np
import pytest
import tensordict
import torch

from dray import Consumer, Producer
from dray.errors import ConfigError, MissingDependencyError, PayloadFormatError
from dray.integrations.tensordict import from_tensordict, to_tensordict


def test_nested_fields_get_their_path_as_name() -> None:
    fields = from_tensordict({"a": torch.zeros(2), "next": {"a": np.ones(2), "deep": {"b": torch.ones(1)}}})
    assert list(fields) == ["a", "next.a", "next.deep.b"]


@pytest.mark.parametrize(
    "refused", [{"a.b": torch.zeros(1)}, {1: torch.zeros(1)}, {"a": "text"}, {"a": {}}, {"a": {"b": None}}]
)
def test_what_would_not_come_out_again_is_refused(refused: Any) -> None:
    with pytest.raises(PayloadFormatError):
        from_tensordict(refused)


def test_without_the_package_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensordict", None)
    with pytest.raises(MissingDependencyError, match="pip install tensordict"):
        to_tensordict({})


def test_a_tensordict_comes_out_of_a_stream_as_it_went_in() -> None:
    sent = tensordict.TensorDict(
        {
            "observation": torch.arange(6, dtype=torch.float32).reshape(3, 2),
            "next": {"reward": torch.ones(3, dtype=torch.bfloat16), "done": torch.tensor([False, True, False])},
        },
        batch_size=[3],
    )
    scope = f"test-{secrets.token_hex(4)}"
    with Producer("x", scope=scope, slots=2, slot_bytes=1 << 14) as producer:
        producer.put(from_tensordict(sent))
        with Consumer("x", scope=scope) as consumer:
            got = to_tensordict(consumer.get(), batch_dims=1)
    assert got.batch_size == sent.batch_size
    assert (got == sent).all()
    assert got["next", "reward"].dtype is torch.bfloat16
    got["observation"].add_(1)  # its memory is its own


def test_values_that_are_no_tensors_are_refused() -> None:
    for value in (tensordict.NonTensorData("text", batch_size=[2]), tensordict.NonTensorStack("two", "texts")):
        with pytest.raises(PayloadFormatError, match="'a'"):
            from_tensordict(tensordict.TensorDict({"a": value, "b": torch.zeros(2)}, batch_size=[2]))


def test_fields_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="batch_dims"):
        to_tensordict({"a": np.zeros(3), "b": np.zeros(4)}, batch_dims=1)
    for names in (("a", "a.b"), ("a.b", "a")):
        with pytest.raises(PayloadFormatError):
            to_tensordict(dict.fromkeys(names, np.zeros(1)))
