"""The result of a read whose ACK cannot be sent, and leases that are never used."""

from collections.abc import Sequence
from typing import Any

import pytest
from transport_fixtures import WatchedNetwork, ring_of
from transport_fixtures import over_connections as serving
from waiting import wait_until

from dray import PayloadClient
from dray.clock import Deadline
from dray.errors import ConnectionReset, PayloadFormatError, ProducerLostError
from dray.protocol.frames import Kind
from dray.transport.connection import Connection
from dray.transport.lanes.base import Stream


class FailingNetwork(WatchedNetwork):
    """Connections of which some fail with the next message of a kind, before it is sent.

    Attributes:
        left: how many of the next messages of each kind fail.
    """

    def __init__(self) -> None:
        super().__init__(self._fail)
        self.left = {Kind.ACK: 0, Kind.CONSUME: 0}

    def _fail(self, stream: Stream, items: Sequence[Any]) -> bool:
        kind = items[0][0]
        if self.left.get(kind, 0):
            self.left[kind] -= 1
            raise ConnectionReset("the connection has just failed")
        return False


@pytest.fixture
def network() -> FailingNetwork:
    return FailingNetwork()


@pytest.mark.parametrize("inline", [True, False])
def test_a_payload_whose_ack_cannot_be_sent_is_handed_out_and_consumed_once(
    lane: Any, network: FailingNetwork, inline: bool
) -> None:
    """A copy from a slot (shm) cannot be trusted then, and is made again on another connection."""
    copied = lane == "shm" and not inline
    with (
        serving(lane) as server,
        PayloadClient(lane=lane, inline_bytes=100 if inline else 0, network=network) as client,
    ):
        ref, other = server.put_bytes(b"payload"), server.put_bytes(b"other")
        network.left[Kind.ACK] = 1
        assert bytes(client.read_bytes(ref, timeout=5)) == b"payload"
        assert client.statistics().retries == (1 if copied else 0)
        assert bytes(client.read_bytes(other, timeout=5)) == b"other"
        wait_until(lambda: ring_of(server).statistics().free == 4, "both to be consumed")
        assert client.statistics().acks_replayed == (0 if copied else 1)
        assert ring_of(server).statistics().consumed == 2


def test_an_ack_whose_repetition_fails_too_is_repeated_again(network: FailingNetwork) -> None:
    with serving("tcp") as server, PayloadClient(lane="tcp", network=network) as client:
        ref, other = server.put_bytes(b"payload"), server.put_bytes(b"other")
        network.left[Kind.ACK] = 1
        assert bytes(client.read_bytes(ref, timeout=5)) == b"payload"
        network.left[Kind.CONSUME] = 1
        assert bytes(client.read_bytes(other, timeout=5)) == b"other"  # its second attempt
        wait_until(lambda: ring_of(server).statistics().free == 4, "both to be consumed")
        assert client.statistics().acks_replayed == 1


def test_an_ack_to_a_producer_in_whose_place_another_listens_is_forgotten(network: FailingNetwork) -> None:
    with PayloadClient(lane="tcp", network=network) as client:
        with serving("tcp") as server:
            ref = server.put_bytes(b"payload")
            network.left[Kind.ACK] = 1
            assert bytes(client.read_bytes(ref, timeout=5)) == b"payload"
        with pytest.raises(ProducerLostError):
            client.read_bytes(ref, timeout=5)
        assert client.statistics().unconfirmed_acks == 1  # no server listens, but one may be about to
        with serving("tcp", port=int(ref.endpoints[0].rpartition(":")[2])) as other:
            assert other.endpoints == ref.endpoints
            with pytest.raises(ProducerLostError):
                client.read_bytes(ref, timeout=5)
        assert client.statistics().unconfirmed_acks == 0


def test_acks_to_producers_that_are_gone_do_not_add_up(
    network: FailingNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dray.transport.connections.MAX_PRODUCERS", 2)
    with PayloadClient(lane="tcp", network=network) as client:
        for _ in range(4):
            with serving("tcp") as server:
                ref = server.put_bytes(b"payload")
                network.left[Kind.ACK] = 1
                assert bytes(client.read_bytes(ref, timeout=5)) == b"payload"
        assert client.statistics().unconfirmed_acks == 2


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


def test_a_client_and_its_connections_name_their_lanes_and_endpoint() -> None:
    with serving("tcp") as server, PayloadClient() as client:
        assert repr(client) == "<PayloadClient shm/ucx/tcp>"
        ref = server.put_bytes(b"x")
        connection = Connection.open(ref.endpoints[0], ref.producer, None, Deadline.after(5))
        assert repr(connection) == f"<Connection {ref.endpoints[0]} to {ref.producer.hex()[:8]}>"
        connection.close()
