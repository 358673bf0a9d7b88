"""The two processes with which `dray doctor` tests a lane: one serves a payload, the other reads it.

``python -m dray.cli.lane_proof serve LANE`` and ``… read LANE``. Each prints one line of JSON on its standard
output; after an error the line has the key ``error``. The reader reads the reference from its standard input; the
server ends when its standard input is closed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from typing import Any, TextIO

import numpy as np

from dray.clock import MONOTONIC
from dray.errors import ConfigError, DrayError, MissingDependencyError
from dray.protocol import PayloadRef
from dray.ring import SharedRingBuffer
from dray.transport import PayloadClient, PayloadServer

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
