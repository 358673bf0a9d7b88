"""What tests of direct leases share: servers on the shm lane, and clients that lease directly."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from transport_fixtures import pattern

from dray import PayloadClient, PayloadRef, PayloadServer
from dray.errors import StaleSlotError

NBYTES = 40_000


@contextlib.contextmanager
def producing(**options: Any) -> Iterator[PayloadServer]:
    """A server on the shm lane, or on those that are named, with a ring of its own."""
    options = {"slots": 4, "slot_bytes": 1 << 16, "lane": "shm", "threads": 1, "drain_timeout": 0.5} | options
    with PayloadServer.create(**options) as server:
        yield server


@contextlib.contextmanager
def attached_to(server: PayloadServer, **options: Any) -> Iterator[PayloadClient]:
    """A client that leases directly from now on, where that is possible."""
    with PayloadClient(lane="shm", **options) as client:
        with pytest.raises(StaleSlotError):
            client.read_bytes(server.ref(0, 1 << 61, 1), timeout=10)
        yield client


def put(server: PayloadServer, seed: int) -> PayloadRef:
    return server.put_bytes(pattern(seed, NBYTES), timeout=10)


def is_stale(client: PayloadClient, ref: PayloadRef) -> bool:
    try:
        client.read_bytes(ref, timeout=10, consume=False)
    except StaleSlotError:
        return True
    return False


def as_json(ref: PayloadRef) -> Any:
    """A reference for another process."""
    return json.loads(ref.to_json())
