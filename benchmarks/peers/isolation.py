"""What Ray runs in: a network namespace that has nothing but loopback, and a home folder of its own.

At its start Ray asks a cloud's metadata address and a name server, whatever its settings are. `isolated` gives a
process both; it calls `join_loopback` before it imports Ray.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROVIDER_FILE = "ray_bootstrap_config.yaml"
"""A file in the home folder; with `PROVIDER` in it Ray asks no cloud what it runs on."""
PROVIDER = "provider:\n  type: local\n"

_IFREQ = struct.Struct("16sH22x")
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1
_PROBE_SECONDS = 20.0


class NotIsolated(RuntimeError):
    """A process that is about to start Ray could reach other hosts; the text states how."""


@dataclass(frozen=True, slots=True)
class Isolation:
    """How a process is started in a network of its own.

    Attributes:
        prefix: goes before its command.
        environment: what is added to this process's own.
    """

    prefix: tuple[str, ...]
    environment: dict[str, str]


@contextlib.contextmanager
def isolated() -> Iterator[Isolation]:
    """A prefix and a home folder for one process, the folder removed at the end.

    Raises:
        NotIsolated: this machine gives no network namespace.
    """
    prefix = _prefix()
    with tempfile.TemporaryDirectory(prefix="dray-bench-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        (home / PROVIDER_FILE).write_text(PROVIDER, encoding="utf-8")
        # Ray's sockets need a short path; "RAY_TMPDIR" is where it puts its sessions.
        yield Isolation(prefix, {"HOME": folder, "RAY_TMPDIR": folder})


def join_loopback() -> None:
    """Bring this namespace's loopback interface up.

    Raises:
        NotIsolated: the process has other interfaces, or Ray would ask a cloud what it runs on.
    """
    found = [name for _, name in socket.if_nameindex()]
    if found != ["lo"]:
        raise NotIsolated(f"Ray runs only where loopback is the one interface; there are {', '.join(found)}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, _IFREQ.pack(b"lo", _IFF_UP))
    if not (Path.home() / PROVIDER_FILE).is_file():
        raise NotIsolated(f"Ray runs only with {PROVIDER_FILE} in its home folder; there is none in {Path.home()}")


@functools.cache
def _prefix() -> tuple[str, ...]:
    """The command that gives another one its own network, as root or in a namespace of users."""
    unshare = shutil.which("unshare")
    if unshare is None:
        raise NotIsolated("Ray needs a network of its own, and the command unshare (util-linux) is not installed")
    options = ("--net",) if os.geteuid() == 0 else ("--user", "--map-root-user", "--net")
    prefix = (unshare, *options)
    probe = "import socket; assert [name for _, name in socket.if_nameindex()] == ['lo']"
    found = subprocess.run(
        [*prefix, sys.executable, "-c", probe], capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False
    )
    if found.returncode:
        why = (found.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise NotIsolated(f"Ray needs a network of its own: {' '.join(prefix)} failed: {why}")
    return prefix
