"""`PayloadServer` as programs use it: its own ring, typed statistics, protocol versions, the trace."""

import dataclasses
import json
import threading
from pathlib import Path

import pytest
from direct_consumers import attach
from transport_fixtures import over_connections, serving
from waiting import wait_until

from dray import PayloadClient, PayloadServer, make_secret
from dray.clock import Deadline
from dray.errors import BufferClosedError, BufferFullError, ConfigError, ProtocolError, VersionMismatch
from dray.protocol.frames import MIN_VERSION, VERSION
from dray.ring import SharedRingBuffer, SlotWriter, slots
from dray.ring.direct import direct_problem
from dray.transport import trace as traced
from dray.transport.connection import Connection
from dray.transport.server_statistics import LeaseInfo, ServerCounters, ServerStatistics

# --- a ring of its own ------------------------------------------------------------------------------------------


def test_a_created_server_has_a_ring_that_is_closed_with_it() -> None:
    with PayloadServer.create(slots=2, slot_bytes=100, lane="shm", threads=1, on_full="error") as server:
        assert (server.ring.slots, server.ring.slot_bytes, server.ring.on_full) == (2, 100, "error")
        for _ in range(2):
            server.put_bytes(b"payload")
        with pytest.raises(BufferFullError):
            server.put_bytes(b"payload")
        with PayloadClient() as client:
            ref = server.ref(0, 0, 7)
            assert bytes(memoryview(client.read_bytes(ref))) == b"payload"
            assert server.wait_consumed(ref)
    server.close()
    assert server.ring.closed
    with pytest.raises(BufferClosedError):
        server.statistics()


def test_a_server_that_cannot_be_created_gives_back_what_it_has_opened() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ConfigError, match="threads"):
        PayloadServer.create(slots=2, slot_bytes=100, threads=0)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("port", [-1, 65_536, {"tcp": 65_536}])
def test_a_port_that_is_none_is_refused_also_where_nothing_listens_on_it(port: int | dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"port = .* is not allowed: 0 to 65535"):
        PayloadServer.create(slots=2, slot_bytes=100, lane="shm", port=port)


def test_the_ring_of_the_caller_stays_open() -> None:
    with SharedRingBuffer(1, 100) as ring:
        PayloadServer(ring, lane="shm", threads=1).close()
        assert not ring.closed


@pytest.mark.skipif(bool(direct_problem()), reason=direct_problem() or "-")
def test_consumers_that_attached_to_an_earlier_server_wake_a_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "RESCAN_SECONDS", 1000.0)
    with SharedRingBuffer(1, 64) as ring:
        consumer = attach(ring)
        with ring.claim(7) as writer:
            writer.commit()
        lease = consumer.lease(writer.slot, writer.sequence, 7)
        assert lease is not None
        with PayloadServer(ring, lane="shm", threads=1):
            claimed: list[SlotWriter] = []
            thread = threading.Thread(target=lambda: claimed.append(ring.claim(1, timeout=None)), daemon=True)
            thread.start()
            wait_until(lambda: ring.direct().waiting, "the claim to set the doorbell")
            lease.end(consumed=True)
            thread.join(20)
            assert [each.sequence for each in claimed] == [1]
            claimed[0].abort()


# --- versions ---------------------------------------------------------------------------------------------------


def opened(server: PayloadServer, secret: bytes | None, version: int) -> Connection:
    ref = server.put_bytes(b"payload")
    (endpoint,) = server.endpoints
    return Connection.open(endpoint, ref.producer, secret, Deadline.after(10), version=version)


@pytest.mark.parametrize("lane", ["shm", "tcp"])
@pytest.mark.parametrize("with_secret", [False, True])
@pytest.mark.parametrize(
    ("servers", "clients", "spoken"), [(1, 1, 1), (1, VERSION, 1), (VERSION, 1, 1), (VERSION, VERSION, VERSION)]
)
def test_both_sides_speak_the_newest_common_version(
    lane: str, with_secret: bool, servers: int, clients: int, spoken: int
) -> None:
    secret = make_secret() if with_secret else None
    events: list[traced.TraceEvent] = []
    with serving(lane, threads=1, secret=secret, newest_version=servers, trace=events.append) as server:
        connection = opened(server, secret, clients)
        assert connection.version == spoken
        ref = server.put_bytes(b"payload")
        status_deadline = Deadline.after(10)
        held = connection.read(ref, 0, status_deadline, status_deadline, copy=True)
        assert bytes(memoryview(held.data())) == b"payload"  # type: ignore[union-attr]
        connection.close()
        (connect,) = (event for event in events if isinstance(event, traced.Connect))
        assert connect.version == spoken
        counters = server.statistics().counters
        assert (counters.other_versions, counters.malformed) == (int(servers < clients), 0)


def test_a_client_reads_from_an_older_server_on_every_lane(lane: str) -> None:
    secret = make_secret()
    with (
        serving(lane, threads=1, secret=secret, newest_version=MIN_VERSION) as server,
        PayloadClient(lane=lane, secret=secret) as client,
    ):
        for size in (7, 1 << 16):
            data = bytes(size)
            assert bytes(memoryview(client.read_bytes(server.put_bytes(data), timeout=10))) == data
        assert client.statistics().retries == 0


def test_a_client_reconnects_to_an_older_server_once() -> None:
    with serving("tcp", threads=1, newest_version=MIN_VERSION) as server:
        opened(server, None, VERSION).close()
        assert server.statistics().counters.connections == 2
        with pytest.raises(VersionMismatch) as caught:
            opened(server, None, version=0)
        assert caught.value.version == MIN_VERSION
        assert server.statistics().counters.connections == 3


@pytest.mark.parametrize("version", [0, VERSION + 1])
def test_a_server_speaks_known_versions_only(version: int) -> None:
    with pytest.raises(ConfigError, match="newest_version"):
        PayloadServer.create(slots=1, slot_bytes=1, newest_version=version)


# --- statistics -------------------------------------------------------------------------------------------------


def statistics() -> ServerStatistics:
    with SharedRingBuffer(2, 100) as ring:
        found = ring.statistics()
    lease = LeaseInfo(pid=None, slot=1, sequence=7, reader=0, age=1.5)
    return ServerStatistics(
        b"p" * 16, ("tcp:127.0.0.1:4000",), 3, (lease,), ServerCounters(reads=4, bytes=100), found
    )


def test_statistics_survive_json() -> None:
    found = statistics()
    assert ServerStatistics.from_json(found.to_json()) == found


def test_statistics_of_a_server_come_over_a_connection() -> None:
    with serving("tcp", threads=1) as server:
        ref = server.put_bytes(b"payload")
        connection = opened(server, None, VERSION)
        held = connection.read(ref, 0, Deadline.after(10), Deadline.after(10), copy=False)
        assert not isinstance(held, Exception)
        found = ServerStatistics.from_json(connection.stat(Deadline.after(10)))
        assert (found.producer, found.endpoints, found.open_connections) == (ref.producer, server.endpoints, 1)
        (lease,) = found.leases
        assert (lease.slot, lease.sequence, lease.reader) == (ref.slot, ref.sequence, 0)
        assert (found.counters.reads, found.ring.ready, found.ring.reading) == (1, 1, 1)
        connection.close()
        wait_until(lambda: server.statistics().leases == (), "the lease to end")
        assert server.statistics().counters.reads == 1


def test_the_keys_of_version_1_stay() -> None:
    found = statistics().to_dict()
    assert found.keys() == {"producer", "endpoints", "open_connections", "leases", "server", "ring"}
    assert {"pid", "leases", "age"} <= found["leases"][0].keys()
    assert found["leases"][0]["leases"] == 1
    assert "late_finalises" in found["ring"]


def test_statistics_of_a_newer_or_older_server_are_read() -> None:
    found = statistics()
    changed = found.to_dict()
    changed["new"] = changed["server"]["new"] = changed["ring"]["new"] = changed["leases"][0]["new"] = "x"
    assert ServerStatistics.from_json(json.dumps(changed)) == found
    del changed["server"]["busy"]
    changed["leases"] = [{"pid": 7, "leases": 2, "age": 0.5}]
    assert ServerStatistics.from_json(json.dumps(changed)) == dataclasses.replace(found, leases=())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("producer", "xyz"), ("producer", 7), ("endpoints", "tcp:a:1"), ("endpoints", [7]),
        ("open_connections", "3"), ("open_connections", True), ("open_connections", 1.0),
        ("open_connections", None),
        ("leases", {}), ("leases", [7]), ("leases", [{"slot": 1}]),
        ("server", []), ("server", {"reads": "4"}), ("server", {"reads": None}), ("ring", None), ("ring", {}),
    ],
)  # fmt: skip
def test_statistics_with_a_value_of_another_type_are_refused(key: str, value: object) -> None:
    with pytest.raises(ProtocolError, match=f"statistics: {key}"):
        ServerStatistics.from_json(json.dumps({**statistics().to_dict(), key: value}))


@pytest.mark.parametrize("text", ["", "7", "[]", "{", "[" * 100_000])
def test_a_text_that_is_no_statistics_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError, match="statistics"):
        ServerStatistics.from_json(text)


# --- the trace --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lane", ["shm", "tcp"])
def test_a_trace_reports_what_happens_at_an_endpoint(lane: str) -> None:
    events: list[traced.TraceEvent] = []
    with over_connections(lane, threads=1, trace=events.append) as server:
        with PayloadClient(lane=lane) as client:
            assert client.read_bytes(server.put_bytes(b"payload")).tobytes() == b"payload"
        wait_until(lambda: isinstance(events[-1], traced.Discard), "the connection to be closed")
    assert {event.endpoint for event in events} == set(server.endpoints)
    names = [type(event).__name__ for event in events]
    for name in ("Connect", "Request", "Status", "Payload", "Acknowledgement", "Discard"):
        assert name in names
    assert names.index("Request") < names.index("Status") < names.index("Payload")
