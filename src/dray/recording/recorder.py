"""`Recorder`: writes payloads to the files of a recording; `record` has them come from a stream."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, get_args

from dray.errors import BufferClosedError, ConfigError, OutputError, StreamEnded, StreamTimeout
from dray.files import output_errors, write_json, write_whole
from dray.payload import pack, unpack
from dray.payload.ragged import arrays_in
from dray.recording import files
from dray.recording.files import RecordedPayload, RecordingFile
from dray.resources import Closing
from dray.streams import Consumer, Payload

MAX_BYTES: Final = 10 << 30
FILE_BYTES: Final = 64 << 20
FLUSH_SECONDS: Final = 0.05
"""What has come is written when nothing more comes for so long: until then its producer keeps it."""

MERGED_FILES: Final = 16
_MAX_ARRAYS: Final = 8192
_PARTIAL: Final = ".*.safetensors.*"

WhenFull = Literal["remove", "stop"]


class RecordingFullError(OutputError):
    """The recording has as many bytes as it may have, and removes none."""


class Recorder(Closing):
    """Adds payloads to a recording. A context manager; for one thread.

    What `flush` has written stays, also if the process is killed or the disk is full.

    Args:
        folder: where the recording is; it is made if there is none, and continued if there is one.
        max_bytes: how many bytes the files may have together.
        file_bytes: how many bytes of payloads a file has at most, if it has several.
        when_full: remove the oldest files (``"remove"``), or raise `RecordingFullError` (``"stop"``).
        about: texts about the recording, for its index.

    Attributes:
        payloads: how many are written.
        removed: how many payloads were removed.

    Raises:
        ConfigError: an argument is not allowed, or another recorder writes there.
        OutputError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_bytes: int = MAX_BYTES,
        file_bytes: int = FILE_BYTES,
        when_full: WhenFull = "remove",
        about: Mapping[str, str] | None = None,
    ) -> None:
        for key, value in (("max_bytes", max_bytes), ("file_bytes", file_bytes)):
            if value.__class__ is not int or value < 1:
                raise ConfigError(key, value, "an integer of 1 or more")
        if when_full not in get_args(WhenFull):
            raise ConfigError("when_full", when_full, " or ".join(map(repr, get_args(WhenFull))))
        self.folder = Path(folder)
        self.payloads = self.removed = 0
        self._max_bytes, self._file_bytes, self._when_full = max_bytes, file_bytes, when_full
        self._about = dict(about or {})
        self._waiting: list[RecordedPayload] = []
        self._waiting_bytes = self._waiting_arrays = 0
        self._lock: int | None = None
        with output_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.folder)
            try:
                self._files = files.files_in(self.folder)
                for left in (*self.folder.glob(_PARTIAL), *files.merged_in(self.folder, self._files)):
                    left.unlink(missing_ok=True)  # a recorder was killed
            except BaseException:
                os.close(self._lock)
                raise
        self._next = self._files[-1].last + 1 if self._files else 0

    def append(self, values: Mapping[str, Any], *, about: Mapping[str, Any] | None = None) -> int:
        """Add a payload, a copy of `values`; returns its number. It is written by `flush`, or when a file is full.

        Args:
            values: as for `Producer.put`.
            about: what JSON can carry.

        Raises:
            PayloadError: `values` cannot be packed.
            OutputError: a file cannot be written; the payload is not added.
        """
        if self._lock is None:
            raise BufferClosedError("the recorder is closed")
        image = pack(values)
        copied = unpack(image)
        arrays = sum(1 for _ in arrays_in(copied))
        if self.is_full(len(image), arrays):
            self.flush()
        number = self._next + len(self._waiting)
        self._waiting.append(RecordedPayload(number, time.time(), copied, dict(about or {})))
        self._waiting_bytes += len(image)
        self._waiting_arrays += arrays
        return number

    @property
    def next_number(self) -> int:
        """The number of the payload that is written next."""
        return self._next

    def is_full(self, nbytes: int, arrays: int = 1) -> bool:
        """Before a payload of this size is added, what was added is written."""
        bytes_after, arrays_after = self._waiting_bytes + nbytes, self._waiting_arrays + arrays
        return bool(self._waiting) and (bytes_after > self._file_bytes or arrays_after > _MAX_ARRAYS)

    def flush(self) -> int:
        """Write the payloads that were added; returns how many.

        Raises:
            RecordingFullError: there is no room, and nothing is removed.
            OutputError: a file cannot be written. The payloads are still here, for another attempt.
            PayloadFormatError: values are nested too deeply, or have too many arrays.
        """
        if not self._waiting:
            return 0
        content = files.pack_file(self._waiting)
        self._make_room(len(content))
        self._write(self._waiting[0].number, self._waiting[-1].number, content)
        written = len(self._waiting)
        self.payloads += written
        self._next += written
        self._waiting = []
        self._waiting_bytes = self._waiting_arrays = 0
        self._merge()
        self._write_index()
        return written

    def close(self) -> None:
        """Write what was added, and end. Twice is fine.

        Raises:
            OutputError: a file cannot be written; what was added since the last `flush` is lost.
        """
        if self._lock is None:
            return
        try:
            self.flush()
        finally:
            os.close(self._lock)
            self._lock = None

    def __repr__(self) -> str:
        return f"<Recorder of {self.payloads} payloads in {self.folder}>"

    # --- inside -----------------------------------------------------------------------------------------------

    def _write(self, first: int, last: int, content: bytearray) -> None:
        path = self.folder / files.name_of(first, last)
        write_whole(path, content)
        self._files.append(RecordingFile(path, first, last, len(content)))

    def _make_room(self, nbytes: int) -> None:
        """Remove the oldest files until `nbytes` more fit."""
        total = sum(file.nbytes for file in self._files) + nbytes
        while total > self._max_bytes:
            if self._when_full == "stop" or not self._files:
                reason = f"{total} bytes are more than the {self._max_bytes} that it may have"
                raise RecordingFullError(str(self.folder), reason)
            oldest = self._files.pop(0)
            with output_errors(oldest.path):
                oldest.path.unlink(missing_ok=True)
            self.removed += oldest.payloads
            total -= oldest.nbytes

    def _merge(self) -> None:
        """Make one file of the last small ones. Files of about the same size are merged: each byte a few times."""
        last = self._files[-MERGED_FILES:]
        tiers = {int(math.log(file.payloads, MERGED_FILES)) for file in last}
        if len(last) < MERGED_FILES or len(tiers) > 1 or sum(file.nbytes for file in last) > self._file_bytes:
            return
        payloads = [payload for file in last for payload in files.read_file(file.path)]
        if sum(1 for payload in payloads for _ in arrays_in(payload.values)) > _MAX_ARRAYS:
            return
        self._files = self._files[:-MERGED_FILES]
        self._write(last[0].first, last[-1].last, files.pack_file(payloads))
        for file in last:
            with output_errors(file.path):
                file.path.unlink(missing_ok=True)

    def _write_index(self) -> None:
        write_json(self.folder / files.INDEX, files.index_of(self._files, self.removed, self._about))


def record(
    consumer: Consumer,
    recorder: Recorder,
    *,
    payloads: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> int:
    """Record the payloads of a stream until it ends; returns how many.

    A payload is acknowledged when it is on the disk: if the recorder is killed, or the disk is full, its producer
    hands it out again to the next one.

    Args:
        consumer: one with ``ack="manual"``, of a group of its own.
        recorder: where to.
        payloads: end after so many.
        stopped: asked twice a second: true ends it.

    Raises:
        OutputError: the disk is full; what is not on it is given back to its producer.
    """
    recorded = 0
    waiting: list[Payload] = []

    def write() -> int:
        recorder.flush()
        written = len(waiting)
        consumer.acknowledge(waiting)
        waiting.clear()
        return written

    try:
        while not stopped() and (payloads is None or recorded + len(waiting) < payloads):
            try:
                payload = consumer.get(FLUSH_SECONDS if waiting else 0.5)
            except StreamTimeout:
                recorded += write()
                continue
            except StreamEnded:
                break
            identity = payload.id
            about = {
                "producer": identity.producer.hex(),
                "sequence": identity.sequence,
                "deliveries": payload.deliveries,
            }
            if recorder.is_full(identity.nbytes):
                recorded += write()
            waiting.append(payload)
            recorder.append(dict(payload), about=about)
        return recorded + write()
    except BaseException:
        with contextlib.suppress(BufferClosedError):
            for payload in waiting:
                payload.release()
        raise


def _locked(folder: Path) -> int:
    """A descriptor that has the lock of the recording; it ends with the process."""
    descriptor = os.open(folder / files.LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ConfigError("folder", str(folder), "a folder in which no other recorder writes") from error
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
