"""Where the time of payloads goes: the stages that a payload passes, each measured in the process that it is in.

Each process appends the spans of sampled payloads to a file of its own in the output folder, one JSON line each. A
file begins with a line about its process, and has another one after a restart of that process:

```
{"process": "policy-0", "pid": 71, "host": "<boot id>", "unix": 1754000000.0}
{"stage": "read", "begin": 12.5, "end": 12.7, "work_item": 34, "payload": "<producer>:<sequence>"}
{"stage": "weights", "begin": 12.9, "end": 13.0, "step": 3}
```

`begin` and `end` are seconds of CLOCK_MONOTONIC, which all processes of a host share; the sum of `unix` and one of
them is in seconds since 1970, by the clock of that host.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Final, NamedTuple

from dray.clock import MONOTONIC, Clock
from dray.errors import ConfigError, OutputError
from dray.files import make_own_folder, open_to_append
from dray.identifiers import PayloadId
from dray.jobs.config import JobConfig
from dray.jobs.messages.models import Role
from dray.jobs.queue import Delivery
from dray.jobs.replica.delivery import PayloadState
from dray.jobs.replica.user_code import RolloutPayload
from dray.resources import Closing

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_KEY = "job.output"


class Stage(StrEnum):
    """What happens to a payload, in this order; the last two are of a training step."""

    ROLLOUT = "rollout"  # once for all payloads of a work item
    PACK = "pack"
    HAND_OVER = "hand_over"
    WAIT_IN_RING = "wait_in_ring"  # between two processes: not written, but found when their files are read
    READ = "read"
    WAIT_IN_BATCH = "wait_in_batch"
    TRAIN = "train"
    COMMIT = "commit"
    FREE = "free"
    WEIGHTS = "weights"
    CHECKPOINT = "checkpoint"


STEP_STAGES: Final = frozenset((Stage.WEIGHTS, Stage.CHECKPOINT))


class Span(NamedTuple):
    """A stage of one payload or of one step, with the times at which it begins and ends.

    Attributes:
        work_item: index of the payload's work item; of a stage of a step, -1.
        payload: ``producer:sequence``.
        step: of a stage of a payload, -1.
    """

    stage: Stage
    begin: float
    end: float
    work_item: int = -1
    payload: str = ""
    step: int = -1

    def line(self) -> str:
        """The span as a line of the file."""
        about = (
            f'"step":{self.step}'
            if self.stage in STEP_STAGES
            else f'"work_item":{self.work_item},"payload":"{self.payload}"'
        )
        return f'{{"stage":"{self.stage}","begin":{self.begin:.6f},"end":{self.end:.6f},{about}}}\n'


# --- the file ----------------------------------------------------------------------------------------------------

MAX_BYTES: Final = 4 << 20
"""Of the files of the policy replica, and of those of all rollout replicas together."""

MIN_BYTES: Final = 16 << 10
"""That the files of one rollout replica may have, however many replicas there are."""


def limit_of(config: JobConfig, role: Role) -> int:
    """How many bytes the files of one process may have."""
    return MAX_BYTES if role is Role.POLICY else max(MIN_BYTES, MAX_BYTES // config.rollout.replicas)


class StageLog(Closing):
    """The spans of one process, in a file that is made with the first of them. Thread-safe.

    When the file has half of `max_bytes` it is renamed, in place of the one that was renamed before: the newest
    spans are kept. If it cannot be written, as on a full disk, nothing more is written, and `warn` is called once.

    Args:
        folder: that of all files of the job.
        name: of the process.
        every: payloads of each work item are sampled whose index is a multiple of this; 0: none.
        max_bytes: of both files.
        warn: called with a line for the user.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        every: int,
        max_bytes: int,
        warn: Callable[[str], None],
        clock: Clock = MONOTONIC,
    ) -> None:
        self._folder = folder
        self._path = folder / f"{name}.jsonl"
        self._older = folder / f"{name}.older.jsonl"
        self._name = name
        self._every = every
        self._file_bytes = max_bytes // 2
        self._warn = warn
        self._clock = clock
        self._lock = threading.Lock()
        self._descriptor = -1
        self._size = 0

    def samples(self, work_item: int) -> bool:
        """Whether the stages of this work item's payloads are written; the same in every process of the job."""
        every = self._every
        return every > 0 and work_item % every == 0

    def sampled(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Those of `deliveries` whose stages are written."""
        every = self._every
        return [each for each in deliveries if each.entry.work_item % every == 0] if every else []

    def now(self) -> float:
        """The time on the clock of the spans."""
        return self._clock.now()

    def add(self, spans: Iterable[Span]) -> None:
        """Write these: a kill of this process does not lose them any more."""
        text = "".join([span.line() for span in spans])
        if not text:
            return
        with self._lock:
            if not self._every:
                return
            try:
                self._write(text)
            except (OutputError, ConfigError, OSError) as error:
                self._close()
                self._every = 0
                reason = error if isinstance(error, OutputError | ConfigError) else error.strerror
                self._warn(f"no more stages of payloads are written to {self._path.name}: {reason}")

    @contextmanager
    def measuring(self, stage: Stage, step: int) -> Iterator[None]:
        """Write how long the block takes, as a stage of a step."""
        began = self.now()
        yield
        if self._every:
            self.add([Span(stage, began, self.now(), step=step)])

    def close(self) -> None:
        """Write nothing more. Twice is fine."""
        with self._lock:
            self._every = 0
            self._close()

    def _write(self, text: str) -> None:
        if self._descriptor < 0:
            make_own_folder(self._folder, _KEY)
            self._descriptor = open_to_append(self._path, _KEY)
            self._size = os.fstat(self._descriptor).st_size
            # What a killed process has not finished ends here.
            text = f"{chr(10) if self._size else ''}{self._header()}{text}"
        rest = memoryview(text.encode())
        self._size += len(rest)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        if self._size >= self._file_bytes:
            self._close()
            self._path.replace(self._older)

    def _header(self) -> str:
        host = _BOOT_ID.read_text().strip()
        unix = time.time() - self.now()
        return f"{json.dumps({'process': self._name, 'pid': os.getpid(), 'host': host, 'unix': round(unix, 6)})}\n"

    def _close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)


# --- the payloads of a rollout replica ---------------------------------------------------------------------------


def handed_on(
    log: StageLog, payload: RolloutPayload, identity: str, began: float, packed: float
) -> Iterator[Span]:
    """The spans of a payload that a rollout replica has handed on just now, if it is sampled.

    Args:
        identity: ``producer:sequence``.
        began: when the payload began to be packed.
        packed: when that was done.
    """
    if log.samples(payload.work_item):
        about = (payload.work_item, identity)
        if payload.part == 0:
            yield Span(Stage.ROLLOUT, *payload.times, *about)
        yield Span(Stage.PACK, began, packed, *about)
        yield Span(Stage.HAND_OVER, packed, log.now(), *about)


# --- the payloads of a policy group ------------------------------------------------------------------------------

_ENDS: Final = {
    PayloadState.READ: Stage.READ,
    PayloadState.TRAINING: Stage.WAIT_IN_BATCH,
    PayloadState.TRAINED: Stage.TRAIN,
    PayloadState.COMMITTED: Stage.COMMIT,
    PayloadState.FREED: Stage.FREE,
}
"""The stage that ends when a payload comes to a state; the next one begins. No other state ends one."""


class PayloadStages:
    """Writes the stages of the payloads of a policy group, as `PayloadTracker` follows them. Thread-safe.

    Args:
        log: where to.
    """

    def __init__(self, log: StageLog) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._since: dict[PayloadId, tuple[float, int]] = {}  # begin of the present stage, work item

    def reading(self, deliveries: Sequence[Delivery]) -> None:
        """The arrays of these are read from now on."""
        now = self._log.now()
        with self._lock:
            for each in self._log.sampled(deliveries):
                self._since[each.entry.id] = (now, each.entry.work_item)

    def changed(self, state: PayloadState, deliveries: Sequence[Delivery]) -> None:
        """These have come to `state`."""
        if state is not PayloadState.RECEIVED and (sampled := self._log.sampled(deliveries)):
            self._end(_ENDS.get(state), [each.entry.id for each in sampled])

    def freed(self, ids: Iterable[PayloadId]) -> None:
        """The producers of these have freed them, which the tracker learns later."""
        self._end(Stage.FREE, ids)

    def _end(self, stage: Stage | None, ids: Iterable[PayloadId]) -> None:
        now = self._log.now()
        spans = []
        with self._lock:
            for each in ids:
                began = self._since.pop(each, None)
                if began is None or stage is None:
                    continue  # freed before, or not trained on
                since, work_item = began
                spans.append(Span(stage, since, now, work_item, each.key))
                if stage is not Stage.FREE:
                    self._since[each] = (now, work_item)
        self._log.add(spans)
