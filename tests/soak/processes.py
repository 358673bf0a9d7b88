"""The processes of a soak as their supervisor sees them: the runs of each member, one process for each."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


class Footprint(NamedTuple):
    """What a process holds at one moment."""

    at: float  # seconds, monotonic
    memory: float  # resident, in MiB, without memory shared with others
    descriptors: int
    sockets: int
    threads: int
    segments: int

    @classmethod
    def of(cls, pid: int) -> Footprint:
        """Raises an `OSError` when the process is gone."""
        process = Path(f"/proc/{pid}")
        _, resident, shared = (int(each) for each in (process / "statm").read_text().split()[:3])
        targets = []
        for descriptor in (process / "fd").iterdir():
            try:
                targets.append(os.readlink(descriptor))  # noqa: PTH115
            except FileNotFoundError:
                continue
        mappings = (process / "maps").read_text()
        return cls(
            time.monotonic(),
            round((resident - shared) * os.sysconf("SC_PAGESIZE") / 2**20, 1),
            len(targets),
            sum(target.startswith("socket:") for target in targets),
            len(list((process / "task").iterdir())),
            len(set(re.findall(r" (\d+) +/memfd:", mappings))),
        )


@dataclass(slots=True)
class ProcessRun:
    """One process of a producer or consumer, from its start to its end. Times are monotonic nanoseconds.

    Attributes:
        member: the producer or consumer that it is a run of.
        producer: what kind it is.
        name: unique; a consumer's name in the stream may serve for several runs.
        consumer: that name.
        ended: when its end was seen.
        how: "killed", "ended" (as asked), "fenced" (declared dead while it was stopped) or "crashed".
        stops: when it was stopped.
        declared_dead: when the other processes were notified.
        final: it was ended with the whole soak, not before.
    """

    member: str
    producer: bool
    name: str
    consumer: str
    ledger: Path
    log: Path
    steady: bool = False
    began: int = 0
    ended: int | None = None
    how: str = ""
    code: int | None = None
    final: bool = False
    stops: list[list[int]] = field(default_factory=list)
    declared_dead: int | None = None
    footprints: list[Footprint] = field(default_factory=list)
    described: dict[str, Any] = field(default_factory=dict)

    @property
    def has_begun(self) -> bool:
        """It has written its first record."""
        return self.ledger.exists() and self.ledger.stat().st_size > 0


class Process:
    """The process of a run, in a process group of its own."""

    def __init__(
        self, run: ProcessRun, module: str, spec: dict[str, Any], within: list[str], environment: dict[str, str]
    ) -> None:
        self.run = run
        self.expected = ""  # how it is to end, once a signal was sent
        run.began = time.monotonic_ns()
        with run.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*within, sys.executable, "-m", module, json.dumps(spec)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0, env=environment,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stopped(self) -> bool:
        return bool(self.run.stops) and len(self.run.stops[-1]) == 1

    def kill(self) -> None:
        self.expected = "killed"
        self._process.kill()

    def end(self) -> None:
        """Ask it to drain and end."""
        self.expected = "ended"
        self._process.terminate()

    def stop(self) -> None:
        self.run.stops.append([time.monotonic_ns()])
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        if self.stopped:
            self._process.send_signal(signal.SIGCONT)
            self.run.stops[-1].append(time.monotonic_ns())

    def dump_stacks(self) -> None:
        """Make it write the stacks of its threads into its log."""
        self._process.send_signal(signal.SIGUSR1)

    def measure(self) -> None:
        """Note what it holds, if it is still there."""
        try:
            self.run.footprints.append(Footprint.of(self.pid))
        except (OSError, ValueError):
            return  # it is ending

    def over(self, fenced: int) -> bool:
        """Whether it has ended; `run.how` is set then."""
        code = self._process.poll()
        if code is None:
            return False
        run = self.run
        run.ended, run.code = time.monotonic_ns(), code
        if self.stopped:
            run.stops[-1].append(run.ended)
        if code == fenced and run.declared_dead is not None:
            run.how = "fenced"
        elif code == -signal.SIGKILL and self.expected == "killed":
            run.how = "killed"
        elif code == 0 and self.expected == "ended":
            run.how = "ended"
        else:
            run.how = "crashed"
        return True


def descendants(mark: str, value: str) -> list[int]:
    """Processes that have `mark=value` in their environment, but for this one: what a soak has started."""
    wanted = f"{mark}={value}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found
