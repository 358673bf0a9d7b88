"""Text: made printable for a terminal, a log line or an error; and text that stands for a path in every process.

A path is bytes. Python's text for it depends on the locale of the process. Text of a path that leaves a process,
or is configured, is UTF-8, with surrogates for bytes that are not UTF-8; it passes through JSON.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
from pathlib import Path
from typing import Final

MAX_TEXT: Final = 400
"""Characters that are shown of one text, by default."""

MAX_LINE: Final = 4000
"""Characters that are shown of one line on a terminal, which may contain several texts."""

_CUT = "…"
_CONTINUATION = "\n    "
_BREAK = re.compile(r"[^\S ]+")


def printable(text: str, limit: int = MAX_TEXT) -> str:
    r"""Return `text` as one line of at most `limit` printable characters.

    Line breaks and tabs become a space, and are removed at the end. Other characters that do not print, such as
    those of terminal escape sequences, become Python escapes (``\x1b``). A text that is too long ends with ``…``.
    """
    # Only this part is read, so that a text of megabytes takes as little time as a line.
    words = _BREAK.sub(" ", text[: 4 * limit]).rstrip()
    shown = words if words.isprintable() else "".join(map(_escaped, words[:limit]))
    if len(shown) <= limit and len(text) <= 4 * limit:
        return shown
    return shown[: limit - len(_CUT)] + _CUT


def printable_value(value: object, limit: int = MAX_TEXT) -> str:
    """Return ``repr(value)`` as `printable` does, for any `value`."""
    try:
        return printable(repr(value), limit)
    except Exception:  # noqa: BLE001 - the repr of a foreign object can raise anything
        return f"({type(value).__name__} that has no repr)"


class PrintableFormatter(logging.Formatter):
    """Formats records as `logging` does, in printable lines.

    All lines of a record but the first are indented, so that a line break in a message, or in the text of an
    exception, cannot begin a line that seems to be another record.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The text of `record`."""
        return _CONTINUATION.join(printable(line, MAX_LINE) for line in super().format(record).splitlines())


def text_of(path: str | Path) -> str:
    """The text for `path`, the same in every process."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def bytes_of(text: str) -> bytes:
    """The bytes of a path, from its text by `text_of`.

    Raises:
        UnicodeEncodeError: the text is not that of a path.
    """
    return text.encode("utf-8", "surrogateescape")


def path_of(text: str) -> Path:
    """A path, from its text by `text_of`.

    Raises:
        UnicodeEncodeError: the text is not that of a path.
    """
    return Path(os.fsdecode(bytes_of(text)))


def as_argument(path: str) -> str:
    """`path` as one word of a shell command; characters that do not print are escaped."""
    if path.isprintable():
        return shlex.quote(path)
    plain = set(range(0x20, 0x7F)) - set(b"'\\")
    return "$'" + "".join(chr(byte) if byte in plain else f"\\x{byte:02x}" for byte in os.fsencode(path)) + "'"


def _escaped(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
