"""What a producer states about itself, in its entry or over the network: it is one, or a typed refusal.

Entries are files of this user, so another process may have written anything. Input: a byte, then the content of
the entry; a byte of 255 repeats the content a thousand times.
"""

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from fuzz.cursor import Cursor

from dray.errors import ProtocolError
from dray.streams.registry import ProducerEntry, Registry
from dray.transport.subscription import parse_description

_WHOLE = {
    "pid": 7,
    "command": "python train.py",
    "folder": "/",
    "name": "s",
    "producer": "0f" * 16,
    "groups": ["default", "eval"],
    "schema": None,
    "endpoints": ["unix:/tmp/x"],
}
_REPEATS = 1000


def entry(**changed: object) -> bytes:
    """The input for an entry."""
    return b"\0" + json.dumps({**_WHOLE, **changed}).encode()


SEEDS = [
    entry(),
    entry(schema="x", groups=["default"]),
    entry(groups="default"),
    entry(groups=[["default"]]),
    entry(producer="0f"),
    entry(producer=7),
    entry(endpoints=[]),
    entry(endpoints="unix:/tmp/x"),
    entry(endpoints=[{}, 3]),
    entry(pid="x"),
    entry(command=["\ud800\n\x1b[31m"]),
    b'\0{"pid": Infinity, "command": "a"}',
    b'\0{"pid": NaN, "command": "a", "groups": []}',
    b"\xff[",
    b'\xff{"a":',
    b"\xff1",
    b"\0[]",
    b"\0",
]


def run(data: bytes) -> None:
    cursor = Cursor(data)
    repeated = cursor.byte() == 255
    content = cursor.rest() * (_REPEATS if repeated else 1)
    with contextlib.suppress(ProtocolError):
        groups = parse_description(content, "tcp:127.0.0.1:1")["groups"]
        assert all(isinstance(each, str) for each in groups)
    folder = tempfile.mkdtemp(prefix="dray-fuzz-")
    before = os.environ.get("DRAY_RUNTIME_DIR")
    os.environ["DRAY_RUNTIME_DIR"] = folder
    try:
        with Registry("s", "fuzz") as registry:
            made = registry.add("p", _WHOLE)
            (path,) = Path(folder).glob(f"**/{made}.json")
            path.write_bytes(content)
            for peer in registry.peers("p"):
                assert peer.command.isprintable()
                with contextlib.suppress(ProtocolError):
                    found = ProducerEntry.of(peer)
                    assert len(found.producer) == 16
                    assert found.endpoints
                    assert all(isinstance(each, str) for each in (*found.endpoints, *found.groups))
            registry.nudge_consumers()
            registry.elsewhere()
    finally:
        shutil.rmtree(folder)
        if before is None:
            del os.environ["DRAY_RUNTIME_DIR"]
        else:
            os.environ["DRAY_RUNTIME_DIR"] = before
