"""Tests a lane on this machine: one process reads a payload from another, and every byte is compared.

Both are children of this process, so that a crash in a transport library is a result and does not end the test.
"""

from __future__ import annotations

import json
import os
import platform
import select
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from dray.clock import Deadline
from dray.errors import DrayError
from dray.resources import Closing
from dray.transport.lanes import LANES

MACHINES = ("x86_64", "aarch64")

_MAX_ANSWER_BYTES = 64 * 1024
_END_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class LaneReport:
    """The result of a lane's test.

    Attributes:
        lane: its name.
        works: a payload arrived complete.
        detail: what was read, or the reason of the failure.
        remedy: what to do; empty if nothing is needed, or no remedy is known.
        nbytes: size of the payload that was read.
        seconds: duration of connecting and reading; None if the lane does not work.
    """

    lane: str
    works: bool
    detail: str
    remedy: str = ""
    nbytes: int = 0
    seconds: float | None = None


def check_lane(lane: str, timeout: float) -> LaneReport:
    """Test `lane` with a transfer between two new processes, within about `timeout` seconds."""
    missing = _missing(lane)
    if missing is not None:
        return missing
    deadline = Deadline.after(timeout)
    try:
        with ExitStack() as children:
            server = children.enter_context(_LaneProcess("serve", lane))
            offer = server.answer(deadline)
            reader = children.enter_context(_LaneProcess("read", lane))
            reader.send(offer["ref"])
            answer = reader.answer(deadline)
    except _Failure as failure:
        return LaneReport(lane, False, str(failure), _remedy(lane, failure.about))
    if answer["digest"] != offer["digest"]:
        return LaneReport(
            lane, False, f"the {offer['nbytes']} bytes that were read differ from those that were written"
        )
    nbytes, seconds = int(offer["nbytes"]), float(answer["seconds"])
    detail = f"{nbytes:,} bytes read by another process in {seconds * 1e3:.1f} ms, each compared"
    return LaneReport(lane, True, detail, "", nbytes, seconds)


def _missing(lane: str) -> LaneReport | None:
    """The report of a lane that cannot be tested here, else None."""
    if not sys.platform.startswith("linux") or platform.machine() not in MACHINES:
        here = f"{platform.system()} on {platform.machine()}"
        return LaneReport(lane, False, f"dray runs on Linux, x86-64 or aarch64; this is {here}")
    if not hasattr(os, "memfd_create"):
        return LaneReport(lane, False, "this Python has no os.memfd_create", "use a Python built for glibc 2.27+")
    if not LANES[lane].available:
        return LaneReport(lane, False, f"the {LANES[lane].extra} package is not installed", LANES[lane].install)
    return None


def _remedy(lane: str, about: str) -> str:
    if about == "runtime directory":
        return "set DRAY_RUNTIME_DIR to a folder that only you can enter (chmod 700)"
    if about in ("EMFILE", "ENFILE"):
        return "allow more open files: ulimit -n"
    if about == LANES[lane].extra:
        return LANES[lane].install
    return LANES[lane].advice()


class _Failure(DrayError):
    """A process of the test has failed; the message has the reason."""

    def __init__(self, message: str, about: str = "") -> None:
        super().__init__(message)
        self.about = about


class _LaneProcess(Closing):
    """One of the two processes of a lane's test; it ends with its ``with`` block."""

    def __init__(self, role: str, lane: str) -> None:
        self._role = "serving" if role == "serve" else "reading"
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed by close)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dray.cli.lane_proof", role, lane],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
        )

    def send(self, line: str) -> None:
        """Send a line to the process; if it has ended, `answer` raises with the reason."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
        except BrokenPipeError:
            return

    def answer(self, deadline: Deadline) -> dict[str, Any]:
        """The answer of the process.

        Raises:
            _Failure: the answer is an error, or has not arrived by the deadline.
        """
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        line = b""
        while not line.endswith(b"\n") and len(line) < _MAX_ANSWER_BYTES:
            if not poll.poll(deadline.remaining * 1000):
                raise _Failure(f"the {self._role} process did not answer for {deadline.elapsed:.0f} s")
            received = os.read(descriptor, 4096)
            if not received:
                raise _Failure(self._describe_end(deadline))
            line += received
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise _Failure(f"the {self._role} process: {answer['error']}", answer["about"])
        return answer

    def _describe_end(self, deadline: Deadline) -> str:
        try:
            code = self._process.wait(deadline.remaining)
        except subprocess.TimeoutExpired:
            return f"the {self._role} process closed its output without an answer"
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
        return f"the {self._role} process ended with {how}" + (f": {lines[-1]}" if lines else "")

    def close(self) -> None:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()  # this ends the server
        try:
            process.wait(_END_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        self._stderr.close()
