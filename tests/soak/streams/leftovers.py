"""What dead processes leave behind: files, sockets, shared memory. Living ones sweep it when they come."""

from __future__ import annotations

import os
import time
from collections.abc import Set
from pathlib import Path
from typing import Final

from dray.streams import Consumer, Producer

_SHARED_MEMORY: Final = Path("/dev/shm")
_SWEEP_SECONDS: Final = 30.0


def janitor(name: str, scope: str) -> None:
    """A producer and a consumer that come and go: both list the other side, and remove what is dead there.

    They do so in a process of their own, so that the supervisor has no part in the stream.
    """
    pid = os.fork()
    if not pid:
        code = 1
        try:
            with Producer(name, scope=scope), Consumer(name, scope=scope, group="default"):
                code = 0
        finally:
            os._exit(code)
    until = time.monotonic() + _SWEEP_SECONDS
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > until:
            raise TimeoutError("a producer and a consumer that only come and go have not ended")
        time.sleep(0.01)
    if ended[1]:
        raise RuntimeError(f"a producer and a consumer that only come and go have failed: {ended[1]}")


def leftovers(runtime: Path, living: Set[int]) -> list[str]:
    """What is in the folder of the scope, of the sockets and of shared memory and belongs to no living process."""
    found = []
    for path in sorted(runtime.rglob("*")):
        if path.name in ("stream.json", "streams") or path.parent.name == "streams":
            continue
        if not _belongs(path, runtime, living):
            found.append(str(path.relative_to(runtime)))
    for line in Path("/proc/net/unix").read_text().splitlines():
        name = line.split(" ")[-1]
        if name.startswith(str(runtime)) and not Path(name).exists():
            found.append(f"socket {name}")
    return found + [str(path) for path in _SHARED_MEMORY.glob("dray*")]


def _belongs(path: Path, runtime: Path, living: Set[int]) -> bool:
    """A living process has the file, or something in the same folder, open or locked."""
    top = runtime / path.relative_to(runtime).parts[0]
    stem = path.with_suffix("")
    for pid in living:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = Path(os.readlink(descriptor))  # noqa: PTH115
            except OSError:
                continue
            if target.with_suffix("") == stem or (top.name != "streams" and top in target.parents):
                return True
    return False
