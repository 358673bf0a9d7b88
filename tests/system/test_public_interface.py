"""What a program sees: the example of the README, batches, leases, waiting, and what wrong arguments give."""

import asyncio
import contextlib
import gc
import logging
import threading
import time
from typing import Any

import numpy as np
import pytest
from transport_fixtures import LANES, counted, ring_of, serving
from waiting import wait_until

from dray import PayloadClient, PayloadRef, PayloadSchema, PayloadServer, SharedRingBuffer, TensorSpec, make_secret
from dray.errors import (
    AuthenticationError,
    BufferClosedError,
    BufferFullError,
    ConfigError,
    LeaseInUseError,
    PayloadFormatError,
    PayloadTooLargeError,
    ProtocolError,
    ReaderIdError,
    SchemaError,
    SlotError,
    StaleSlotError,
    TransportTimeout,
    Unreachable,
)
from dray.transport.pipeline import MAX_OPEN

SECRET = b"the job's secret"


def test_the_example_works() -> None:
    observations = np.arange(12, dtype=np.float32).reshape(3, 4)
    with SharedRingBuffer(slots=64, slot_bytes=1 << 20) as ring, PayloadServer(ring) as server:
        ref = server.put({"observations": observations}, timeout=5)
        text = ref.to_json()
        with PayloadClient() as client:
            arrays = client.read(PayloadRef.from_json(text), timeout=5)
            np.testing.assert_array_equal(arrays["observations"], observations)
            assert server.wait_consumed(ref, timeout=5)
            ref = server.put({"observations": observations}, timeout=5)
            with client.lease(ref) as leased:
                np.testing.assert_array_equal(leased["observations"], observations)
            assert server.wait_consumed(ref, timeout=5)
            refs = [server.put({"n": np.int64(n)}, timeout=5) for n in range(20)]
            found = [(result.ref, int(result.payload["n"])) for result in client.read_many(refs, timeout=30)]
            assert found == list(zip(refs, range(20), strict=True))
        wait_until(lambda: ring.statistics().free == 64, "everything to be consumed")


@pytest.mark.parametrize("lane", LANES)
def test_arrays_are_the_readers_own_and_writable(lane: Any) -> None:
    with serving(lane) as server, PayloadClient(lane=lane) as client:
        ref = server.put({"a": np.zeros(5)})
        first = client.read(ref, consume=False)
        first["a"][:] = 7
        assert client.read(ref)["a"].tolist() == [0] * 5


@pytest.mark.parametrize("lane", LANES)
def test_a_read_payload_is_gone_and_one_read_without_consuming_is_not(lane: Any) -> None:
    with serving(lane) as server, PayloadClient(lane=lane) as client:
        ref = server.put_bytes(b"payload")
        for _ in range(3):
            assert bytes(client.read_bytes(ref, consume=False)) == b"payload"
        assert not server.wait_consumed(ref, timeout=0)
        assert client.consume([ref]) == 1
        assert server.wait_consumed(ref, timeout=5)
        assert client.consume([ref]) == 0
        with pytest.raises(StaleSlotError) as caught:
            client.read_bytes(ref)
        assert (caught.value.slot, caught.value.sequence) == (ref.slot, ref.sequence)
        assert client.statistics().quarantined == ()


@pytest.mark.parametrize("lane", LANES)
def test_a_batch_comes_in_order_over_one_connection(lane: Any) -> None:
    with serving(lane, slots=40, max_leases=4) as server, PayloadClient(lane=lane) as client:
        refs = [server.put_bytes(bytes([n]) * n) for n in range(30)]
        packed = [server.put({"n": np.int64(n)}) for n in range(10)]
        assert [int(result.payload["n"]) for result in client.read_many(packed)] == list(range(10))
        found = client.read_many(refs, return_errors=True)
        assert all(isinstance(result.error, PayloadFormatError) for result in found)
        assert client.statistics().connects == 1
        wait_until(lambda: ring_of(server).statistics().free == 40, "all to be consumed")


@pytest.mark.parametrize("lane", LANES)
def test_a_batch_of_bytes_comes_as_it_is_and_may_hold_a_stale_reference(lane: Any) -> None:
    with serving(lane, slots=40, max_leases=4) as server, PayloadClient(lane=lane) as client:
        refs = [server.put_bytes(bytes([n]) * n) for n in range(20)]
        client.consume(refs[7:8])
        found = client.read_many_bytes(refs, return_errors=True)
        outcomes = [result.error or bytes(result.payload) for result in found]
        assert isinstance(outcomes.pop(7), StaleSlotError)
        assert outcomes == [bytes([n]) * n for n in range(20) if n != 7]
        wait_until(lambda: ring_of(server).statistics().free == 40, "all to be consumed")
        assert (client.statistics().reads, client.statistics().connects) == (19, 1)


@pytest.mark.parametrize("lane", LANES)
def test_failures_in_a_batch_leave_the_rest_alone(lane: Any) -> None:
    with serving(lane, slots=8) as server, serving(lane) as gone, PayloadClient(lane=lane) as client:
        refs = [server.put({"n": np.int64(n)}) for n in range(6)]
        client.consume(refs[1:2])
        foreign = gone.put({"n": np.int64(99)})
        nowhere = PayloadRef(b"n" * 16, 0, 0, 1, ("tcp:127.0.0.1:1",) if lane != "tcp" else ("unix:/none",))
        wanted = [refs[0], foreign, refs[1], nowhere, refs[2]]
        found = list(client.read_many(wanted, return_errors=True))
        assert [result.ref for result in found] == wanted
        assert [type(result.error) for result in found] == [
            type(None), type(None), StaleSlotError, Unreachable, type(None),
        ]  # fmt: skip
        assert [int(result.payload["n"]) for result in found if result.error is None] == [0, 99, 2]
        with pytest.raises(Unreachable):
            _ = found[3].payload
        with pytest.raises(StaleSlotError):
            list(client.read_many([refs[3], refs[1], refs[4]]))
        wait_until(lambda: ring_of(server).statistics().leases == 0, "leases to end")
        assert [int(result.payload["n"]) for result in client.read_many(refs[4:])] == [4, 5]


@pytest.mark.parametrize("lane", LANES)
def test_leaving_a_batch_early_returns_what_was_not_taken(lane: Any) -> None:
    with serving(lane, slots=8) as server, PayloadClient(lane=lane) as client:
        refs = [server.put({"n": np.int64(n)}) for n in range(8)]
        for result in client.read_many(refs):
            assert int(result.payload["n"]) == result.ref.sequence
            if result.ref.sequence == 2:
                break
        gc.collect()
        wait_until(lambda: ring_of(server).get_ready_count() == 5, "the rest to be ready again")
        with PayloadClient(lane=lane) as other:
            assert [int(result.payload["n"]) for result in other.read_many(refs[3:])] == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(("nbytes", "count", "taken"), [(8, 40, 33), (8, 70, 40), (20_000, 8, 5), (20_000, 12, 6)])
def test_leaving_a_batch_in_a_later_window_consumes_what_was_taken_before(
    lane: Any, nbytes: int, count: int, taken: int
) -> None:
    with serving(lane, slots=count) as server, PayloadClient(lane=lane) as client:
        refs = [server.put({"n": np.full(nbytes, n, np.uint8)}) for n in range(count)]
        results = client.read_many(refs)
        assert [int(next(results).payload["n"][0]) for _ in range(taken)] == list(range(taken))
        results.close()
        for ref in refs[:taken]:
            assert server.wait_consumed(ref, timeout=5)
        wait_until(lambda: ring_of(server).get_ready_count() == count - taken, "the rest to be ready again")


def test_an_empty_batch_is_nothing() -> None:
    with PayloadClient() as client:
        assert list(client.read_many([])) == []
        assert client.consume([]) == 0


def test_a_batch_of_several_producers_comes_in_the_order_of_its_references() -> None:
    with serving() as one, serving() as two, PayloadClient() as client:
        refs = [server.put({"n": np.int64(n)}) for n, server in enumerate((one, two, one, two))]
        results = list(client.read_many(refs))
        assert [result.ref for result in results] == refs
        assert [int(result.payload["n"]) for result in results] == [0, 1, 2, 3]
        assert client.statistics().connects == 2


@pytest.mark.parametrize("nbytes", [8, 20_000])
def test_a_batch_of_more_producers_than_it_has_connections_is_read_once_and_in_order(nbytes: int) -> None:
    with contextlib.ExitStack() as opened:
        servers = [opened.enter_context(serving(slots=3)) for _ in range(MAX_OPEN + 3)]
        client = opened.enter_context(PayloadClient())
        refs = [
            server.put({"n": np.full(nbytes, n, np.uint8)}) for _ in range(3) for n, server in enumerate(servers)
        ]
        results = client.read_many(refs)
        for turn, ref in enumerate(refs[:-2]):
            result = next(results)
            assert result.ref == ref
            assert result.payload["n"].tolist() == [turn % len(servers)] * nbytes
        results.close()
        for server, ref in zip([*servers, *servers, *servers], refs[:-2], strict=False):
            assert server.wait_consumed(ref, timeout=5)
        # What was asked for and not handed out is with its producer.
        assert [int(result.payload["n"][0]) for result in client.read_many(refs[-2:])] == [
            len(servers) - 2, len(servers) - 1,
        ]  # fmt: skip
        for server in servers:
            wait_until(lambda server=server: ring_of(server).statistics().free == 3, "all to be consumed")
        # A connection that was given up in favour of another producer's served again later.
        assert client.statistics().connects <= len(servers) + 3


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("nbytes", [8, 20_000])
def test_the_timeout_of_a_batch_does_not_run_in_the_callers_loop(lane: Any, nbytes: int) -> None:
    """Also where the batch receives from its producer between two results."""
    with serving(lane, slots=40, max_leases=4) as server, PayloadClient(lane=lane) as client:
        client.read(server.put({"n": np.zeros(nbytes, np.uint8)}))
        refs = [server.put({"n": np.full(nbytes, n, np.uint8)}) for n in range(40)]
        found = []
        for result in client.read_many(refs, timeout=1.0):
            found.append(int(result.payload["n"][0]))
            time.sleep(0.04)
        assert found == list(range(40))


@pytest.mark.parametrize("lane", LANES)
def test_more_references_than_fit_in_flight_are_consumed(lane: Any) -> None:
    with serving(lane, slots=64) as server, PayloadClient(lane=lane) as client:
        live = [server.put_bytes(b"x") for _ in range(64)]
        never = [
            PayloadRef(ref.producer, ref.slot, 10**6 + n, 1, ref.endpoints) for n in range(200) for ref in live
        ]
        assert client.consume([*never, *live], timeout=20) == 64


def test_read_async_reads_many_at_once() -> None:
    with serving(slots=32, threads=2) as server, PayloadClient() as client:
        refs = [server.put({"n": np.int64(n)}) for n in range(20)]

        async def everything() -> list[dict[str, Any]]:
            return await asyncio.gather(*(client.read_async(ref, timeout=20) for ref in refs))

        assert [int(arrays["n"]) for arrays in asyncio.run(everything())] == list(range(20))


@pytest.mark.parametrize("lane", LANES)
def test_many_threads_share_a_client(lane: Any) -> None:
    with serving(lane, slots=64, threads=2) as server, PayloadClient(lane=lane) as client:
        refs = [server.put({"n": np.full(500, n)}) for n in range(64)]
        errors: list[BaseException] = []

        def read(mine: list[PayloadRef]) -> None:
            try:
                for ref in mine:
                    assert set(client.read(ref, timeout=20)["n"]) == {ref.sequence}
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=read, args=(refs[k::4],)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert errors == []
        wait_until(lambda: ring_of(server).statistics().free == 64, "all to be consumed")


@pytest.mark.parametrize("lane", LANES)
def test_payloads_for_several_readers_end_with_the_last(lane: Any) -> None:
    with serving(lane, readers=3) as server:
        ref = server.put_bytes(b"all three")
        for reader in (2, 0, 1):
            assert not server.wait_consumed(ref, timeout=0)
            with PayloadClient(lane=lane, reader=reader) as client:
                assert bytes(client.read_bytes(ref)) == b"all three"
                with pytest.raises(StaleSlotError):
                    client.read_bytes(ref)
        assert server.wait_consumed(ref, timeout=5)


@pytest.mark.parametrize("lane", LANES)
def test_stat_returns_the_statistics_of_the_server(lane: Any) -> None:
    with serving(lane) as server, PayloadClient(lane=lane, direct=False) as client:
        ref = server.put_bytes(b"12345")
        client.read_bytes(ref, consume=False)
        found = client.stat(ref)
        assert found.producer == ref.producer
        assert found.endpoints == server.endpoints
        assert (found.ring.ready, found.counters.reads, found.counters.bytes) == (1, 1, 5)
        assert found.open_connections == 1


@pytest.mark.parametrize("lane", LANES)
def test_wait_consumed_is_woken_by_the_reader(lane: Any) -> None:
    with serving(lane) as server, PayloadClient(lane=lane) as client:
        ref = server.put_bytes(b"x")
        woken = threading.Event()
        thread = threading.Thread(target=lambda: server.wait_consumed(ref, timeout=90) and woken.set())
        thread.start()
        client.read_bytes(ref)
        assert woken.wait(20)
        thread.join()


def test_auto_takes_shared_memory_and_a_required_lane_is_taken_or_refused() -> None:
    with serving(["shm", "tcp"]) as server, PayloadClient() as client, PayloadClient(lane="ucx") as ucx:
        ref = server.put({"a": np.zeros(3)})
        with client.lease(ref) as arrays:
            assert not arrays["a"].flags.writeable
        ref = server.put_bytes(b"x")
        with pytest.raises(Unreachable, match="on a lane of ucx"):
            ucx.read_bytes(ref)
        with PayloadClient(lane="tcp") as tcp:
            assert bytes(tcp.read_bytes(ref)) == b"x"


def test_an_array_kept_out_of_a_lease_is_an_error_and_keeps_the_slot() -> None:
    with serving("shm") as server, PayloadClient() as client:
        ref = server.put({"a": np.arange(5)})
        with pytest.raises(LeaseInUseError):
            with client.lease(ref) as arrays:
                kept = arrays["a"][1:]
        assert not server.wait_consumed(ref, timeout=0)
        assert kept.tolist() == [1, 2, 3, 4]
        del kept, arrays
        assert server.wait_consumed(ref, timeout=5)


@pytest.mark.parametrize("lane", LANES)
def test_an_exception_in_a_lease_returns_the_payload(lane: Any) -> None:
    with serving(lane) as server, PayloadClient(lane=lane) as client:
        ref = server.put({"a": np.arange(5)})
        with pytest.raises(KeyError), client.lease(ref) as arrays:
            raise KeyError(str(arrays["a"].sum()))
        gc.collect()
        wait_until(lambda: ring_of(server).get_ready_count() == 1, "the payload to be ready again")
        assert client.read(ref)["a"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"lane": ["rdma"]}, "lane"),
        ({"lane": []}, "lane"),
        ({"lane": "rdma"}, "lane"),
        ({"threads": 0}, "threads"),
        ({"threads": 17}, "threads"),
        ({"threads": 16, "lane": ["shm", "tcp"]}, "threads"),
        ({"max_leases": 0}, "max_leases"),
        ({"host": "192.0.2.77", "lane": ["tcp"]}, "host"),
        ({"host": "203.0.113.77", "lane": ["tcp"], "secret": b"s" * 16}, "host"),
        ({"secret": "text"}, "secret"),
        ({"secret": b""}, "secret"),
        ({"secret": b"only fifteen..."}, "secret"),
        ({"port": 65536, "lane": ["tcp"]}, "port"),
        ({"port": -1, "lane": ["tcp"]}, "port"),
        ({"idle_timeout": 0}, "idle_timeout"),
    ],
)
def test_a_server_names_the_wrong_argument(wrong: dict[str, Any], key: str) -> None:
    with SharedRingBuffer(2, 64) as ring, pytest.raises(ConfigError) as caught:
        PayloadServer(ring, **wrong)
    assert caught.value.key == key
    assert "text" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"lane": "rdma"}, "lane"),
        ({"lane": ""}, "lane"),
        ({"reader": -1}, "reader"),
        ({"reader": 64}, "reader"),
        ({"attempts": 0}, "attempts"),
        ({"secret": "text"}, "secret"),
        ({"secret": b"only fifteen..."}, "secret"),
    ],
)
def test_a_client_names_the_wrong_argument(wrong: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PayloadClient(**wrong)
    assert caught.value.key == key


def test_wrong_payloads_are_typed_errors_and_lose_nothing() -> None:
    with serving("shm", slots=1, slot_bytes=1000) as server, PayloadClient() as client:
        kept = server.put({"a": np.zeros(3)})
        schema = PayloadSchema({"a": TensorSpec.of(np.float32, (3,))})
        with pytest.raises(SchemaError):
            server.put({"b": np.zeros(3)}, schema=schema)
        with pytest.raises(PayloadFormatError):
            server.put({"a": np.array(["text"])})
        with pytest.raises(PayloadTooLargeError):
            server.put_bytes(bytes(1001))
        with pytest.raises(BufferFullError):
            server.put_bytes(b"x", timeout=0)
        assert client.read(kept)["a"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("lane", LANES)
def test_a_reference_with_another_size_is_refused_without_taking_the_memory(lane: Any) -> None:
    with serving(lane) as server, PayloadClient(lane=lane) as client:
        ref = server.put_bytes(b"payload")
        for nbytes in (0, 3, 8, 1 << 40, 2**64 - 1):
            wrong = PayloadRef(ref.producer, ref.slot, ref.sequence, nbytes, ref.endpoints)
            with pytest.raises((SlotError, ProtocolError), match="the payload has"):
                client.read_bytes(wrong)
        assert client.statistics().quarantined == ()
        wait_until(lambda: ring_of(server).get_ready_count() == 1, "the lease to end")
        assert bytes(client.read_bytes(ref)) == b"payload"


@pytest.mark.parametrize("lane", LANES)
def test_a_reference_with_another_size_leaves_the_rest_of_its_batch_alone(lane: Any) -> None:
    with serving(lane) as server, PayloadClient(lane=lane) as client:
        refs = [server.put({"a": np.full(50, number)}) for number in range(4)]
        wrong = PayloadRef(refs[1].producer, refs[1].slot, refs[1].sequence, 17, refs[1].endpoints)
        results = list(client.read_many([refs[0], wrong, refs[2], refs[3]], return_errors=True))
        assert isinstance(results.pop(1).error, SlotError)
        assert [int(result.payload["a"][0]) for result in results] == [0, 2, 3]
        assert client.statistics().connects == 1
        assert client.read(refs[1])["a"].tolist() == [1] * 50


@pytest.mark.parametrize("lane", LANES)
def test_slots_out_of_range_are_stale_and_the_connection_stays(lane: Any) -> None:
    with serving(lane, slots=2) as server, PayloadClient(lane=lane) as client:
        ref = server.put_bytes(b"payload")
        for slot, sequence in ((2, 0), (2**32 - 1, 0), (0, 9), (1, 0)):
            wrong = PayloadRef(ref.producer, slot, sequence, 7, ref.endpoints)
            with pytest.raises(StaleSlotError):
                client.read_bytes(wrong)
        assert bytes(client.read_bytes(ref)) == b"payload"
        assert client.statistics().connects == 1


@pytest.mark.parametrize("lane", LANES)
def test_a_reader_id_the_ring_does_not_have_is_an_error(lane: Any) -> None:
    with serving(lane) as server, PayloadClient(lane=lane, reader=1) as client:
        ref = server.put_bytes(b"payload")
        for ask in (lambda: client.read_bytes(ref), lambda: client.consume([ref]), lambda: client.read_bytes(ref)):
            with pytest.raises(ReaderIdError, match="reader id 1 is denied: this ring's are 0 to 0") as caught:
                ask()
            assert isinstance(caught.value, ValueError)
            assert not isinstance(caught.value, AuthenticationError)
        assert counted(server, "auth_failures") == 0
        assert ring_of(server).get_ready_count() == 1


def test_a_closed_server_or_client_raises() -> None:
    with serving("shm") as server:
        ref = server.put_bytes(b"x")
        client = PayloadClient()
        client.close()
        client.close()
        with pytest.raises(BufferClosedError):
            client.read_bytes(ref)
        server.close()
        server.close()
        with pytest.raises(BufferClosedError):
            server.put_bytes(b"x")


def test_a_timeout_that_has_passed_is_a_timeout() -> None:
    with serving("tcp") as server, PayloadClient() as client:
        ref = server.put_bytes(b"x")
        for timeout in (0, -1):
            with pytest.raises(TransportTimeout):
                client.read_bytes(ref, timeout=timeout)
        with PayloadClient() as fresh:
            assert bytes(fresh.read_bytes(ref, timeout=1e9)) == b"x"


def test_a_foreign_reference_is_not_this_servers() -> None:
    with serving("shm") as server:
        with pytest.raises(StaleSlotError):
            server.wait_consumed(PayloadRef(b"f" * 16, 0, 0, 0, ()), timeout=0)


def test_nothing_is_logged_unless_asked(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dray"):
        with serving(secret=SECRET) as server, PayloadClient(secret=SECRET) as client:
            client.read_bytes(server.put_bytes(b"x"))
    assert caplog.records == []


def test_without_a_secret_only_shared_memory_is_served_unless_a_lane_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def schemes(server: PayloadServer) -> set[str]:
        return {endpoint.partition(":")[0] for endpoint in server.endpoints}

    with caplog.at_level(logging.INFO, logger="dray.server"):
        with serving() as server:
            assert schemes(server) == {"unix"}
        with serving(secret=make_secret()) as server:
            assert schemes(server) >= {"unix", "tcp"}
        assert caplog.records == []
        with serving(["shm", "tcp"]) as server:
            assert schemes(server) == {"unix", "tcp"}
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("tcp without a secret")


def test_an_ipv6_host_is_served_on_the_lanes_that_can(tmp_path: Any) -> None:
    with SharedRingBuffer(2, 1000) as ring:
        with pytest.raises(ConfigError, match="IPv4"):
            PayloadServer(ring, host="::1", lane=["tcp", "ucx"])
        with (
            PayloadServer(ring, host="::1", lane="auto", secret=SECRET) as server,
            PayloadClient(lane="tcp", secret=SECRET) as client,
        ):
            assert {endpoint.partition(":")[0] for endpoint in server.endpoints} == {"unix", "tcp"}
            assert client.read(server.put({"a": np.arange(3)}))["a"].tolist() == [0, 1, 2]
