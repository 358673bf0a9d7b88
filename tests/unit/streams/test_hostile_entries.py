"""Entries that another process of the user has written must not end a consumer."""

from __future__ import annotations

import json
import logging
import os
import socket
from pathlib import Path

import pytest

from dray.errors import ProtocolError, StreamTimeout
from dray.ring import SharedRingBuffer
from dray.streams import Consumer, Producer
from dray.streams.registry import Peer, ProducerEntry, Registry
from dray.transport import PayloadServer

WHOLE = {"pid": 7, "command": "a", "producer": "0f" * 16, "groups": ["default"], "endpoints": ["unix:/tmp/none"]}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DRAY_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("DRAY_SCOPE", f"hostile {os.getpid()}")
    return tmp_path


def write(registry: Registry, content: bytes) -> str:
    """An entry with that content, whose process is alive."""
    entry = registry.add("p", {})
    (registry.folder / f"{entry}.json").write_bytes(content)
    return entry


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"[" * 60_000, b"1" * 5000, b'{"pid": Infinity, "command": "a"}', b"\xff", b'{"pid": "x"}'],
    ids=["empty", "a list", "deep", "a long number", "infinity", "no UTF-8", "no number"],
)
def test_an_entry_that_cannot_be_read_is_not_listed(content: bytes) -> None:
    with Registry("s") as registry:
        write(registry, content)
        assert registry.peers("p") == []
        assert registry.elsewhere() == []
        registry.nudge_consumers()


@pytest.mark.parametrize(
    "changed",
    [
        {"groups": "default"},
        {"groups": []},
        {"groups": [["default"]]},
        {"producer": "0f"},
        {"producer": 7},
        {"producer": "xx" * 16},
        {"schema": 7},
        {"endpoints": []},
        {"endpoints": "unix:/tmp/x"},
        {"endpoints": [7]},
        {"endpoints": ["nonsense"]},
        {"endpoints": ["tcp:127.0.0.1:1"]},
    ],
    ids=str,
)
def test_an_entry_that_is_not_that_of_a_producer_is_refused(changed: dict[str, object]) -> None:
    with pytest.raises(ProtocolError, match=r"^the entry p-1 is not that of a producer: "):
        ProducerEntry.of(Peer("p-1", 7, "a", {**WHOLE, **changed}))


def test_an_entry_of_a_producer_is_what_it_states() -> None:
    entry = ProducerEntry.of(Peer("p-1", 7, "a", WHOLE))
    assert entry == (bytes([15]) * 16, ("default",), None, ("unix:/tmp/none",))


def test_a_consumer_takes_payloads_beside_entries_that_are_none(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "dray.streams")
    with Registry("s") as registry, Consumer("s") as consumer:
        bad = write(registry, json.dumps({**WHOLE, "endpoints": ["nonsense"]}).encode())
        with Producer("s") as producer:
            producer.put(number=1)
            assert consumer.get(timeout=20)["number"] == 1
            producer.put(number=2)
            assert consumer.get(timeout=20)["number"] == 2
            consumer.close()
    (line,) = (record.getMessage() for record in caplog.records)
    assert f"the entry {bad} is not that of a producer" in line


def test_a_consumer_waits_on_beside_an_entry_that_names_something_else(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage"
    with (
        Registry("s") as registry,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
        SharedRingBuffer(1, 100) as ring,
        PayloadServer(ring, lane="shm", threads=1) as server,
    ):
        listener.bind(str(garbage))
        listener.listen()
        write(registry, json.dumps({**WHOLE, "endpoints": [f"unix:{garbage}"]}).encode())
        plain = {"endpoints": list(server.endpoints), "producer": ring.producer_id.hex()}
        write(registry, json.dumps({**WHOLE, **plain}).encode())
        with Consumer("s") as consumer:
            with pytest.raises(StreamTimeout, match="this server has no stream"):
                consumer.get(timeout=0.5)
            with Producer("s") as producer:
                producer.put(number=1)
                assert consumer.get(timeout=20)["number"] == 1
                consumer.close()
