"""What producers and consumers of the soak have in common: start, notices of dead members, and end."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from dray.clock import Deadline
from dray.jobs.queue import JobKeys, RedisAddress, RedisConnection

JOB = "soak"
REDIS_VARIABLE = "DRAY_SOAK_REDIS"
SECRET_VARIABLE = "DRAY_SOAK_SECRET"
MARK_VARIABLE = "DRAY_SOAK_SUPERVISOR"
FENCED = 3
"""Exit code of a consumer that was declared dead and finds out."""

REDIS_SECONDS = 4.0
REDIS_ANSWER_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1


class Member:
    """A process of the soak: its settings, connection and stop signal.

    Attributes:
        spec: what the supervisor asked for.
        stop: set by SIGTERM.
        redis: the connection to the control plane.
        keys: the job's names.
        secret: the job's secret.
    """

    def __init__(self) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.environ[MARK_VARIABLE] != str(os.getppid()):
            sys.exit("the supervisor is gone")
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        logging.basicConfig(
            format="%(asctime)s %(threadName)s %(name)s %(levelname)s %(message)s", level="WARNING"
        )
        self.spec: dict[str, Any] = json.loads(sys.argv[1])
        self.stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: self.stop.set())
        self.keys = JobKeys(JOB)
        self.secret = bytes.fromhex(os.environ[SECRET_VARIABLE])
        self.redis = RedisConnection(
            RedisAddress(os.environ[REDIS_VARIABLE]), answer_timeout=REDIS_ANSWER_SECONDS, patience=3600.0
        )
        self._pause = threading.Event()

    def pause(self, seconds: float) -> None:
        """Let time pass, also after SIGTERM."""
        self._pause.wait(seconds)

    def drain_deadline(self) -> Deadline:
        """Until when to finish, from now."""
        return Deadline.after(self.spec["drain"])


class DeadMembers:
    """Dead producers and consumers, in a file that the supervisor writes when a process has ended.

    A consumer that was stopped for long is declared dead before it has ended, and once more when it has: what it
    received in between can be claimed then.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = 0
        self.producers: frozenset[bytes] = frozenset()
        self.consumers: tuple[str, ...] = ()

    def refresh(self) -> None:
        """Read the file again if it has changed."""
        changed = self._path.stat().st_mtime_ns
        if changed != self._seen:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            self._seen = changed
            self.producers = frozenset(map(bytes.fromhex, content["producers"]))
            self.consumers = tuple(content["consumers"])

    @staticmethod
    def write(path: Path, producers: list[bytes], consumers: list[str]) -> None:
        """Replace the file, at once."""
        content = {"producers": [each.hex() for each in producers], "consumers": consumers}
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(content), encoding="utf-8")
        fresh.replace(path)
