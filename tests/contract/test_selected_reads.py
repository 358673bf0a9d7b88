"""Fields and rows of payloads, over every lane and with peers of every age."""

import asyncio
import contextlib
import dataclasses
import select
import socket
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from socketpair_lane import ADDED
from transport_fixtures import Child, counted, serving
from waiting import wait_until

from dray import PayloadClient, PayloadRef, PayloadServer, Ragged
from dray.errors import DrayError, LeaseInUseError, MessageTruncated, SelectionError
from dray.prefetch import BatchReader
from dray.protocol.frames import FRAME_BYTES
from dray.protocol.handshake import CHALLENGE, WELCOME
from dray.transport.lanes import LANES, Lane, LaneChoice

WHOLE: dict[str, Any] = {
    "observations": np.arange(80_000, dtype=np.float32).reshape(1000, 80),
    "rewards": np.arange(1000, dtype=np.float64),
    "tokens": Ragged.from_rows([np.arange(5), np.arange(3)]),
    "info": {"prompt": "Sort: 3 1 2", "hidden": np.ones((50, 100), np.float32)},
}
SELECTED: dict[str, Any] = {
    "fields": ("rewards", "observations", "info.prompt"),
    "rows": {"observations": [(0, 10), slice(990, None)], "rewards": (5, 7)},
}
WRONG: tuple[dict[str, Any], ...] = (
    {"fields": ("rewards", "nothing")},
    {"fields": ("info.nothing",)},
    {"rows": {"observations": (0, 1001)}},
    {"rows": {"tokens": (0, 1)}},
)
IN_BAND = tuple(lane for lane in (*LANES.values(), ADDED) if lane.in_band)


@pytest.fixture(params=(*LANES.values(), ADDED), ids=lambda lane: lane.name)
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Lane:
    monkeypatch.setitem(LANES, ADDED.name, ADDED)
    found: Lane = request.param
    if found.name == "ucx":
        pytest.importorskip("ucxx")
    return found


@contextlib.contextmanager
def exchanging(lane: Lane, **options: Any) -> Iterator[tuple[PayloadServer, PayloadClient]]:
    choice: LaneChoice = lane.name
    with serving(lane.name, slot_bytes=1 << 20, **options) as server, PayloadClient(lane=choice) as client:
        yield server, client


def check(found: Any) -> None:
    assert list(found) == ["observations", "rewards", "info"]
    assert np.array_equal(found["observations"], WHOLE["observations"][[*range(10), *range(990, 1000)]])
    assert found["rewards"].tolist() == [5.0, 6.0]
    assert found["info"] == {"prompt": "Sort: 3 1 2"}


def failing(client: PayloadClient, ref: PayloadRef) -> int:
    """How many reads fail whose selection is wrong."""
    failed = 0
    for selected in WRONG:
        with pytest.raises(SelectionError):
            client.read(ref, timeout=10, **selected)
        results = client.read_many([ref, ref], timeout=10, return_errors=True, **selected)
        failed += 1 + sum(isinstance(result.error, SelectionError) for result in results)
    return failed


# --- every lane -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [True, False])
def test_a_read_brings_the_part_and_consumes_the_payload(lane: Lane, direct: bool) -> None:
    with exchanging(lane, direct=direct) as (server, client):
        ref = server.put(WHOLE)
        check(client.read(ref, timeout=10, consume=False, **SELECTED))
        check(asyncio.run(client.read_async(ref, timeout=10, consume=False, **SELECTED)))
        found = client.read(ref, timeout=10, **SELECTED)
        check(found)
        found["rewards"][:] = 0  # memory of its own
        assert server.wait_consumed(ref, timeout=10)


@pytest.mark.parametrize("direct", [True, False])
def test_a_lease_brings_the_part_in_place_where_payloads_stay_in_the_segment(lane: Lane, direct: bool) -> None:
    with exchanging(lane, direct=direct) as (server, client):
        ref = server.put(WHOLE)
        with client.lease(ref, timeout=10, **SELECTED) as found:
            check(found)
            assert found["rewards"].flags.writeable is lane.in_band
        assert server.wait_consumed(ref, timeout=10)
        if not lane.in_band:
            ref = server.put(WHOLE)
            kept = []
            with pytest.raises(LeaseInUseError), client.lease(ref, timeout=10, fields=("rewards",)) as found:
                kept.append(found["rewards"])
            assert server.ring.statistics().leases == 1
            kept.clear()
            assert server.wait_consumed(ref, timeout=10)


@pytest.mark.parametrize("direct", [True, False])
def test_a_batch_brings_the_part_of_each_payload_small_or_large(lane: Lane, direct: bool) -> None:
    small = {"rewards": np.arange(3.0), "other": np.arange(9)}
    with exchanging(lane, direct=direct, slots=16) as (server, client):
        refs = [server.put(WHOLE if number % 3 else small) for number in range(12)]
        results = list(client.read_many(refs, timeout=10, fields=("rewards",), rows={"rewards": (1, 3)}))
        assert [result.ref for result in results] == refs
        for number, result in enumerate(results):
            assert list(result.payload) == ["rewards"]
            assert result.payload["rewards"].tolist() == [1.0, 2.0], number
        assert all(server.wait_consumed(ref, timeout=10) for ref in refs)


def test_a_batch_in_place_brings_views_of_the_part() -> None:
    with serving("shm", slot_bytes=1 << 20) as server, PayloadClient(lane="shm") as client:
        ref = server.put(WHOLE)
        check(client.read(ref, timeout=10, consume=False, **SELECTED))
        (result,) = client.read_many([ref], timeout=10, consume=False, in_place=True, fields=("rewards",))
        assert list(result.payload) == ["rewards"]
        assert not result.payload["rewards"].flags.writeable
        assert server.ring.statistics().leases == 1
        del result
        assert server.ring.statistics().leases == 0


def test_prefetch_brings_the_part(lane: Lane) -> None:
    choice: LaneChoice = lane.name
    with (
        serving(lane.name, slot_bytes=1 << 20) as server,
        BatchReader(PayloadClient(lane=choice), threads=2, **SELECTED) as reader,
    ):
        refs = [server.put(WHOLE) for _ in range(4)]
        for fetched in reader.fetch_all(refs[:2], timeout=10):
            check(fetched.outcome)
        assert reader.start(refs[2:3], timeout=10)
        assert reader.wait()
        check(reader.collect()[0].outcome)
        check(reader.read_one(refs[3], timeout=10))
        assert all(server.wait_consumed(ref, timeout=10) for ref in refs)


@pytest.mark.parametrize("direct", [True, False])
def test_g1_what_a_payload_does_not_have_is_an_error_that_leaves_it_and_the_connection(
    lane: Lane, direct: bool
) -> None:
    with exchanging(lane, direct=direct) as (server, client):
        ref = server.put(WHOLE)
        check(client.read(ref, timeout=10, consume=False, **SELECTED))
        connects = client.statistics().connects
        assert failing(client, ref) == 3 * len(WRONG)
        with pytest.raises(SelectionError):
            asyncio.run(client.read_async(ref, timeout=10, fields=("nothing",)))
        assert client.statistics().connects == connects
        for selected in WRONG:
            with pytest.raises(SelectionError), client.lease(ref, timeout=10, **selected):
                pass
        assert (client.statistics().retries, client.statistics().quarantined) == (0, ())
        wait_until(lambda: server.ring.statistics().leases == 0, "the leases of failed reads to end")
        assert server.ring.statistics().ready == 1
        check(client.read(ref, timeout=10, **SELECTED))


@pytest.mark.parametrize("direct", [True, False])
def test_g1_an_error_in_a_small_payload_leaves_it_as_well(lane: Lane, direct: bool) -> None:
    with exchanging(lane, direct=direct) as (server, client):
        ref = server.put({"rewards": np.arange(3.0)})
        for _ in range(3):
            with pytest.raises(SelectionError, match="the payload has no field 'nothing'; its fields: 'rewards'"):
                client.read(ref, timeout=10, fields=("nothing",))
        assert client.read(ref, timeout=10, fields=("rewards",))["rewards"].tolist() == [0.0, 1.0, 2.0]


def test_g1_bytes_that_are_no_payload_have_no_fields_and_stay(lane: Lane) -> None:
    with exchanging(lane) as (server, client):
        for nbytes in (0, 10, 100_000):
            ref = server.put_bytes(bytes(nbytes))
            with pytest.raises(SelectionError, match="the payload has no fields to select"):
                client.read(ref, timeout=10, fields=("rewards",))
            assert client.read_bytes(ref, timeout=10).nbytes == nbytes


def test_g1_a_selection_that_no_payload_can_have_is_refused_before_anything_is_sent(lane: Lane) -> None:
    with exchanging(lane) as (server, client):
        ref = server.put(WHOLE)
        many = {"observations": [(row, row) for row in range(1025)]}
        for selected in ({"rows": many}, {"fields": "rewards"}, {"fields": ("x" * (1 << 16),)}):
            with pytest.raises(SelectionError):
                client.read(ref, timeout=10, **selected)  # type: ignore[arg-type]
        assert client.statistics().connects == 0


@pytest.mark.parametrize("lane", IN_BAND, ids=lambda lane: lane.name, indirect=True)
def test_bytes_that_were_not_asked_for_do_not_travel(lane: Lane) -> None:
    with exchanging(lane) as (server, client):
        ref = server.put(WHOLE)
        client.read(ref, timeout=10, fields=("rewards",), rows={"rewards": (0, 100)})
        assert 800 < client.statistics().bytes < 1500
        assert counted(server, "bytes") == client.statistics().bytes


@pytest.mark.parametrize("lane", IN_BAND, ids=lambda lane: lane.name, indirect=True)
def test_a_part_has_a_checksum_of_its_own(lane: Lane) -> None:
    with exchanging(lane, checksum="commit") as (server, client):
        ref = server.put(WHOLE)
        begin = server.ring.segment.slot_offset(ref.slot)
        slot = server.ring.segment.view[begin : begin + ref.nbytes]
        at = slot.tobytes().index(WHOLE["rewards"].tobytes())
        slot[at] ^= 1  # before the checksum of the part is computed, which does not notice it
        assert client.read(ref, timeout=10, consume=False, fields=("rewards",))["rewards"][0] != 0.0
        with pytest.raises(MessageTruncated, match="checksum"):
            client.read(ref, timeout=10)
        slot.release()


@pytest.mark.parametrize("lane", IN_BAND, ids=lambda lane: lane.name, indirect=True)
def test_a_part_of_several_mebibytes_in_many_pieces_arrives_whole(lane: Lane) -> None:
    choice: LaneChoice = lane.name
    whole = np.random.default_rng(1).integers(0, 1 << 60, (1 << 13, 1 << 9))
    rows = [(row, row + 2) for row in range(0, 1 << 13, 16)]
    with (
        serving(lane.name, slot_bytes=(32 << 20) + 1000) as server,
        PayloadClient(lane=choice) as client,
    ):
        ref = server.put({"whole": whole, "other": np.arange(5)})
        for _ in range(3):
            found = client.read(ref, timeout=20, consume=False, fields=("whole",), rows={"whole": rows})["whole"]
            assert np.array_equal(found, np.concatenate([whole[start:stop] for start, stop in rows]))
        assert np.array_equal(client.read(ref, timeout=20, fields=("whole",))["whole"], whole)


# --- peers of every age -----------------------------------------------------------------------------------------

OLD_SERVER = """
import dray.protocol.handshake
dray.protocol.handshake.BODIES_VERSION = 3
whole = {"rewards": np.arange(20_000.0), "other": np.arange(20_000)}
lane, version = arguments["lane"], arguments["version"]
with SharedRingBuffer(4, 1 << 20) as ring, PayloadServer(ring, lane=lane, newest_version=version) as server:
    send(server.put(whole).to_json())
    receive()
    send(server.statistics().counters.bytes)
    receive()
"""


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["tcp", "ucx"])
def test_g1_a_server_older_than_selections_sends_the_whole_of_which_the_part_is_taken_here(
    name: LaneChoice, version: int
) -> None:
    if name == "ucx":
        pytest.importorskip("ucxx")
    with Child(OLD_SERVER, lane=name, version=version) as child:
        ref = PayloadRef.from_json(child.receive())
        with PayloadClient(lane=name) as client:
            for _ in range(2):
                found = client.read(
                    ref, timeout=10, consume=False, fields=("rewards",), rows={"rewards": (10, 12)}
                )
                assert {key: value.tolist() for key, value in found.items()} == {"rewards": [10.0, 11.0]}
            with pytest.raises(SelectionError, match="the payload has no field 'nothing'"):
                client.read(ref, timeout=10, fields=("nothing",))
            (result,) = client.read_many([ref], timeout=10, consume=False, fields=("other",))
            assert list(result.payload) == ["other"]
            with client.lease(ref, timeout=10, fields=("other",)) as leased:
                assert list(leased) == ["other"]
            assert client.statistics().retries == 0
        assert child.ask() == 5 * ref.nbytes
        child.send()


# --- what travels -----------------------------------------------------------------------------------------------


class CountingProxy:
    """Leads connections to an address, and counts the bytes that come from there.

    Attributes:
        received: those bytes.
        endpoint: where it listens.
    """

    def __init__(self, endpoint: str) -> None:
        _, host, port = endpoint.rsplit(":", 2)
        self._address = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        self.received = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        client, _ = self._listener.accept()
        with client, socket.create_connection(self._address) as server:
            while True:
                for ready in select.select([client, server], [], [])[0]:
                    data = ready.recv(1 << 16)
                    if not data:
                        return
                    if ready is server:
                        self.received += len(data)
                    (client if ready is server else server).sendall(data)

    def __enter__(self) -> "CountingProxy":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(10)
        self._listener.close()


def test_the_statistics_of_the_client_are_the_bytes_on_the_wire() -> None:
    handshakes = CHALLENGE.size + WELCOME.size
    with serving("tcp", slot_bytes=1 << 20) as server:
        ref = server.put(WHOLE)
        (endpoint,) = ref.endpoints
        with CountingProxy(endpoint) as proxy, PayloadClient(lane="tcp") as client:
            through = dataclasses.replace(ref, endpoints=(proxy.endpoint,))
            for count in range(1, 4):
                check(client.read(through, timeout=10, consume=False, **SELECTED))
                assert proxy.received == handshakes + count * FRAME_BYTES + client.statistics().bytes
            with contextlib.suppress(DrayError):
                client.read(through, timeout=10, fields=("nothing",))
            assert client.statistics().bytes == 3 * (client.statistics().bytes // 3)
            assert client.statistics().bytes < 30_000 < ref.nbytes // 10
