"""W13: what a read gives when its ACK cannot be sent, and leases that are never used."""

from typing import Any

import pytest
from transport_fixtures import ring_of, serving
from waiting import wait_until

from dray import PayloadClient, PayloadFormatError
from dray.clock import Deadline
from dray.errors import ConnectionReset, ProducerLostError
from dray.protocol.frames import FRAME_BYTES, Kind
from dray.transport.connection import Connection
from dray.transport.lanes.socket import SocketStream
from dray.transport.lanes.ucx import UcxStream


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many of the next ACKs and CONSUMEs fail with their connections, before they are sent."""
    left = {"acknowledge": 0, "consume": 0}
    names = {int(Kind.ACK): "acknowledge", int(Kind.CONSUME): "consume"}
    for stream in (SocketStream, UcxStream):

        def fail(self: Any, items: Any, descriptor: int | None = None, send: Any = stream.send) -> Any:
            name = names.get(items[0][0], "") if isinstance(items[0], bytes) else ""
            if left.get(name) and len(items[0]) % FRAME_BYTES == 0:
                left[name] -= 1
                raise ConnectionReset("the connection has just failed")
            return send(self, items, descriptor)

        monkeypatch.setattr(stream, "send", fail)
    return left


@pytest.mark.parametrize("inline", [True, False])
def test_w13_a_payload_whose_ack_cannot_be_sent_is_handed_out_and_consumed_once(
    lane: Any, failing: dict[str, int], inline: bool
) -> None:
    """A copy from a slot (shm) cannot be trusted then, and is made again on another connection."""
    copied = lane == "shm" and not inline
    with serving(lane) as server, PayloadClient(lane=lane, inline_bytes=100 if inline else 0) as client:
        ref, other = server.put_bytes(b"payload"), server.put_bytes(b"other")
        failing["acknowledge"] = 1
        assert bytes(client.read_bytes(ref, timeout=5)) == b"payload"
        assert client.statistics()["retries"] == (1 if copied else 0)
        assert bytes(client.read_bytes(other, timeout=5)) == b"other"
        wait_until(lambda: ring_of(server).statistics().free == 4, "both to be consumed")
        assert client.statistics().get("acks_repeated", 0) == (0 if copied else 1)
        assert ring_of(server).statistics().consumed == 2


def test_w13_an_ack_whose_repetition_fails_too_is_repeated_again(failing: dict[str, int]) -> None:
    with serving("tcp") as server, PayloadClient(lane="tcp") as client:
        ref, other = server.put_bytes(b"payload"), server.put_bytes(b"other")
        failing["acknowledge"] = 1
        assert bytes(client.read_bytes(ref, timeout=5)) == b"payload"
        failing["consume"] = 1
        assert bytes(client.read_bytes(other, timeout=5)) == b"other"  # its second attempt
        wait_until(lambda: ring_of(server).statistics().free == 4, "both to be consumed")
        assert client.statistics()["acks_repeated"] == 1


def test_w13_an_ack_to_a_producer_in_whose_place_another_listens_is_forgotten(failing: dict[str, int]) -> None:
    with PayloadClient(lane="tcp") as client:
        with serving("tcp") as server:
            ref = server.put_bytes(b"payload")
            failing["acknowledge"] = 1
            assert bytes(client.read_bytes(ref, timeout=5)) == b"payload"
        with pytest.raises(ProducerLostError):
            client.read_bytes(ref, timeout=5)
        assert client._exchanges._unconfirmed  # nobody listens, and may be about to
        with serving("tcp", port=int(ref.endpoints[0].rpartition(":")[2])) as other:
            assert other.endpoints == ref.endpoints
            with pytest.raises(ProducerLostError):
                client.read_bytes(ref, timeout=5)
        assert not client._exchanges._unconfirmed


def test_w13_acks_to_producers_that_are_gone_do_not_add_up(
    failing: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dray.transport.connections._MOST_PRODUCERS", 2)
    with PayloadClient(lane="tcp") as client:
        for _ in range(4):
            with serving("tcp") as server:
                ref = server.put_bytes(b"payload")
                failing["acknowledge"] = 1
                assert bytes(client.read_bytes(ref, timeout=5)) == b"payload"
        assert len(client._exchanges._unconfirmed) == 2
        assert ref.producer in client._exchanges._unconfirmed


def test_a_lease_on_bytes_that_are_no_arrays_goes_back(lane: Any) -> None:
    with serving(lane) as server, PayloadClient(lane=lane) as client:
        ref = server.put_bytes(b"no arrays")
        with pytest.raises(PayloadFormatError), client.lease(ref, timeout=5):
            raise AssertionError("the block is not entered")
        wait_until(lambda: ring_of(server).get_ready_count() == 1, "the payload to be ready again")
        assert bytes(client.read_bytes(ref, timeout=5)) == b"no arrays"


def test_a_lease_that_is_never_entered_goes_back(lane: Any) -> None:
    with serving(lane) as server, PayloadClient(lane=lane) as client:
        ref = server.put({"a": [1, 2, 3]})
        lease = client.lease(ref, timeout=5)
        assert ring_of(server).statistics().leases == 1
        lease.close()
        lease.close()
        wait_until(lambda: ring_of(server).get_ready_count() == 1, "the payload to be ready again")
        assert client.read(ref, timeout=5)["a"].tolist() == [1, 2, 3]


def test_a_client_and_its_connections_say_where_they_lead() -> None:
    with serving("tcp") as server, PayloadClient() as client:
        assert repr(client) == "<PayloadClient shm/ucx/tcp>"
        ref = server.put_bytes(b"x")
        connection = Connection.open(ref.endpoints[0], ref.producer, None, Deadline.after(5))
        assert repr(connection) == f"<Connection {ref.endpoints[0]} to {ref.producer.hex()[:8]}>"
        connection.close()
