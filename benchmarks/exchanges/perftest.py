"""`ucx_perftest` from the libucx wheel: tag bandwidth with error handling, and the segments of dray's lane."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import time
from pathlib import Path

from dray.clock import Deadline
from dray.transport.lanes.ucx_worker import SEGMENT_SIZE

_SECONDS = 60.0
_START_SECONDS = 10.0
_MIB = 1 << 20


class PerftestError(Exception):
    """`ucx_perftest` did not give a figure."""


def find_perftest() -> Path | None:
    """The program of the installed libucx wheel."""
    package = importlib.util.find_spec("libucx")
    for location in (package.submodule_search_locations or []) if package else []:
        program = Path(location) / "bin" / "ucx_perftest"
        if program.exists():
            return program
    return None


def tag_bandwidth(program: Path, nbytes: int, count: int) -> float:
    """Bytes per second of `count` messages of `nbytes` bytes between two processes.

    Raises:
        PerftestError: the program fails, or does not end in time.
    """
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(program.parent.parent / "lib"),
        "UCX_TCP_TX_SEG_SIZE": SEGMENT_SIZE,
        "UCX_TCP_RX_SEG_SIZE": SEGMENT_SIZE,
        "UCX_NET_DEVICES": "lo",
        "UCX_WARN_UNUSED_ENV_VARS": "n",
    }
    port = _free_port()
    serving = subprocess.Popen(
        [program, "-p", str(port)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait_listening(port, serving)
        asked = ["-p", str(port), "-t", "tag_bw", "-e", "-s", str(nbytes), "-n", str(count)]
        asked += ["-w", str(max(2, count // 10)), "-f", "-v"]
        done = subprocess.run(
            [program, "127.0.0.1", *asked], env=environment, capture_output=True, text=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise PerftestError(f"ucx_perftest did not end within {_SECONDS:.0f} s") from error
    finally:
        serving.kill()
        serving.wait()
    lines = [line.split(",") for line in done.stdout.splitlines() if "," in line]
    if done.returncode or len(lines) < 2:
        raise PerftestError(f"ucx_perftest ended with {done.returncode}: {done.stderr.strip()[-200:]}")
    figures = dict(zip(lines[0], lines[-1], strict=True))
    return float(figures["overall_bw"]) * _MIB


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _wait_listening(port: int, serving: subprocess.Popen[bytes]) -> None:
    """The program serves one client only, so the port is read from the kernel's table and not tried."""
    wanted = f":{port:04X} 00000000:0000 0A "
    deadline = Deadline.after(_START_SECONDS)
    while serving.poll() is None and not deadline.expired:
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            text = Path(table).read_text(encoding="ascii") if Path(table).exists() else ""
            if wanted in text or f":{port:04X} {'0' * 32}:0000 0A " in text:
                return
        time.sleep(0.01)
    raise PerftestError("ucx_perftest does not listen")
