"""`Batch` and `Collate`, and what `PayloadDataset` refuses."""

import copy
import importlib
import secrets
import sys

import pytest
import torch
from torch.utils.data import default_collate, default_convert
from torch.utils.data._utils.pin_memory import pin_memory

from dray import Producer
from dray.errors import ConfigError, MissingDependencyError
from dray.identifiers import PayloadId
from dray.integrations.torch_data import Batch, Collate, PayloadDataset


def sample(number: int, deliveries: int = 1) -> Batch:
    return Batch({"x": torch.full((2,), number)}, [PayloadId(bytes(16), number, 0, 64)], [deliveries])


class Pageable:
    """A value that can be pinned, without a device."""

    def pin_memory(self) -> str:
        return "pinned"


def test_the_default_collate_function_keeps_the_ids() -> None:
    batch = default_collate([sample(1), sample(2, deliveries=3)])
    assert batch["x"].tolist() == [[1, 1], [2, 2]]
    assert [each.sequence for each in batch.ids] == [1, 2]
    assert batch.deliveries == (1, 3)
    assert batch.redelivered


def test_a_collate_function_of_ones_own_gets_plain_dicts_and_keeps_the_ids() -> None:
    def joined(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        assert [type(each) for each in samples] == [dict, dict]
        return {"x": torch.cat([each["x"] for each in samples])}

    batch = Collate(joined)([sample(1), sample(2)])
    assert batch["x"].tolist() == [1, 1, 2, 2]
    assert [each.sequence for each in batch.ids] == [1, 2]
    assert not batch.redelivered


def test_a_collate_function_that_makes_no_mapping_is_an_error() -> None:
    with pytest.raises(TypeError, match="list, not a mapping"):
        Collate(lambda samples: samples)([sample(1)])  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("passed_on", [copy.copy, copy.deepcopy, default_convert])
def test_what_a_loader_does_with_a_batch_keeps_the_ids(passed_on: object) -> None:
    batch = passed_on(sample(7, deliveries=2))  # type: ignore[operator]
    assert type(batch) is Batch
    assert (batch.ids, batch.deliveries) == (sample(7).ids, (2,))
    assert batch["x"].tolist() == [7, 7]


def test_pinning_keeps_the_ids() -> None:
    batch = pin_memory(Batch({"x": Pageable()}, sample(7).ids, (1,)))
    assert batch["x"] == "pinned"
    assert batch.ids == sample(7).ids


@pytest.mark.parametrize("number", [0, -1, 1.0, True])
def test_an_epoch_has_one_payload_or_more(number: object) -> None:
    with pytest.raises(ConfigError, match="payloads_per_epoch"):
        PayloadDataset("x", payloads_per_epoch=number)  # type: ignore[arg-type]


def test_a_batch_without_ids_cannot_be_acknowledged() -> None:
    with PayloadDataset("x") as dataset, pytest.raises(ConfigError, match="Collate keeps the ids"):
        dataset.acknowledge({"x": torch.zeros(2)})  # type: ignore[arg-type]


def test_a_state_of_another_version_is_refused() -> None:
    with PayloadDataset("x") as dataset, pytest.raises(ConfigError, match="version"):
        dataset.load_state_dict({"version": 0, "payloads": 1, "trained": []})


def test_payloads_that_were_used_are_counted_once_and_stay_in_the_state_until_they_are_acknowledged() -> None:
    with PayloadDataset("x") as dataset:
        dataset.trained(sample(1))
        dataset.trained(sample(1).ids)
        dataset.trained(sample(2).ids[0])
        state = dataset.state_dict()
    assert state == {"version": 1, "payloads": 2, "trained": [["00" * 16, 1, 0, 64], ["00" * 16, 2, 0, 64]]}


def test_the_repr_of_a_batch_names_its_fields() -> None:
    assert repr(sample(7)) == "<Batch of 1 payloads: x>"


def test_a_transform_that_makes_no_mapping_is_an_error() -> None:
    name = f"test-{secrets.token_hex(4)}"
    with (
        Producer(name, scope=name) as producer,
        PayloadDataset(name, scope=name, transform=lambda tensors: list(tensors)) as dataset,  # type: ignore[arg-type,return-value]
    ):
        producer.put(x=[1])
        with pytest.raises(TypeError, match="the transform has returned list, not a mapping"):
            next(iter(dataset))
        producer.close(drain=False)


def test_a_batch_that_is_acknowledged_before_the_checkpoint_is_in_no_state() -> None:
    name = f"test-{secrets.token_hex(4)}"
    with Producer(name, scope=name) as producer, PayloadDataset(name, scope=name) as dataset:
        producer.put(x=[1])
        batch = next(iter(dataset))
        dataset.trained(batch)
        assert len(dataset.state_dict()["trained"]) == 1
        dataset.acknowledge(batch)
        assert dataset.state_dict() == {"version": 1, "payloads": 1, "trained": []}
        assert producer.drain(10.0) == 0


def test_without_torch_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "dray.integrations.torch_data")
    with pytest.raises(MissingDependencyError, match=r"dray-rl\[torch\]"):
        importlib.import_module("dray.integrations.torch_data")
