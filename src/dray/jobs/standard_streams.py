"""The standard streams of a process: opened where it was started without, flushed, or led to nowhere."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import IO


def open_missing_streams() -> None:
    """Have descriptors 0 to 2 and `sys.stdout` and `sys.stderr` lead somewhere if the process was started without.

    Otherwise the next file or socket that is opened would get the number of a stream, and what is printed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            setattr(sys, name, os.fdopen(nowhere, "w", encoding="utf-8", errors="backslashreplace"))


def discard(stream: IO[str]) -> None:
    """Let what is still written to `stream`, and what it has buffered, go nowhere."""
    with suppress(OSError, ValueError):  # it has no descriptor, or is closed
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.dup2(nowhere, number)
        finally:
            os.close(nowhere)


def flush_streams() -> None:
    """Write out what the standard streams have buffered, if that is possible.

    Python flushes them at its end, too, and replaces the exit code where that fails.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            discard(stream)
