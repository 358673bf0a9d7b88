"""Journals: what a process has done, one line for each act, which survives a SIGKILL of that process.

A line is written with one call of ``write`` to a file that is opened for appending: after a kill, the last line is
there as a whole or not at all, and nothing of an earlier one is missing. What happened between the last line and
the kill is not known. Acts that others can see therefore have two lines, one before and one after.

| line | fields | meaning |
|---|---|---|
| B | producer id, slots, overwrites, address | a producer has opened |
| ? | number, size | it is about to put a payload |
| P | number, sequence | ``put`` has returned |
| F | number | ``put`` has raised: the payload was not put |
| C | | it is about to close |
| E | lost, text | it has closed; payloads that were lost |
| O | group, leases directly, description | a session begins: a consumer has opened |
| G | producer id, sequence, deliveries, key, number | the session has got a payload |
| a, A | producer id, sequence | it is about to acknowledge the payload; it has done so |
| r, R | producer id, sequence | the same for giving it back |
| x, X | | it is about to close, without an acknowledgement; it has closed |
| W | text | a payload is wrong |
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Line(NamedTuple):
    """One act."""

    kind: str
    at: int  # monotonic nanoseconds
    fields: list[str]


class Journal:
    """The journal of this process."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def write(self, kind: str, *fields: object, at: int = 0) -> None:
        """Add a line; `at` is now by default."""
        line = " ".join((kind, str(at or time.monotonic_ns()), *map(str, fields)))
        os.write(self._descriptor, line.replace("\n", " | ").encode() + b"\n")

    def close(self) -> None:
        """Once."""
        os.close(self._descriptor)


def read(path: Path, offset: int = 0) -> Iterator[Line]:
    """The lines from an offset on. A last line without its end is ignored."""
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            kind, at, *fields = line[:-1].decode().split(" ")
            yield Line(kind, int(at), fields)
