"""`Recording`: the payloads of a recording, read from its files."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from pathlib import Path

from dray.errors import ConfigError
from dray.recording.files import RecordedPayload, RecordingFile, files_in, read_file


class Recording(Sequence[RecordedPayload]):
    """The payloads of a recording, in the order in which they were recorded.

    What a recorder adds later is not seen. One file at a time is in memory.

    Args:
        folder: where a recorder has written.

    Attributes:
        folder: as given.
        files: those that have payloads.

    Raises:
        ConfigError: it is not the folder of a recording.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files: tuple[RecordingFile, ...] = tuple(files_in(self.folder))
        if not self.files:
            raise ConfigError(
                "recording", str(folder), "a folder with the files of a recording; there is none in it"
            )
        self._begins = [0]
        for file in self.files:
            self._begins.append(self._begins[-1] + file.payloads)
        self._read: tuple[int, list[RecordedPayload]] | None = None

    def __len__(self) -> int:
        return self._begins[-1]

    def __getitem__(self, index: int) -> RecordedPayload:  # type: ignore[override]
        """The payload at a place; `RecordedPayload.number` is larger if earlier files were removed.

        Raises:
            IndexError: there is none.
            PayloadFormatError: its file cannot be read.
        """
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"payload {index} of a recording of {len(self)}")
        at = bisect.bisect_right(self._begins, place) - 1
        return self._payloads(at)[place - self._begins[at]]

    def __iter__(self) -> Iterator[RecordedPayload]:
        for index in range(len(self)):
            yield self[index]

    def _payloads(self, at: int) -> list[RecordedPayload]:
        if self._read is None or self._read[0] != at:
            self._read = None  # two files are not in memory at a time
            self._read = at, read_file(self.files[at].path)
        return self._read[1]

    def __repr__(self) -> str:
        return f"<Recording of {len(self)} payloads in {self.folder}>"
