"""Where the agent of a user is found that was started by itself, with `dray agent`: a folder with a fixed name."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dray.errors import ConfigError
from dray.private_directory import default_root, own_root
from dray.resources import needing
from dray.system_calls import needed

if sys.platform != "win32":
    import fcntl

SOCKET_NAME: Final = "agent.sock"
"""The socket of an agent in its folder, at which owners register their rings."""

AGENT_VARIABLE: Final = "DRAY_AGENT"
"""Environment variable with the path of the socket of the agent that is to be used."""

_FOLDER, _LOCK = "agent", "agent.lock"


def find_agent() -> Path | None:
    """The socket of the agent that ``$DRAY_AGENT`` names, else of this user's `dray agent`; None without one."""
    if chosen := os.environ.get(AGENT_VARIABLE):
        return Path(chosen)
    found = default_root() / _FOLDER / SOCKET_NAME
    return found if found.exists() else None


@contextlib.contextmanager
def standing_folder() -> Iterator[Path]:
    """The folder of this user's one agent, for as long as the block runs. What a killed one has left is removed.

    Raises:
        ConfigError: another agent of this user runs, or the runtime directory cannot be used.
        OutOfResources: no descriptor is left.
    """
    folder = own_root() / _FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    with needing("the lock of the agent"):
        lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            with needed("flock"):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = os.pread(lock, 20, 0).decode("ascii", "replace")
            allowed = f"one agent of this user at a time: process {pid} runs"
            raise ConfigError("agent", str(folder), allowed) from error
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        for socket in folder.glob("*.sock"):
            socket.unlink(missing_ok=True)
        yield folder
    finally:
        os.close(lock)
