"""Paths as text that stands for the same bytes in every process.

A path is bytes. Python's text for it depends on the locale of the process. Text that leaves a process, or is
configured, is UTF-8, with surrogates for bytes that are not UTF-8; it passes through JSON.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path


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
