"""What `test_transfer_queue_storage.py` runs in one Ray cluster: ``python queue_scenarios.py LINES [--short]``.

Prints one line of JSON for each scenario: its name, and the traceback if it failed.
"""

import contextlib
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable

import pytest
import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from tensordict import NonTensorStack, TensorDict

from dray.errors import PayloadFormatError, ProducerLostError, StaleSlotError, StoreFullError
from dray.integrations.store import StoreStatistics

MIB = 1 << 20
CONFIG = {
    "controller": {"polling_mode": True},
    "backend": {"storage_backend": "dray", "dray": {"capacity_bytes": 8 * MIB, "put_timeout": 0.2}},
}


@ray.remote(num_cpus=0)
class Worker:
    """Puts and gets in a process of its own."""

    def __init__(self) -> None:
        tq.init(OmegaConf.create(CONFIG))

    def pid(self) -> int:
        return os.getpid()

    def put(self, keys: list[str], batch: TensorDict) -> None:
        tq.kv_batch_put(keys=keys, partition_id="p", fields=batch)

    def get(self, keys: list[str], fields: list[str] | None) -> dict[str, list]:
        found = tq.kv_batch_get(keys=keys, partition_id="p", select_fields=fields)
        columns = {name: found[name] for name in map(str, found.keys())}
        return {name: list(each.unbind() if torch.is_tensor(each) else each) for name, each in columns.items()}

    def clear(self, keys: list[str]) -> None:
        tq.kv_clear(keys=keys, partition_id="p")


def statistics() -> StoreStatistics:
    return tq.get_client().storage_manager.storage_client.store.statistics()


def batch(rows: int) -> TensorDict:
    return TensorDict(
        {
            "dense": torch.arange(rows * 3, dtype=torch.float32).reshape(rows, 3),
            "bf16": torch.full((rows, 2, 2), 1.5, dtype=torch.bfloat16),
            "number": torch.arange(rows),
            "jagged": torch.nested.as_nested_tensor(
                [torch.full((n + 1,), n) for n in range(rows)], layout=torch.jagged
            ),
            "text": NonTensorStack(*[f"text {n}" for n in range(rows)]),
            "info": NonTensorStack(*[{"n": n, "names": ["a", None]} for n in range(rows)]),
        },
        batch_size=[rows],
    )


def another_process_gets_what_was_put(worker: ray.actor.ActorHandle) -> None:
    keys = ["a", "b", "c"]
    tq.kv_batch_put(keys=keys, partition_id="p", fields=batch(3))
    found = ray.get(worker.get.remote(keys, None))
    assert [each.tolist() for each in found["dense"]] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]], found["dense"]
    assert found["bf16"][2].dtype is torch.bfloat16
    assert found["bf16"][2].tolist() == [[1.5, 1.5], [1.5, 1.5]]
    assert [int(each) for each in found["number"]] == [0, 1, 2]
    assert [each.tolist() for each in found["jagged"]] == [[0], [1, 1], [2, 2, 2]]
    assert found["text"] == ["text 0", "text 1", "text 2"]
    assert found["info"] == [{"n": n, "names": ["a", None]} for n in range(3)]


def some_fields_of_some_samples_are_got(worker: ray.actor.ActorHandle) -> None:
    tq.kv_batch_put(keys=list("abcd"), partition_id="p", fields=batch(4))
    found = ray.get(worker.get.remote(["d", "b"], ["jagged", "text"]))
    assert {name: len(rows) for name, rows in found.items()} == {"jagged": 2, "text": 2}
    assert [each.tolist() for each in found["jagged"]] == [[3, 3, 3, 3], [1, 1]]
    assert found["text"] == ["text 3", "text 1"]


def fields_of_one_sample_come_from_several_processes(worker: ray.actor.ActorHandle) -> None:
    tq.kv_batch_put(keys=["a", "b"], partition_id="p", fields=TensorDict({"x": torch.ones(2, 3)}, batch_size=[2]))
    ray.get(worker.put.remote(["b", "a"], TensorDict({"y": torch.tensor([[1.0], [2.0]])}, batch_size=[2])))
    found = tq.kv_batch_get(keys=["a", "b"], partition_id="p")
    assert [each.tolist() for each in found["x"].unbind()] == [[1, 1, 1]] * 2
    assert [each.tolist() for each in found["y"].unbind()] == [[2], [1]]


def cleared_samples_give_their_room_back(worker: ray.actor.ActorHandle) -> None:
    tq.kv_batch_put(keys=list("abcd"), partition_id="p", fields=batch(4))
    assert statistics().payloads == 4
    ray.get(worker.clear.remote(["a", "b", "c"]))
    assert statistics().payloads == 1


def a_field_that_is_put_again_replaces_the_one_before(worker: ray.actor.ActorHandle) -> None:
    for value in (1.0, 2.0, 3.0):
        fields = TensorDict({"x": torch.full((2, 3), value), "y": torch.full((2, 1), value)}, batch_size=[2])
        tq.kv_batch_put(keys=["a", "b"], partition_id="p", fields=fields)
    assert statistics().payloads == 2
    tq.kv_batch_put(keys=["a"], partition_id="p", fields=TensorDict({"x": torch.zeros(1, 3)}, batch_size=[1]))
    found = ray.get(worker.get.remote(["a", "b"], None))
    assert [each.tolist() for each in found["x"]] == [[0, 0, 0], [3, 3, 3]]
    assert [each.tolist() for each in found["y"]] == [[3], [3]]
    ray.get(worker.clear.remote(["a", "b"]))
    assert statistics().payloads == 0


def custom_metadata_is_kept(worker: ray.actor.ActorHandle) -> None:
    fields = TensorDict({"x": torch.ones(2, 3)}, batch_size=[2])
    tq.kv_batch_put(keys=["a", "b"], partition_id="p", fields=fields, tags=[{"score": 1}, {"score": 2}])
    assert {key: tags["score"] for key, tags in tq.kv_list("p")["p"].items()} == {"a": 1, "b": 2}


def a_full_store_is_an_error_that_names_its_capacity(worker: ray.actor.ActorHandle) -> None:
    fields = TensorDict({"x": torch.ones(5, MIB // 4)}, batch_size=[5])
    tq.kv_batch_put(keys=list("abcde"), partition_id="p", fields=fields)
    with pytest.raises(StoreFullError) as caught:
        tq.kv_batch_put(keys=list("fghij"), partition_id="p", fields=fields)
    assert (caught.value.capacity_bytes, caught.value.payloads) == (8 * MIB, 5)
    ray.get(worker.clear.remote(list("abcde")))
    tq.kv_batch_put(keys=list("fghij"), partition_id="p", fields=fields)


def a_value_that_cannot_be_carried_is_refused(worker: ray.actor.ActorHandle) -> None:
    fields = TensorDict({"x": NonTensorStack(print)}, batch_size=[1])
    with pytest.raises(PayloadFormatError):
        tq.kv_batch_put(keys=["a"], partition_id="p", fields=fields)


def the_state_of_the_controller_is_saved_and_loaded(worker: ray.actor.ActorHandle) -> None:
    tq.kv_batch_put(keys=["a", "b"], partition_id="p", fields=batch(2))
    with tempfile.TemporaryDirectory(dir=os.environ["HOME"]) as folder:
        tq.save_checkpoint(f"{folder}/c", include_storage=False)
        tq.load_checkpoint(f"{folder}/c")
    assert ray.get(worker.get.remote(["b"], ["text"]))["text"] == ["text 1"]


def what_is_cleared_cannot_be_got_with_old_metadata(worker: ray.actor.ActorHandle) -> None:
    client = tq.get_client()
    meta = client.put(TensorDict({"x": torch.ones(2, 3)}, batch_size=[2]), partition_id="p")
    assert client.get_data(meta)["x"].unbind()[1].tolist() == [1, 1, 1]
    client.clear_samples(meta)
    with pytest.raises(StaleSlotError):
        client.get_data(meta)


def samples_of_a_dead_process_are_lost(worker: ray.actor.ActorHandle) -> None:
    dying = Worker.remote()
    ray.get(dying.put.remote(["a", "b"], batch(2)))
    assert tq.kv_batch_get(keys=["a"], partition_id="p", select_fields=["text"])["text"][0] == "text 0"
    os.kill(ray.get(dying.pid.remote()), signal.SIGKILL)
    with contextlib.suppress(ray.exceptions.ActorDiedError):
        ray.get(dying.pid.remote())
    with pytest.raises(ProducerLostError):
        tq.kv_batch_get(keys=["b"], partition_id="p")
    tq.kv_clear(keys=["a", "b"], partition_id="p")


SCENARIOS: tuple[Callable[[ray.actor.ActorHandle], None], ...] = (
    another_process_gets_what_was_put,
    some_fields_of_some_samples_are_got,
    fields_of_one_sample_come_from_several_processes,
    cleared_samples_give_their_room_back,
    a_field_that_is_put_again_replaces_the_one_before,
    custom_metadata_is_kept,
    a_full_store_is_an_error_that_names_its_capacity,
    a_value_that_cannot_be_carried_is_refused,
    the_state_of_the_controller_is_saved_and_loaded,
    what_is_cleared_cannot_be_got_with_old_metadata,
    samples_of_a_dead_process_are_lost,
)


def result_of(name: str, run: Callable[[], None]) -> None:
    problem = ""
    try:
        run()
    except Exception:
        problem = traceback.format_exc()
    print(json.dumps({"scenario": name, "problem": problem}), flush=True)


def main(page: str) -> None:
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            _node_ip_address="127.0.0.1",
            include_dashboard=False,
            num_cpus=8,
            object_store_memory=128 * MIB,
            _temp_dir=folder,
            runtime_env={"worker_process_setup_hook": "dray.integrations.transfer_queue.register"},
        )
        if page:
            result_of("the lines of the page", lambda: exec(page, {}))
            tq.close()
        tq.init(OmegaConf.create(CONFIG))
        worker = Worker.remote()
        for scenario in SCENARIOS[:1] if "--short" in sys.argv else SCENARIOS:
            result_of(scenario.__name__, lambda run=scenario: run(worker))
            tq.get_client().clear_partition("p")
        tq.close()
        ray.shutdown()


if __name__ == "__main__":
    import dray.integrations.transfer_queue

    dray.integrations.transfer_queue.register()
    main(sys.argv[1])
