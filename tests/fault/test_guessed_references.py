"""B1: references that somebody made up, to payloads that are not committed when they are asked for."""

import threading
from typing import Any

import numpy as np
import pytest
from transport_fixtures import ring_of, serving

from dray import PayloadClient, PayloadRef
from dray.payload.codec import pack
from dray.transport.connection import Connection

IMAGE = bytes(pack({"x": np.arange(5000.0)}))


@pytest.mark.parametrize("how", ["read", "read_many", "lease"])
def test_b1_a_payload_committed_while_it_is_read_ahead_is_handed_out_as_it_was_committed(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """On shm a client copies, and unpacks, before STATUS says whether there is anything to copy."""
    with serving("shm", slot_bytes=len(IMAGE)) as server, PayloadClient(lane="shm") as client:
        client.read_bytes(server.put_bytes(b"first"), timeout=5)
        writer = ring_of(server).claim(len(IMAGE))
        producer = ring_of(server).producer_id
        ref = PayloadRef(producer, writer.slot, writer.sequence, len(IMAGE), tuple(server.endpoints))
        send, ahead = Connection._send, Connection._ahead
        held_back: list[tuple[Connection, bytes, Any]] = []

        def send_later(self: Connection, message: bytes, deadline: Any) -> None:
            if writer.open:
                held_back.append((self, message, deadline))
            else:
                send(self, message, deadline)

        def commit_after_the_look(self: Connection, *asked: Any) -> Any:
            seen = ahead(self, *asked)
            if writer.open:
                writer.buffer[:] = IMAGE
                writer.commit()
                send(*held_back.pop())
            return seen

        monkeypatch.setattr(Connection, "_send", send_later)
        monkeypatch.setattr(Connection, "_ahead", commit_after_the_look)
        if how == "read":
            assert bytes(client.read_bytes(ref, timeout=5)) == IMAGE
        elif how == "read_many":
            ((_, found),) = client.read_many_bytes([ref], timeout=5)
            assert bytes(found) == IMAGE
        else:
            with client.lease(ref, timeout=5) as arrays:
                assert np.array_equal(arrays["x"], np.arange(5000.0))
                arrays.clear()
        assert threading.active_count() < 10
