"""`CompletionReader`: payloads are prefetched or read at once; unavailable ones are counted."""

import json
import logging
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from optional import imported_later
from waiting import wait_until

from dray.errors import BufferClosedError, ConfigError, DrayError, SchemaError, StaleSlotError
from dray.protocol import PayloadRef
from dray.ucxx import CompletionReader, UCXXBuffer, UCXXBufferConfig, UCXXConfig, completion_for, reference_of
from dray.ucxx.data_packer import MIN_LATE_SECONDS, LateReads

torch = imported_later("torch")


@pytest.fixture
def buffer() -> Iterator[UCXXBuffer]:
    with UCXXBuffer(UCXXBufferConfig(slots=16, lane=("shm", "tcp"), n_server_threads=1)) as buffer:
        yield buffer


@pytest.fixture
def reader() -> Iterator[CompletionReader]:
    with CompletionReader(UCXXConfig(ucxx_prefetch_timeout=20), lane="shm") as reader:
        yield reader


def write(buffer: UCXXBuffer, *values: float) -> list[dict[str, str]]:
    return [json.loads(json.dumps(buffer.write({"rewards": [value]}))) for value in values]


def reward(arrays: dict | None) -> float:
    assert arrays is not None
    return float(arrays["rewards"][0])


def test_prefetched_completions_resolve_as_often_as_asked(buffer: UCXXBuffer, reader: CompletionReader) -> None:
    batch = write(buffer, 1.0, 2.0)
    assert reader.start_prefetch(["text", batch[0], None, batch[1], {"text": 1}])
    assert reader.wait_prefetch()
    assert reader.collect_prefetch() == 2
    for _ in range(2):
        assert [reward(reader.resolve(completion)) for completion in batch] == [1.0, 2.0]
    statistics = reader.statistics()
    assert (statistics.prefetched, statistics.read_at_once, statistics.skipped) == (4, 0, 0)
    wait_until(lambda: buffer.ring.statistics().free == 16, "the slots to be free again")


def test_a_batch_is_collected_when_it_has_come_without_a_wait_before(
    buffer: UCXXBuffer, reader: CompletionReader
) -> None:
    batch = write(buffer, *map(float, range(16)))
    assert reader.start_prefetch(batch)
    assert reader.collect_prefetch() == 16
    assert [reward(reader.resolve(completion)) for completion in batch] == list(range(16))
    assert reader.statistics().prefetched == 16


def test_discarded_payloads_are_freed_unread(buffer: UCXXBuffer, reader: CompletionReader) -> None:
    batch = write(buffer, 1.0, 2.0)
    reader.discard(["text", *batch])
    wait_until(lambda: buffer.ring.statistics().free == 16, "the slots to be free again")
    assert reader.resolve(batch[0]) is None
    assert reader.statistics().skipped_stale == 1


def test_late_reads_share_the_time_of_a_batch_and_each_has_a_little() -> None:
    late = LateReads(10.0)
    assert late.seconds == 10.0
    late.spend(4.0)
    assert late.seconds == 6.0
    late.spend(60.0)
    assert late.seconds == MIN_LATE_SECONDS
    late.renew()
    assert late.seconds == 10.0


def test_what_was_not_prefetched_is_read_at_once(buffer: UCXXBuffer, reader: CompletionReader) -> None:
    (completion,) = write(buffer, 3.0)
    assert reward(reader.resolve(completion)) == 3.0
    assert reader.statistics().read_at_once == 1
    wait_until(lambda: buffer.ring.statistics().free == 16, "the slot to be free again")


def test_a_deferred_batch_arrives_while_the_one_before_is_used(
    buffer: UCXXBuffer, reader: CompletionReader
) -> None:
    steps = [write(buffer, float(step), step + 0.5) for step in range(4)]
    assert reader.start_prefetch(steps[0])
    for step, batch in enumerate(steps):
        if step + 1 < len(steps):
            assert reader.defer_prefetch(steps[step + 1])
        assert reader.wait_prefetch()
        assert reader.collect_prefetch() == 2
        assert [reward(reader.resolve(completion)) for completion in batch] == [step, step + 0.5]
    assert reader.statistics().prefetched == 8


def test_c6_a_stale_episode_is_skipped_and_counted_prefetched_or_not(
    buffer: UCXXBuffer, reader: CompletionReader, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "dray.ucxx")
    first, good, later = write(buffer, 1.0, 2.0, 3.0)
    assert (reference_of(first).slot, reference_of(first).sequence) == (0, 0)
    assert reward(reader.resolve(first)) == 1.0
    reader.start_prefetch([first, good])
    reader.wait_prefetch()
    assert reader.collect_prefetch() == 1
    assert reader.resolve(first) is None
    assert reward(reader.resolve(good)) == 2.0
    assert reward(reader.resolve(later)) == 3.0
    assert reader.resolve(later) is None
    statistics = reader.statistics()
    assert (statistics.skipped, statistics.skipped_stale) == (2, 2)
    assert len(caplog.records) == 1


def test_c13_a_lost_producer_s_episodes_are_skipped_and_counted(reader: CompletionReader) -> None:
    with UCXXBuffer(UCXXBufferConfig(slots=4, lane=("shm",), n_server_threads=1)) as gone:
        batch = write(gone, 1.0, 2.0)
    reader.start_prefetch(batch[:1])
    assert reader.wait_prefetch()
    assert reader.collect_prefetch() == 0
    assert [reader.resolve(completion) for completion in batch] == [None, None]
    assert reader.statistics().skipped_lost == 2


def test_a_broken_reference_is_skipped_and_counted(reader: CompletionReader) -> None:
    broken = {"dray_payload": "{"}
    assert reader.start_prefetch([broken])
    assert reader.wait_prefetch(0)
    assert reader.resolve(broken) is None
    assert reader.statistics().skipped_other == 1


def test_a_skipped_payload_that_is_still_there_is_freed(buffer: UCXXBuffer, reader: CompletionReader) -> None:
    reference = reference_of(write(buffer, 1.0)[0])
    oversized = PayloadRef(
        reference.producer, reference.slot, reference.sequence, reference.nbytes + 1, reference.endpoints
    )
    assert reader.resolve(completion_for(oversized)) is None
    assert reader.statistics().skipped_other == 1
    wait_until(lambda: buffer.ring.statistics().free == 16, "its slot to be free again")


def test_a_trajectory_is_cut_to_its_length_if_asked_for(buffer: UCXXBuffer) -> None:
    padded = {"rewards": np.arange(8.0), "tokens": np.zeros((8, 2)), "weights": np.ones(8), "episode_length": 5}
    config = UCXXConfig(ucxx_trim=True, ucxx_per_step=["tokens"])
    with CompletionReader(config, lane="shm") as reader:
        batch = [buffer.write(padded) for _ in range(3)]
        assert reader.start_prefetch(batch[:1])
        assert reader.collect_prefetch() == 1
        (fetched,) = reader.fetch_all([reference_of(batch[2])])
        for arrays in (reader.resolve(batch[0]), reader.resolve(batch[1]), fetched.outcome):
            assert isinstance(arrays, dict)
            assert {name: len(value) for name, value in arrays.items() if value.ndim} == {
                "rewards": 5, "tokens": 5, "weights": 8
            }  # fmt: skip


def test_a_length_that_fits_no_field_skips_the_episode_and_no_other(buffer: UCXXBuffer) -> None:
    with CompletionReader(UCXXConfig(ucxx_trim=True), lane="shm") as reader:
        wrong = [buffer.write({"rewards": [1.0, 2.0], "episode_length": 9}) for _ in range(3)]
        good, without = buffer.write({"rewards": [3.0]}), completion_for(buffer.server.put({"text": [1]}))
        reader.start_prefetch([wrong[0], good])
        reader.collect_prefetch()
        assert [reader.resolve(each) is None for each in (*wrong[:2], good, without)] == [True, True, False, False]
        (fetched,) = reader.fetch_all([reference_of(wrong[2])])
        assert isinstance(fetched.outcome, SchemaError)
        assert reader.statistics().skipped_other == 2


def test_tensors_come_on_the_device_that_is_asked_for(buffer: UCXXBuffer) -> None:
    with CompletionReader(UCXXConfig(ucxx_device="cpu", ucxx_trim=True), lane="shm") as reader:
        completion = buffer.write({"rewards": np.arange(4, dtype=np.float32), "episode_length": 2})
        arrays = reader.resolve(completion)
        assert arrays is not None
        assert torch.equal(arrays["rewards"], torch.tensor([0.0, 1.0]))
        assert arrays["rewards"].device.type == "cpu"
    with pytest.raises(ConfigError, match="ucxx_device"):
        CompletionReader(UCXXConfig(ucxx_device="nowhere"), lane="shm")


def test_what_is_fetched_without_consuming_may_be_read_again_until_it_is_discarded(
    buffer: UCXXBuffer, reader: CompletionReader
) -> None:
    refs = [reference_of(each) for each in write(buffer, 1.0, 2.0)]
    for _ in range(2):
        assert [reward(each.outcome) for each in reader.fetch_all(refs, consume=False)] == [1.0, 2.0]  # type: ignore[arg-type]
    assert reward(reader.read_one(refs[0], consume=False)) == 1.0
    assert buffer.ring.statistics().free == 14
    reader.discard(refs)
    wait_until(lambda: buffer.ring.statistics().free == 16, "the slots to be free again")


def test_layers_two_and_three_are_there_for_references(buffer: UCXXBuffer, reader: CompletionReader) -> None:
    first, second, third = map(reference_of, write(buffer, 1.0, 2.0, 3.0))
    assert reward(reader.read_one(first)) == 1.0
    with pytest.raises(StaleSlotError):
        reader.read_one(first, timeout=5)
    gone, came, also = reader.fetch_all([first, second, third])
    assert isinstance(gone.outcome, StaleSlotError)
    for fetched, value in ((came, 2.0), (also, 3.0)):
        assert not isinstance(fetched.outcome, DrayError)
        np.testing.assert_array_equal(fetched.outcome["rewards"], [value])
    assert reader.fetch_all([], timeout=0) == []


def test_a_closed_reader_raises_buffer_closed_error_and_skips_nothing(buffer: UCXXBuffer) -> None:
    completions = write(buffer, 1.0)
    reader = CompletionReader(lane="shm")
    reader.close()
    reader.close()
    assert reader.alive == 0
    with pytest.raises(BufferClosedError):
        reader.resolve(completions[0])
    assert reader.statistics().skipped == 0


def test_a_reader_that_is_closed_while_it_reads_raises_buffer_closed_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"tcp:127.0.0.1:{silent.getsockname()[1]}"
        reader = CompletionReader(lane="tcp")
        closing = threading.Timer(0.2, reader.close)
        closing.start()
        with pytest.raises(BufferClosedError):
            reader.resolve(PayloadRef(bytes(range(16)), 0, 0, 64, (endpoint,)))
        closing.join()
        assert reader.statistics().skipped == 0
