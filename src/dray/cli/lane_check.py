"""Tests a lane on this machine: one process reads a payload from another, and every byte is compared.

Both are children of this process, so that a crash in a transport library is a result and does not end the test:
``python -m dray.cli.lane_check serve LANE`` and ``… read LANE``.

Each prints one line of JSON, with the key ``error`` after an error. The reader reads the reference from its
standard input; the server ends when its own is closed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np

from dray.clock import MONOTONIC, Deadline
from dray.errors import ConfigError, DrayError, MissingDependencyError
from dray.protocol import PayloadRef
from dray.resources import Closing
from dray.ring import SharedRingBuffer
from dray.transport import PayloadClient, PayloadServer
from dray.transport.lanes import LANES

# --- the test ----------------------------------------------------------------------------------------------------

MACHINES = ("x86_64", "aarch64")

_MAX_ANSWER_BYTES = 64 * 1024
_END_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class LaneReport:
    """The result of a lane's test.

    Attributes:
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
        detail = f"the {offer['nbytes']} bytes that were read differ from those that were written"
        return LaneReport(lane, False, detail)
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
            [sys.executable, "-m", "dray.cli.lane_check", role, lane],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
        )

    def send(self, line: str) -> None:
        """Send a line to the process; if it has ended, `answer` raises with the reason."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(line.encode() + b"\n")

    def answer(self, deadline: Deadline) -> dict[str, Any]:
        """The answer of the process; raises `_Failure` if it is an error, or has not arrived by the deadline."""
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


# --- its two processes -------------------------------------------------------------------------------------------

PAYLOAD_BYTES = 1 << 20
READ_TIMEOUT = 10.0


def main(arguments: list[str]) -> int:
    """Serve or read a payload; the exit code is 1 if the answer is an error."""
    role, lane = arguments
    answers = _open_answers()
    try:
        if role == "serve":
            _serve(lane, answers)
        else:
            _read(lane, answers)
    except (DrayError, OSError) as error:
        _write_answer(answers, _error_answer(error))
        return 1
    return 0


def digest(arrays: Mapping[str, np.ndarray[Any, Any]]) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of arrays."""
    found = hashlib.sha256()
    for name, array in arrays.items():
        found.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def _serve(lane: Any, answers: TextIO) -> None:
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "noise": np.frombuffer(os.urandom(PAYLOAD_BYTES), np.uint8),
        "empty": np.empty((0, 3), np.float32),
    }
    with SharedRingBuffer(1, 2 * PAYLOAD_BYTES) as ring, PayloadServer(ring, lane=lane, threads=1) as server:
        ref = server.put(arrays, timeout=1.0)
        _write_answer(answers, {"ref": ref.to_json(), "nbytes": ref.nbytes, "digest": digest(arrays)})
        sys.stdin.read()


def _read(lane: Any, answers: TextIO) -> None:
    ref = PayloadRef.from_json(sys.stdin.readline().strip())
    with PayloadClient(lane=lane) as client:
        began = MONOTONIC.now()
        arrays = client.read(ref, timeout=READ_TIMEOUT)
        seconds = MONOTONIC.now() - began
        _write_answer(answers, {"digest": digest(arrays), "seconds": seconds})


def _error_answer(error: DrayError | OSError) -> dict[str, str]:
    match error:
        case ConfigError():
            about = error.key
        case MissingDependencyError():
            about = error.package
        case OSError():
            about = errno.errorcode.get(error.errno or 0, "")
        case _:
            about = ""
    return {"error": f"{type(error).__name__}: {error}", "about": about}


def _write_answer(answers: TextIO, answer: Mapping[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _open_answers() -> TextIO:
    """A stream to standard output; descriptor 1, to which UCX logs, is redirected to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
