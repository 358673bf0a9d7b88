"""Runs a command where no address but loopback can be reached: ``python tests/loopback.py COMMAND …``.

The command gets a network namespace of its own, and a new folder as its home. Ray asks a cloud's metadata address
and a name server when it starts, whatever its options are; in the namespace nothing leaves, and the file in the
home keeps Ray from asking.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

MARK = "DRAY_TEST_LOOPBACK"
"""Set in the environment of what runs in such a namespace."""

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_UNSHARE = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--net", "--map-root-user"]


def inside() -> bool:
    """This process runs in such a namespace."""
    return MARK in os.environ


@functools.cache
def problem() -> str:
    """Why no such namespace can be made here; empty if one can."""
    if shutil.which("unshare") is None:
        return "unshare is not installed"
    ended = subprocess.run(
        [*_UNSHARE, sys.executable, __file__, "true"], capture_output=True, text=True, timeout=60, check=False
    )
    return "" if ended.returncode == 0 else f"no network namespace can be made: {ended.stderr.strip()[-200:]}"


def command(arguments: Sequence[str]) -> list[str]:
    """The command that runs `arguments` in a namespace; in one, they themselves."""
    return list(arguments) if inside() else [*_UNSHARE, sys.executable, __file__, *arguments]


def environment(home: Path, **more: str) -> dict[str, str]:
    """The environment variables for such a command.

    Args:
        home: a folder that becomes its home; the file for Ray is written there.
        more: further variables.
    """
    (home / "ray_bootstrap_config.yaml").write_text("provider: {type: local}\n")
    return {
        **_kept(os.environ), "HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled",
        MARK: "1" if inside() else "", **more,
    }  # fmt: skip


def _kept(variables: Mapping[str, str]) -> dict[str, str]:
    """Without what would lead to another cluster, or to another environment."""
    return {name: value for name, value in variables.items() if name not in ("RAY_ADDRESS", "VIRTUAL_ENV")}


def run(arguments: Sequence[str], *, timeout: float, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a namespace and a home of its own; all that it has started ends with it.

    Args:
        arguments: the command.
        timeout: seconds.
        more: environment variables.
    """
    with tempfile.TemporaryDirectory(prefix="dray-home-", dir="/tmp", ignore_cleanup_errors=True) as home:
        variables = environment(Path(home), **more)
        # The namespace of processes ends with its first process, and with it all that it has started.
        started = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *arguments]
        if os.geteuid() != 0:
            started = list(arguments)
        return subprocess.run(
            command(started), env=variables, capture_output=True, text=True, timeout=timeout, check=False
        )


def _bring_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH14x", b"lo", 0)
        (flags,) = struct.unpack_from("H", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request), 16)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _IFF_UP))


if __name__ == "__main__":
    _bring_up()
    os.environ[MARK] = "1"
    os.execvp(sys.argv[1], sys.argv[1:])
