"""Fault W12 of docs/reference/failure-modes.md: what dead owners of sockets leave, and paths that are too long."""

from pathlib import Path

import pytest
from transport_fixtures import SERVER, Child, pattern, reference, serving

from dray import PayloadClient, PayloadServer, SharedRingBuffer
from dray.errors import ConfigError
from dray.private_directory import MAX_SOCKET_PATH


def socket_of(endpoints: list[str]) -> Path:
    (endpoint,) = endpoints
    return Path(endpoint.removeprefix("unix:"))


def test_w12_sockets_of_dead_owners_are_swept_at_the_next_start_and_those_of_others_stay() -> None:
    options = {"lane": "shm", "threads": 1}
    with (
        Child(SERVER, slots=2, slot_bytes=1000, options=options) as dies,
        Child(SERVER, slots=2, slot_bytes=1000, options=options) as stopped,
        Child(SERVER, slots=2, slot_bytes=1000, options=options) as running,
    ):
        left, kept, served = (socket_of(server.receive()) for server in (dies, stopped, running))
        ref = reference(running.ask([1, 1000]))
        dies.kill()
        stopped.stop()
        assert left.exists()
        with serving("shm"):
            assert not left.parent.exists()
            assert kept.exists()
            assert served.exists()
            with PayloadClient(lane="shm") as client:
                assert memoryview(client.read_bytes(ref, timeout=5)) == pattern(1, 1000)


def test_w12_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * MAX_SOCKET_PATH)
    deep.mkdir(mode=0o700)
    with SharedRingBuffer(1, 1000) as ring:
        with pytest.raises(ConfigError):
            PayloadServer(ring, lane="shm", directory=deep)
        assert list(deep.iterdir()) == []
