"""The files of a recording: their names, and what is in them.

A recording is a folder::

    00000000-00000255.safetensors   payloads 0 to 255
    00000256-00000300.safetensors   payloads 256 to 300
    index.json                      what is where; made of the names and contents of the files
    .lock                           locked by the recorder

Each file is a safetensors file that any library of that format opens. It is written whole and then gets its name,
so that a file that is there is complete, whatever has happened to the recorder. Tensor ``payloads.3.rewards`` is
the field ``rewards`` of the fourth payload of the file. Small files are merged into one: if a recorder is killed
after it has named the new one, the small ones are still there: readers skip files whose payloads are in another.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from dray.errors import ConfigError, PayloadFormatError
from dray.payload import pack, unpack, unpack_metadata

INDEX: Final = "index.json"
LOCK: Final = ".lock"
METADATA: Final = {"dray.recording": "1"}
"""In the header of each file."""

_NAME: Final = re.compile(r"(\d{8,18})-(\d{8,18})\.safetensors")


class RecordedPayload(NamedTuple):
    """A payload of a recording.

    Attributes:
        number: its number in the recording; the first has 0.
        time: when it was recorded, in seconds since 1970.
        values: what was put, in memory of its own.
        about: what else was recorded of it, as JSON has it: ``producer``, ``sequence`` and ``deliveries`` for a
            payload of a stream.
    """

    number: int
    time: float
    values: Mapping[str, Any]
    about: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RecordingFile:
    """A file of a recording.

    Attributes:
        first, last: the numbers of its first and of its last payload.
        nbytes: its size.
    """

    path: Path
    first: int
    last: int
    nbytes: int

    @property
    def payloads(self) -> int:
        """How many there are in it."""
        return self.last - self.first + 1


def name_of(first: int, last: int) -> str:
    """The name of a file with these payloads."""
    return f"{first:08d}-{last:08d}.safetensors"


def files_in(folder: Path) -> list[RecordingFile]:
    """The files of a recording in the order of their payloads, without those whose payloads are in another one.

    Raises:
        ConfigError: the folder cannot be read.
    """
    found = []
    try:
        for path in folder.iterdir():
            name = _NAME.fullmatch(path.name)
            if name is not None and path.is_file():
                found.append(RecordingFile(path, int(name[1]), int(name[2]), path.stat().st_size))
    except OSError as error:
        allowed = f"the folder of a recording ({error.strerror})"
        raise ConfigError("recording", str(folder), allowed) from error
    files: list[RecordingFile] = []
    for file in sorted(found, key=lambda each: (each.first, -each.last)):
        if not files or file.last > files[-1].last:
            files.append(file)
    return files


def merged_in(folder: Path, present: Iterable[RecordingFile]) -> list[Path]:
    """Files whose payloads are in another one of those that are `present`."""
    names = {file.path.name for file in present}
    return [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.name not in names]


def pack_file(payloads: Sequence[RecordedPayload]) -> bytearray:
    """The content of a file.

    Raises:
        PayloadFormatError: the values of a payload are nested too deeply, or have too many arrays.
    """
    document = {
        "payloads": [payload.values for payload in payloads],
        "times": np.array([payload.time for payload in payloads], np.float64),
        "about": json.dumps([payload.about for payload in payloads]),
        "first": np.array(payloads[0].number, np.int64),
    }
    return pack(document, metadata=METADATA)


def read_file(path: Path) -> list[RecordedPayload]:
    """The payloads of a file of a recording.

    Raises:
        PayloadFormatError: it is none; the message names it.
        ConfigError: it cannot be read.
    """
    image = _content(path)
    try:
        if not METADATA.items() <= unpack_metadata(image).items():
            raise PayloadFormatError("it is no file of a recording")
        document: Any = unpack(image)
        values, times, first = document["payloads"], document["times"].tolist(), int(document["first"])
        about = json.loads(document["about"])
        if not len(values) == len(times) == len(about):
            raise PayloadFormatError("its parts have different lengths")
        return [
            RecordedPayload(first + index, time, each, told)
            for index, (time, each, told) in enumerate(zip(times, values, about, strict=True))
        ]
    except (PayloadFormatError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise PayloadFormatError(f"{path} cannot be read: {error}") from error


def read_payload(path: Path) -> Mapping[str, Any]:
    """The values of a file that is one payload: any safetensors file.

    Raises:
        PayloadFormatError: it is none; the message names it.
        ConfigError: it cannot be read.
    """
    image = _content(path)
    try:
        return unpack(image)
    except PayloadFormatError as error:
        raise PayloadFormatError(f"{path} cannot be read: {error}") from error


def is_recording_file(path: Path) -> bool:
    """A safetensors file belongs to a recording."""
    image = _content(path)
    try:
        return METADATA.items() <= unpack_metadata(image).items()
    except PayloadFormatError as error:
        raise PayloadFormatError(f"{path} cannot be read: {error}") from error


def index_of(files: Iterable[RecordingFile], removed: int, about: Mapping[str, str]) -> dict[str, Any]:
    """The content of the index."""
    listed = list(files)
    return {
        "version": 1,
        "about": dict(about),
        "payloads": sum(file.payloads for file in listed),
        "bytes": sum(file.nbytes for file in listed),
        "removed_payloads": removed,
        "files": [
            {"name": each.path.name, "first": each.first, "last": each.last, "bytes": each.nbytes}
            for each in listed
        ],
    }


def _content(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    try:
        return np.fromfile(path, np.uint8)
    except OSError as error:
        raise ConfigError("file", str(path), f"a file that can be read ({error.strerror})") from error
