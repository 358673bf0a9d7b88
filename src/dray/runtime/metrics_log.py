"""`metrics.jsonl`: one JSON line for each training step of the weights, in the order of the steps.

When the policy starts, `MetricsLog.cut` replaces the file by one that ends with the step of the checkpoint:
without the lines of steps that a crash has rolled back, and without a line that a kill has cut off. A line is in
the file before a checkpoint has its step.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dray.runtime.private_file import open_to_append, output_errors, write_whole


class MetricsLog:
    """The file as the first policy replica writes it.

    Attributes:
        committed: the highest number of committed payloads in a line that was there before `cut`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found = _read(path)
        self._file: TextIOWrapper | None = None
        self.committed = max((int(line.get("committed", 0)) for line, _ in self._found), default=0)

    def cut(self, step: int) -> None:
        """Keep the lines of steps up to `step` only, and open the file for the ones that follow.

        The file is replaced as a whole: after a kill there is either the old one or the new one. What a process
        that was paused and replaced still writes goes to the old one, which is gone.

        Raises:
            OutputError: it cannot be written.
        """
        kept = "".join(f"{text}\n" for line, text in self._found if line["step"] <= step)
        write_whole(self._path, kept.encode())
        self._found = []
        self._file = os.fdopen(open_to_append(self._path, "job.output"), "a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Append the line of a step: a kill of this process does not lose it any more. Only after `cut`.

        Raises:
            OSError: it cannot be written, as on a full disk. It is kept, and written before the next one.
        """
        assert self._file is not None
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Make what was written survive a crash of the machine: a checkpoint that follows has these steps.

        Raises:
            OutputError: a line could not be written, and cannot now.
        """
        if self._file is not None:
            with output_errors(self._path):
                self._file.flush()
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file. May be called twice."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # `write` has raised it before
                self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of `path`, each step once and in order; none if there is no file.

    What is no line of a step, such as one that a kill has cut off, is left out. A line replaces the lines before
    it that are of the same step or a later one: these were rolled back.
    """
    return [line for line, _ in _read(path)]


def _read(path: Path) -> list[tuple[dict[str, Any], str]]:
    """As `read_metrics`, each line with its text."""
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    found: list[tuple[dict[str, Any], str]] = []
    for text in content.split("\n"):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            while found and found[-1][0]["step"] >= line["step"]:
                found.pop()
            found.append((line, text))
    return found
