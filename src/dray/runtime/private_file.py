"""Files that only their owner can read or write, and that are trusted for that reason."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from dray.errors import ConfigError

_MAX_BYTES = 64 << 20


def read_private_file(path: Path, key: str) -> bytes:
    """The content of the file at `path`, which is no link, belongs to this user and is closed to all others.

    Args:
        key: what names the file to the user, for the error.

    Raises:
        FileNotFoundError: there is none.
        ConfigError: it is no such file, or cannot be read.
    """
    try:
        # Without O_NONBLOCK the open of a named pipe waits for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = "it is a link" if error.errno == errno.ELOOP else error.strerror
        raise ConfigError(key, str(path), f"a regular file that its owner can read ({reason})") from error
    try:
        _check(os.fstat(descriptor), path, key)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(_MAX_BYTES)
    finally:
        os.close(descriptor)


def _check(found: os.stat_result, path: Path, key: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(key, str(path), "a regular file")
    if found.st_uid != os.geteuid():
        raise ConfigError(key, str(path), f"a file of this user (uid {os.geteuid()}); its owner is {found.st_uid}")
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077:
        raise ConfigError(key, str(path), f"a file for its owner only, mode 600; its mode is {mode:o}")
    if found.st_size > _MAX_BYTES:
        raise ConfigError(key, str(path), f"at most {_MAX_BYTES} bytes long; it has {found.st_size}")
