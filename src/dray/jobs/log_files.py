"""The logs of a job's processes as one sequence of lines: the last ones, and those that are written from now on.

Lines of several files are merged by the time that each record begins with. User code also prints lines without a
time: an indented one belongs to the record above it, and any other gets the time of the next record of its
process, or, where none follows, the time at which its file was last written.
"""

from __future__ import annotations

import heapq
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from dray.errors import ConfigError
from dray.text import MAX_LINE, printable

_SUFFIX = ".log"
_BLOCK = 64 << 10
_MAX_TAIL = 64 << 20
_MAX_PARTIAL = 1 << 20
_RECORD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}(?= )")


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of a log.

    Attributes:
        time: local, as the records of logs have it: ``2026-01-31 23:59:59,999``.
        name: of the process.
        text: the whole line, printable.
    """

    time: str
    name: str
    text: str


class LogFiles:
    """The logs in one folder, as far as they were read.

    Args:
        folder: it need not exist yet.
        name: of the only process to read the log of.
        most: of the files, so many are read: those that were written last.

    Raises:
        ConfigError: the folder has no log of a process with this name.
    """

    def __init__(self, folder: Path, name: str | None = None, *, most: int | None = None) -> None:
        self._folder = folder
        self._name = name
        self._most = most
        self._read: dict[str, tuple[int, bytes]] = {}  # how far each file was read, and the beginning of a line
        if name is not None and name not in (names := self.names()):
            allowed = f"must be one of {', '.join(names)}" if names else f"no process has a log in {folder}"
            raise ConfigError("REPLICA", name, allowed)

    def names(self) -> list[str]:
        """The names of the processes that have a log, sorted."""
        return sorted(path.name.removesuffix(_SUFFIX) for path in self._folder.glob(f"*{_SUFFIX}"))

    def last(self, count: int) -> list[LogLine]:
        """The last `count` lines of all files together; `new` continues behind them."""
        found = list(self._merged(self._last_of(name, count) for name in self._chosen()))
        return found[-count:] if count else []

    def new(self, *, ended: bool = False) -> list[LogLine]:
        """The lines that were written since the last call, also to files that did not exist then; of each file at
        most 64 MiB at once.

        Args:
            ended: nothing is written any more: a last line that has no end is returned, too.
        """
        return list(self._merged(self._new_of(name, ended=ended) for name in self._chosen()))

    def _chosen(self) -> list[str]:
        if self._name is not None:
            return [self._name]
        names = self.names()
        if self._most is None or len(names) <= self._most:
            return names
        changed = {name: _changed(self._path(name)) for name in names}
        return sorted(sorted(names, key=changed.__getitem__)[-self._most :])

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}{_SUFFIX}"

    def _merged(self, files: Iterable[list[LogLine]]) -> Iterator[LogLine]:
        # Each file keeps its order, whatever its clock did.
        return heapq.merge(*files, key=lambda line: line.time)

    def _last_of(self, name: str, count: int) -> list[LogLine]:
        with _opened(self._path(name)) as descriptor:
            if descriptor is None:
                return []
            size, block, content = os.fstat(descriptor).st_size, _BLOCK, b""
            while count:
                start = max(0, size - block)
                content = os.pread(descriptor, size - start, start)
                if start == 0 or block >= _MAX_TAIL or content.count(b"\n") > count:
                    break
                block *= 4
            *lines, partial = content.split(b"\n")
            self._read[name] = (size, partial[-_MAX_PARTIAL:])
            return self._timed(name, lines[-count:] if count else [])

    def _new_of(self, name: str, *, ended: bool) -> list[LogLine]:
        with _opened(self._path(name)) as descriptor:
            if descriptor is None:
                return []
            begin, partial = self._read.get(name, (0, b""))
            size = os.fstat(descriptor).st_size
            if size < begin:  # it was replaced by a shorter one
                begin, partial = 0, b""
            content = os.pread(descriptor, min(size - begin, _MAX_TAIL), begin)
            *lines, rest = (partial + content).split(b"\n")
            if ended and rest and begin + len(content) >= size:
                lines, rest = [*lines, rest], b""
            self._read[name] = (begin + len(content), rest[-_MAX_PARTIAL:])
            return self._timed(name, lines)

    def _timed(self, name: str, lines: list[bytes]) -> list[LogLine]:
        texts = [line.decode("utf-8", "replace") for line in lines]
        times = [found[0] if (found := _RECORD.match(text)) else "" for text in texts]
        later = datetime.fromtimestamp(_changed(self._path(name))).isoformat(" ", "milliseconds").replace(".", ",")
        before = ""
        for index, text in enumerate(texts):
            if not times[index] and text[:1].isspace():
                times[index] = before
            before = times[index]
        for index in reversed(range(len(times))):
            later = times[index] = times[index] or later
        return [LogLine(at, name, printable(text, MAX_LINE)) for at, text in zip(times, texts, strict=True)]


@contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    """A descriptor of the regular file at `path`; None if there is none."""
    try:
        # Without O_NONBLOCK the open of a named pipe waits for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    except PermissionError as error:
        raise ConfigError("OUTPUT", str(path), "must be a file that can be read") from error
    try:
        yield descriptor if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    finally:
        os.close(descriptor)


def _changed(path: Path) -> float:
    """When a file was last written; 0 if it is gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
