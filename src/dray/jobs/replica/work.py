"""The work items of a rollout replica: where they come from, and what is reported of them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from array import array
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from dray.errors import ConfigError
from dray.forking import parent_only
from dray.jobs.api import WorkItem
from dray.jobs.config import WORK_ITEMS_FORM, WorkTable
from dray.jobs.messages import models
from dray.jobs.messages.models import FailedAttempt
from dray.jobs.replica.base import Replica
from dray.jobs.replica.entry_points import load_object
from dray.jobs.replica.user_code import UserCodeError, described_error
from dray.resources import Closing
from dray.text import path_of, printable

_LOG = logging.getLogger("dray.jobs.replica.work")
_REMEMBERED = 100
"""Different errors of rollouts after which each one counts as known."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """A work item that the replica was given.

    Attributes:
        attempt: which attempt at it this is, from 1.
    """

    item: WorkItem
    attempt: int


class WorkSource(Closing):
    """Asks the controller for work items, and reports the ends of those before. Thread-safe."""

    def __init__(self, replica: Replica) -> None:
        config = replica.spec.config
        self._replica = replica
        self._rows = WorkItemRows(config.work, replica.spec.job_file.parent, config.job.seed)
        self._max_attempts = config.rollout.max_attempts
        self._lock = threading.Lock()
        self._errors: set[str] = set()

    def request(self, want: int, wait: float, working: Collection[int] = ()) -> list[Assignment]:
        """Up to `want` work items, waiting at most `wait` seconds for one; sets the stop flag at the job's end.

        Args:
            working: the work items that the replica still works on.

        Raises:
            ControlPlaneError: the controller does not answer, or refuses.
            ConfigError: a row is not there any more.
        """
        replica = self._replica
        with self._lock:
            published = replica.published[: models.MAX_REPORTED]
            failed = replica.failed_attempts[: models.MAX_FAILED]
        answer = replica.client.post(
            "/work-items",
            models.TakeWork(
                name=replica.name,
                incarnation=replica.incarnation,
                want=want,
                wait=wait,
                published=published,
                failed=failed,
                working=sorted(working),
            ),
            models.WorkList,
        )
        with self._lock:
            del replica.published[: len(published)]
            del replica.failed_attempts[: len(failed)]
        if answer.stop:
            replica.heartbeat.job_over.set()
            replica.stop.set(f"the job is {answer.phase.value}")
        return [
            Assignment(WorkItem(index, seed, self._rows.row(index)), attempt)
            for (index, seed), attempt in zip(answer.work_items, answer.attempts, strict=True)
        ]

    def close(self) -> None:
        """Close the data set; twice is fine."""
        self._rows.close()

    def published(self, assignment: Assignment) -> None:
        """All payloads of the work item were handed on."""
        with self._lock:
            self._replica.published.append(assignment.item.index)

    def failed(self, assignment: Assignment, error: UserCodeError) -> None:
        """The rollout has failed. A new error is a warning on the terminal, and its traceback is logged."""
        index, attempt = assignment.item.index, assignment.attempt
        text = printable(str(error), models.MAX_ERROR)
        with self._lock:
            self._replica.failed_attempts.append(FailedAttempt(index=index, attempt=attempt, error=text))
            new = text not in self._errors and len(self._errors) < _REMEMBERED
            if new:
                self._errors.add(text)
        line = f"{text}; work item {index} has failed (attempt {attempt} of {self._max_attempts})"
        if new:
            self._replica.activity.warn(line)
            _LOG.warning("the traceback of this error", exc_info=error.__cause__)
        else:
            _LOG.warning("%s", line)


# --- rows --------------------------------------------------------------------------------------------------------

# The data set of a job: from ``[work] items`` of the job file to the row of each work item.
#
# Row i modulo the number of rows belongs to work item i. Every process that needs rows reads them by itself: of a
# file it keeps where each line begins, of an iterable the JSON text of each element.

KEY: Final = "work.items"
MAX_ROWS: Final = 10_000_000
"""Elements of an iterable, which are held in memory."""

MAX_ROW_BYTES: Final = 64 << 20
"""Bytes of one line of a file."""

_ROUNDS = 4


class Rows(Protocol):
    """The rows of a data set, in order."""

    def __len__(self) -> int:
        """How many there are; at least one."""
        ...

    def row(self, number: int) -> Any:
        """A row; another object each time.

        Raises:
            ConfigError: it is not there any more.
        """
        ...

    def close(self) -> None:
        """Close the file; twice is fine."""
        ...


class FileRows:
    """The lines of a file, each of which is a JSON object.

    Args:
        text: the value in the job file, for errors.

    Raises:
        ConfigError: the file cannot be read, or has no line.
    """

    def __init__(self, text: str, path: Path) -> None:
        self._text = text
        self._path = path
        self._ends = array("Q")
        try:
            with path.open("rb") as lines:
                end = 0
                # In pieces: a file that is one line must not be held in memory.
                while line := lines.readline(MAX_ROW_BYTES):
                    end += len(line)
                    if not line.endswith(b"\n") and len(line) == MAX_ROW_BYTES:
                        number = len(self._ends) + 1
                        raise self._error(f"line {number} has more than {MAX_ROW_BYTES:,} bytes")
                    self._ends.append(end)
            if not self._ends:
                raise self._error(f"{path} is empty; it must have at least one line")
            self._file = path.open("rb")
        except OSError as error:
            reason = f"{path}: {error.strerror}; must be {WORK_ITEMS_FORM}"
            raise self._error(reason) from error

    def __len__(self) -> int:
        return len(self._ends)

    def row(self, number: int) -> Any:
        begin = self._ends[number - 1] if number else 0
        try:
            line = os.pread(self._file.fileno(), self._ends[number] - begin, begin)
            found = json.loads(line)
        except OSError as error:
            raise self._error(f"{self._path}, line {number + 1}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise self._error(f"{self._path}, line {number + 1} is not text in UTF-8") from error
        except (ValueError, RecursionError) as error:
            reason = f"{self._path}, line {number + 1} is not JSON ({error}); each line must be a JSON object"
            raise self._error(reason) from error
        if not isinstance(found, dict):
            kind = "null" if found is None else f"of type {type(found).__name__}"
            raise self._error(f"{self._path}, line {number + 1} is {kind}; each line must be a JSON object")
        return found

    def close(self) -> None:
        self._file.close()

    def _error(self, reason: str) -> ConfigError:
        return _unusable(self._text, reason)


class ObjectRows:
    """The elements of an iterable, as JSON texts: what a worker does with one does not reach the next one."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def row(self, number: int) -> Any:
        return json.loads(self._texts[number])

    def close(self) -> None:
        """There is no file."""


def open_rows(text: str, folder: Path) -> Rows:
    """The rows that `text` names; a file is looked for in `folder`. Lines of a file are read when they are needed.

    Raises:
        ConfigError: there is no such file or iterable, it has no rows, or an element is not what JSON can carry.
    """
    if text.endswith(".jsonl"):
        return FileRows(text, folder / path_of(text))
    return ObjectRows(list(_element_texts(text, load_object(KEY, text, folder, WORK_ITEMS_FORM))))


def check_rows(text: str, folder: Path) -> None:
    """See that every row can be read.

    Raises:
        ConfigError: one cannot; the message names the first.
    """
    with closing(open_rows(text, folder)) as rows:
        for number in range(len(rows)):
            rows.row(number)


class WorkItemRows(Closing):
    """The row of each work item.

    Args:
        table: ``[work]`` of the job file; None if there is none.
        folder: of the job file.
        seed: of the job; decides the order if rows are shuffled.

    Raises:
        ConfigError: as `open_rows`.
    """

    def __init__(self, table: WorkTable | None, folder: Path, seed: int) -> None:
        self._rows = None if table is None else open_rows(table.items, folder)
        self._shuffles = table is not None and table.shuffle
        self._seed = seed

    def row(self, index: int) -> Any:
        """The row of work item `index`; None without a data set.

        Raises:
            ConfigError: it is not there any more.
        """
        if self._rows is None:
            return None
        epoch, number = divmod(index, len(self._rows))
        if self._shuffles:
            number = shuffled(number, len(self._rows), f"{self._seed}:{epoch}")
        return self._rows.row(number)

    def close(self) -> None:
        """Close the file; twice is fine."""
        if self._rows is not None:
            self._rows.close()


def shuffled(number: int, count: int, order: str) -> int:
    """The place of `number` in a permutation of 0 … `count` - 1 that depends on the text `order` alone.

    It takes no memory: a Feistel network permutes the numbers of so many bits, and is applied again to a result
    that is too large.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = number >> half, number & mask
        for turn in range(_ROUNDS):
            digest = hashlib.blake2b(f"{order}:{turn}:{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        number = left << half | right
        if number < count:
            return number


def _element_texts(text: str, found: Any) -> Iterator[str]:
    try:
        with parent_only():
            elements: Iterable[Any] = found() if callable(found) and not isinstance(found, Iterable) else found
            iterator = iter(elements)
    except (Exception, SystemExit) as error:
        allowed = "it must be an iterable, or a function without arguments that returns one"
        raise _unusable(text, f"{described_error(error, None)}; {allowed}") from error
    number = 0
    while True:
        try:
            with parent_only():
                element = next(iterator)
        except StopIteration:
            break
        except (Exception, SystemExit) as error:
            raise _unusable(text, f"row {number} raised {described_error(error, None)}") from error
        try:
            yield json.dumps(element, allow_nan=False, separators=(",", ":"))
        except Exception as error:  # the objects of a user raise whatever they like
            raise _unusable(text, f"row {number} is not what JSON can carry ({printable(str(error))})") from error
        number += 1
        if number > MAX_ROWS:
            raise _unusable(
                text, f"it has more than {MAX_ROWS:,} rows, which are held in memory; use a .jsonl file"
            )
    if number == 0:
        raise _unusable(text, "it has no rows; there must be at least one")


def _unusable(text: str, reason: str) -> ConfigError:
    return ConfigError(KEY, text, printable(reason, 1000), f"= {text!r} cannot be used")
