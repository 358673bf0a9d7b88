"""Streams in torch's `DataLoader`: real workers, forked and spawned, that end in every way."""

import contextlib
import os
import secrets
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from waiting import ends_within, wait_until

from dray import Consumer, Producer
from dray.integrations.torch_data import Batch, Collate, PayloadDataset

FORKED: dict[str, Any] = {
    "num_workers": 2,
    "multiprocessing_context": "fork",
    "persistent_workers": True,
    "in_order": False,  # else a batch of one worker waits for that of another one, which has got no payload
}
SPAWNED: dict[str, Any] = {**FORKED, "multiprocessing_context": "spawn"}
LOADERS = {"in this process": {"num_workers": 0}, "in forked workers": FORKED}
SECONDS = 30.0


@pytest.fixture(scope="module", autouse=True)
def _tracker() -> None:
    """The process that `multiprocessing` starts with the first spawned process, and keeps."""
    resource_tracker.ensure_running()


@pytest.fixture(params=LOADERS, name="options")
def _options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return LOADERS[request.param]


@pytest.fixture(name="scope")
def _scope() -> str:
    return f"test-{secrets.token_hex(4)}"


@contextlib.contextmanager
def producing(scope: str, count: int) -> Iterator[Producer]:
    """A producer that has put `count` payloads of 1, 2, 3, … rows."""
    with Producer("rollouts", scope=scope, slots=64, slot_bytes=1 << 14, drain_timeout=SECONDS) as producer:
        for number in range(count):
            producer.put(number=np.int64(number), rows=np.full((number + 1, 2), number, np.float32))
        yield producer


@contextlib.contextmanager
def until_the_end(loader: Any, dataset: PayloadDataset, producer: Producer) -> Iterator[Iterator[Batch]]:
    """The batches until the stream ends, which it does when all payloads are acknowledged; then all are closed."""
    readers = max(1, loader.num_workers)

    def close() -> None:
        # A worker that attached after the end of the stream would wait for another producer.
        wait_until(lambda: producer.statistics()[0].consumers > readers, "all workers, and the trainer", SECONDS)
        producer.close()

    thread = threading.Thread(target=close)

    def batches() -> Iterator[Batch]:
        for number, batch in enumerate(loader):
            if number == 0:
                thread.start()
            yield batch

    yield batches()
    dataset.close()
    thread.join(SECONDS)
    assert not thread.is_alive()


def numbers_only(tensors: dict[str, Any]) -> dict[str, Any]:
    """A transform that makes fields which can be stacked."""
    return {"number": tensors["number"], "worker": os.getpid()}


def padded(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A collate function for rows of several lengths."""
    return {
        "numbers": torch.stack([sample["number"] for sample in samples]),
        "rows": torch.nn.utils.rnn.pad_sequence([sample["rows"] for sample in samples], batch_first=True),
    }


def rest_of(loader: Any, dataset: PayloadDataset, producer: Producer) -> list[int]:
    """Acknowledge every payload until the stream has ended; their numbers."""
    found = []
    with until_the_end(loader, dataset, producer) as batches:
        for batch in batches:
            found += numbers(batch)
            dataset.acknowledge(batch)
    return found


def numbers(batch: Batch) -> list[int]:
    return [int(each) for each in torch.as_tensor(batch["number"]).flatten()]


def test_epochs_have_as_many_payloads_as_asked_for_and_each_comes_once(
    scope: str, options: dict[str, Any]
) -> None:
    found, sizes = [], []
    with producing(scope, 24) as producer:
        with PayloadDataset("rollouts", scope=scope, payloads_per_epoch=8, transform=numbers_only) as dataset:
            loader = DataLoader(dataset, batch_size=2, **options)
            for _ in range(3):
                sizes.append(0)
                for batch in loader:
                    assert len(batch.ids) == 2
                    found += numbers(batch)
                    sizes[-1] += 2
                    dataset.acknowledge(batch)
            assert producer.drain(SECONDS) == 0
    assert sizes == [8, 8, 8]
    assert sorted(found) == list(range(24))


def test_spawned_workers_transform_collate_and_resume_for_another_epoch(scope: str) -> None:
    found = []
    with (
        producing(scope, 16) as producer,
        PayloadDataset("rollouts", scope=scope, payloads_per_epoch=8) as dataset,
    ):
        loader = DataLoader(dataset, batch_size=4, collate_fn=Collate(padded), **SPAWNED)
        for _ in range(2):
            for batch in loader:
                each = batch["numbers"].tolist()
                assert batch["rows"].shape == (4, max(each) + 1, 2)
                assert batch["rows"].sum(dim=(1, 2)).tolist() == [2 * (n + 1) * n for n in each]
                found += each
                dataset.acknowledge(batch)
        assert producer.drain(SECONDS) == 0
    assert sorted(found) == list(range(16))


def test_without_a_number_an_epoch_ends_with_the_stream(scope: str, options: dict[str, Any]) -> None:
    with producing(scope, 7) as producer, PayloadDataset("rollouts", scope=scope) as dataset:
        loader = DataLoader(dataset, batch_size=None, **options)
        with until_the_end(loader, dataset, producer) as batches:
            found = [number for batch in batches if not dataset.acknowledge(batch) for number in numbers(batch)]
            assert list(loader) == [], "the stream has ended"
    assert sorted(found) == list(range(7))


def test_tensors_are_writable_memory_of_their_own(scope: str, options: dict[str, Any]) -> None:
    with producing(scope, 3) as producer, PayloadDataset("rollouts", scope=scope) as dataset:
        loader = DataLoader(dataset, batch_size=None, **options)
        kept = []
        with until_the_end(loader, dataset, producer) as batches:
            for batch in batches:
                kept.append(batch["rows"].add_(1))
                dataset.acknowledge(batch)
    assert sorted(float(rows[0, 0]) for rows in kept) == [1, 2, 3]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_pinned_batches_can_be_acknowledged(scope: str, options: dict[str, Any]) -> None:
    with producing(scope, 4) as producer, PayloadDataset("rollouts", scope=scope) as dataset:
        loader = DataLoader(dataset, batch_size=None, pin_memory=True, **options)
        assert sorted(rest_of(loader, dataset, producer)) == list(range(4))


def test_what_a_killed_worker_had_comes_again(scope: str) -> None:
    with producing(scope, 12) as producer:
        with PayloadDataset("rollouts", scope=scope, transform=numbers_only) as dataset:
            options = {"batch_size": None, **FORKED}
            iterator = iter(DataLoader(dataset, **options))
            first = next(iterator)
            dataset.acknowledge(first)
            os.kill(first["worker"], signal.SIGKILL)
            found = numbers(first)
            with pytest.raises(RuntimeError, match="killed"):  # of a signal handler of torch
                wait_until(lambda: False, "the report of the loader", SECONDS)
            del iterator
            found += rest_of(DataLoader(dataset, **options), dataset, producer)
    assert set(found) == set(range(12))


def test_a_loop_that_is_left_early_loses_nothing_and_repeats_nothing_that_is_acknowledged(
    scope: str, options: dict[str, Any]
) -> None:
    with producing(scope, 16) as producer, PayloadDataset("rollouts", scope=scope) as dataset:
        loader = DataLoader(dataset, batch_size=None, **options)
        found = []
        for batch in loader:
            found += numbers(batch)
            dataset.acknowledge(batch)
            if len(found) == 3:
                break
        seen = next(iter(loader))  # it is not acknowledged
        found += rest_of(loader, dataset, producer)
    assert sorted(found) == list(range(16))
    assert numbers(seen)[0] in found


def test_workers_that_end_with_their_epoch_lose_nothing(scope: str) -> None:
    options = {**FORKED, "persistent_workers": False}
    found: list[int] = []
    with producing(scope, 12) as producer:
        with PayloadDataset("rollouts", scope=scope, payloads_per_epoch=6) as dataset:
            for _ in range(2):
                for batch in DataLoader(dataset, batch_size=None, **options):
                    found += numbers(batch)
                    dataset.acknowledge(batch)
        with Consumer("rollouts", scope=scope, ack="manual") as consumer:
            while producer.drain(0):  # as many as have come twice
                payload = consumer.get(SECONDS)
                found.append(int(payload["number"]))
                payload.acknowledge()
    assert set(found) == set(range(12))


def test_an_interrupted_epoch_is_resumed_in_the_middle(scope: str, options: dict[str, Any]) -> None:
    sizes = []
    with producing(scope, 30) as producer:
        with PayloadDataset("rollouts", scope=scope, payloads_per_epoch=10) as dataset:
            for used, batch in enumerate(DataLoader(dataset, batch_size=None, **options), start=1):
                dataset.acknowledge(batch)
                if used == 4:
                    break
            state = dataset.state_dict()
        found = []
        with PayloadDataset("rollouts", scope=scope, payloads_per_epoch=10) as dataset:
            dataset.load_state_dict(state)
            loader = DataLoader(dataset, batch_size=None, **options)
            for _ in range(2):
                batches = [batch for batch in loader if not dataset.acknowledge(batch)]
                sizes.append(len(batches))
                found += [number for batch in batches for number in numbers(batch)]
            assert dataset.state_dict() == {"version": 1, "payloads": 20, "trained": []}
        producer.close(drain=False)
    assert sizes == [6, 10]
    assert len(set(found)) == 16


def test_a_payload_whose_effect_is_in_the_checkpoint_is_not_handed_out_again(
    scope: str, options: dict[str, Any]
) -> None:
    with producing(scope, 8) as producer:
        with PayloadDataset("rollouts", scope=scope) as dataset:  # the trainer that crashes
            iterator = iter(DataLoader(dataset, batch_size=None, **options))
            in_checkpoint = []
            for _ in range(3):
                batch = next(iterator)
                in_checkpoint += numbers(batch)
                dataset.trained(batch)
            state = dataset.state_dict()
            after = next(iterator)
            dataset.trained(after)
            del iterator
        with PayloadDataset("rollouts", scope=scope) as dataset:
            dataset.load_state_dict(state)
            found = {}
            loader = DataLoader(dataset, batch_size=None, **options)
            with until_the_end(loader, dataset, producer) as batches:
                for batch in batches:
                    found[numbers(batch)[0]] = batch.redelivered
                    dataset.trained(batch)
                    dataset.saved(dataset.state_dict())
            assert dataset.state_dict() == {"version": 1, "payloads": 8, "trained": []}
    assert sorted([*found, *in_checkpoint]) == list(range(8))
    assert found[numbers(after)[0]], "it was handed out before"


def test_the_workers_of_a_killed_trainer_give_back_what_they_had(scope: str) -> None:
    reading, writing = os.pipe()
    with producing(scope, 8) as producer:
        trainer = os.fork()
        if trainer == 0:
            with contextlib.suppress(Exception):
                dataset = PayloadDataset("rollouts", scope=scope, transform=numbers_only)
                iterator = iter(DataLoader(dataset, batch_size=None, **FORKED))
                batches = [next(iterator), next(iterator)]
                os.write(writing, " ".join(str(batch["worker"]) for batch in batches).encode())
                signal.pause()
            os._exit(1)
        os.close(writing)
        workers = {int(pid) for pid in os.read(reading, 100).split()}
        assert workers, "the trainer has failed"
        wait_until(lambda: producer.statistics()[0].consumers == 2, "both workers to attach")
        os.kill(trainer, signal.SIGKILL)
        os.waitpid(trainer, 0)
        with Consumer("rollouts", scope=scope) as consumer:
            payloads = [consumer.get(SECONDS) for _ in range(8)]
            assert sorted(int(payload["number"]) for payload in payloads) == list(range(8))
            assert any(payload.redelivered for payload in payloads)
            del payloads
        wait_until(lambda: producer.statistics()[0].consumers == 0, "the workers' subscriptions to end")
    for pid in workers:
        assert ends_within(SECONDS, pid)
    os.close(reading)
