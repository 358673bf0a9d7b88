"""Paths as text that means the same bytes in every process, whatever its locale.

Paths are bytes. Python's text for them depends on the locale of the process, and bytes that are no characters
become surrogates in it. What travels, or is configured, is UTF-8 with such surrogates; it passes through JSON.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path


def text_of(path: str | Path) -> str:
    """The text that stands for `path` everywhere."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def bytes_of(text: str) -> bytes:
    """The bytes of the path that `text_of` gave this text for.

    Raises:
        UnicodeEncodeError: the text stands for no path.
    """
    return text.encode("utf-8", "surrogateescape")


def path_of(text: str) -> Path:
    """The path that `text_of` gave this text for.

    Raises:
        UnicodeEncodeError: the text stands for no path.
    """
    return Path(os.fsdecode(bytes_of(text)))


def as_argument(path: str) -> str:
    """`path` as one word of a command for a shell, in ASCII where it does not print."""
    if path.isprintable():
        return shlex.quote(path)
    plain = set(range(0x20, 0x7F)) - set(b"'\\")
    return "$'" + "".join(chr(byte) if byte in plain else f"\\x{byte:02x}" for byte in os.fsencode(path)) + "'"
