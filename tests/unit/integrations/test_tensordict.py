"""TensorDicts in and out of payloads."""

import secrets
import sys

import numpy as np
import pytest
import tensordict
import torch

from dray import Consumer, Producer, pack, unpack
from dray.errors import ConfigError, MissingDependencyError
from dray.integrations.tensordict import from_tensordict, to_tensordict


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


def test_text_and_ragged_tensors_of_a_tensordict_come_out_as_they_went_in() -> None:
    rows = torch.nested.nested_tensor_from_jagged(torch.arange(5.0), torch.tensor([0, 2, 5]))
    sent = tensordict.TensorDict(
        {
            "prompt": tensordict.NonTensorStack("two", "texts"),
            "source": tensordict.NonTensorData("one for all", batch_size=[2]),
            "tokens": rows,
            "next": tensordict.TensorDict({"answer": tensordict.NonTensorStack("a", "b")}, batch_size=[2]),
        },
        batch_size=[2],
    )
    got = to_tensordict(unpack(pack(from_tensordict(sent))), batch_dims=1)
    assert (got["prompt"], got["source"], got["next", "answer"]) == (["two", "texts"], "one for all", ["a", "b"])
    assert got.batch_size == sent.batch_size
    assert [row.tolist() for row in got["tokens"].unbind()] == [[0, 1], [2, 3, 4]]


def test_a_tensordict_can_be_packed_as_it_is() -> None:
    sent = tensordict.TensorDict({"a": torch.zeros(2), "next": {"b": torch.ones(2, 3)}}, batch_size=[2])
    values = unpack(pack(sent))
    assert values["next"]["b"].tolist() == [[1, 1, 1], [1, 1, 1]]


def test_fields_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch_dims.*'next\.b'"):
        to_tensordict({"a": np.zeros(3), "next": {"b": np.zeros(4)}}, batch_dims=1)
