"""`UCXXBuffer`: trajectories of arrays and tensors, packed by schema."""

import json
import logging

import ml_dtypes
import numpy as np
import pytest
from optional import imported_later

from dray import PayloadClient
from dray.errors import BufferClosedError, BufferFullError, ConfigError, SchemaError
from dray.payload import PayloadSchema, TensorSpec, unpack_metadata
from dray.ucxx import SlotState, UCXXBuffer, UCXXBufferConfig, UCXXClient, reference_of

torch = imported_later("torch")

SCHEMA = PayloadSchema(
    {
        "observations": TensorSpec.of(np.float32, (None, 3)),
        "actions": TensorSpec.of(np.int64, (None,)),
        "rewards": TensorSpec.of(np.float32, (None,)),
        "logits": TensorSpec.of(ml_dtypes.bfloat16, (None, 2), optional=True),
    }
)


def local(**settings: object) -> UCXXBuffer:
    return UCXXBuffer(UCXXBufferConfig.parse({"lane": ("shm",), "slots": 4, "n_server_threads": 1, **settings}))


def test_a_trajectory_of_arrays_comes_back_as_it_was_with_its_length() -> None:
    trajectory = {"observations": np.arange(12.0).reshape(4, 3), "rewards": np.ones(4, np.float32)}
    with local() as buffer, PayloadClient() as client:
        completion = buffer.write(trajectory, metadata={"policy": "7"})
        ref = reference_of(json.loads(json.dumps(completion)))
        image = client.read_bytes(ref, consume=False)
        assert unpack_metadata(image.tobytes()) == {"policy": "7"}
        arrays = client.read(ref)
    assert arrays.keys() == {"observations", "rewards", "episode_length"}
    np.testing.assert_array_equal(arrays["observations"], trajectory["observations"])
    assert arrays["episode_length"] == 4
    assert arrays["episode_length"].dtype == np.int64


def test_c12_casts_lists_tensors_and_strides_are_packed_right_and_narrowing_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "dray.payload")
    trajectories = [
        {
            "observations": np.arange(24, dtype=np.float64).reshape(3, 8).T[::2, :],
            "actions": torch.arange(8)[::2],
            "rewards": [0.5, 1, 0.25, 0],
            "logits": torch.full((4, 2), 0.5, dtype=torch.bfloat16, requires_grad=True),
        }
    ] * 2
    with local(schema=SCHEMA) as buffer, PayloadClient() as client:
        for trajectory in trajectories:
            arrays = client.read(reference_of(buffer.write(trajectory)))
            assert {name: arrays[name].dtype for name in SCHEMA} == {
                name: spec.numpy_dtype for name, spec in SCHEMA.items()
            }
            np.testing.assert_array_equal(arrays["observations"], trajectory["observations"])
            np.testing.assert_array_equal(arrays["actions"], [0, 2, 4, 6])
            np.testing.assert_array_equal(arrays["rewards"], np.asarray([0.5, 1, 0.25, 0], np.float32))
            np.testing.assert_array_equal(arrays["logits"].astype(np.float32), np.full((4, 2), 0.5))
            assert arrays["episode_length"] == 4
    assert [record.args[0] for record in caplog.records] == ["observations"]  # type: ignore[index]


@pytest.mark.skipif("not torch.cuda.is_available()", reason="needs a CUDA device")
def test_c12_tensors_on_a_device_are_packed() -> None:
    with local() as buffer, PayloadClient() as client:
        completion = buffer.write({"rewards": torch.arange(5.0, device="cuda")})
        arrays = client.read(reference_of(completion))
    np.testing.assert_array_equal(arrays["rewards"], np.arange(5, dtype=np.float32))
    assert arrays["episode_length"] == 5


def test_a_length_that_is_there_stays_and_named_fields_count_as_steps() -> None:
    with local(per_step=["tokens"]) as buffer, PayloadClient() as client:
        padded = buffer.write({"rewards": np.zeros(8), "episode_length": 5})
        tokens = buffer.write({"tokens": np.zeros((6, 2), np.int32)})
        assert client.read(reference_of(padded))["episode_length"] == 5
        assert client.read(reference_of(tokens))["episode_length"] == 6


def test_b2_a_trajectory_that_does_not_fit_leaves_its_slot_free() -> None:
    with local(slots=1, schema=SCHEMA) as buffer:
        for wrong in (
            {"actions": [1], "rewards": [1.0]},
            {"observations": np.zeros((2, 4)), "actions": [1, 2], "rewards": [1.0, 2.0]},
            {"unknown": [1.0]},
        ):
            with pytest.raises(SchemaError):
                buffer.write(wrong)
        assert buffer.ring.statistics().free == 1
        buffer.write({"observations": np.zeros((2, 3)), "actions": [1, 2], "rewards": [1.0, 2.0]}, timeout=0)


def test_b7_write_to_a_full_buffer_fails_in_time() -> None:
    with local(slots=1, write_timeout=0.05) as buffer:
        buffer.write({"rewards": [1.0]})
        with pytest.raises(BufferFullError):
            buffer.write({"rewards": [1.0]})
        with pytest.raises(BufferFullError):
            buffer.write({"rewards": [1.0]}, timeout=0)


def test_draining_waits_for_consumers_and_returns_what_is_left() -> None:
    with local() as buffer, PayloadClient() as client:
        read, _ = buffer.write({"rewards": [1.0]}), buffer.write({"rewards": [2.0]})
        client.read(reference_of(read))
        assert buffer.drain(0.2) == 1


def test_a_closed_buffer_raises_buffer_closed_error_and_may_be_closed_again() -> None:
    buffer = local()
    assert "PayloadServer" in repr(buffer)
    assert buffer.statistics().ring.free == 4
    buffer.close()
    buffer.close()
    with pytest.raises(BufferClosedError):
        buffer.write({"rewards": [1.0]})


def test_a_server_that_cannot_start_leaves_no_ring_behind() -> None:
    with pytest.raises(ConfigError, match="loopback"):
        local(lane=("tcp",), host="0.0.0.0")


async def read_with_asyncio(buffer: UCXXBuffer) -> float:
    completion = buffer.write({"rewards": [4.0]})
    async with UCXXClient(lane="shm") as client:
        arrays = await client.read(reference_of(completion), timeout=10)
        assert client.statistics().reads == 1
        return float(arrays["rewards"][0])


async def close_with_and_without_await() -> None:
    client = UCXXClient(lane="shm")
    assert await client.close() is None
    client.close()
    with UCXXClient(lane="shm"):
        pass


def test_a_client_may_be_closed_with_await() -> None:
    import asyncio

    asyncio.run(close_with_and_without_await())


def test_more_server_threads_than_a_reference_can_name_are_refused_by_the_name_of_the_setting() -> None:
    with local(lane="tcp", n_server_threads=16) as buffer:
        assert len(reference_of(buffer.write({"rewards": [1.0]})).endpoints) == 16
    with pytest.raises(ConfigError, match="512 bytes") as raised:
        local(lane=("shm", "tcp"), n_server_threads=16)
    assert raised.value.key == "n_server_threads"


def test_a_client_reads_from_asyncio() -> None:
    import asyncio

    with local() as buffer:
        assert asyncio.run(read_with_asyncio(buffer)) == 4.0
        assert buffer.ring.wait_consumed(0, 0, 5)
        assert SlotState.FREE == 0
