"""Files and folders that a job trusts because no other user can have written them, and how it writes its own.

If the last part of a path is a symbolic link it is never followed, neither to read nor to write. A folder that
passes `open_own_folder` is one in which no other user can put such a symbolic link. In errors, `key` is what names
a file or folder to the user.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dray.errors import ConfigError, OutputError

FOLDER_MODE = 0o755
"""Of the folders that a job makes, whatever the umask: no other user may write to them."""

FILE_MODE = 0o644
"""Of the files that a job makes, unless they are for their owner only."""

_MAX_BYTES = 64 << 20
_OTHERS = 0o077
_OTHERS_WRITE = 0o022
_NO_FILE = frozenset((errno.ELOOP, errno.EISDIR, errno.ENXIO))
"""What the open of a symbolic link, a folder, or a socket or pipe that has no reader is refused with."""


def read_private_file(path: Path, key: str) -> bytes:
    """As `read_own_file`, of a file that is closed to all other users."""
    return read_own_file(path, key, _OTHERS)


def read_own_file(path: Path, key: str, forbidden: int = _OTHERS_WRITE) -> bytes:
    """The content of the file at `path`: no symbolic link, of this user, and not writable by others.

    Args:
        forbidden: mode bits that the file must not have.

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
        reason = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise ConfigError(key, str(path), f"a regular file that its owner can read ({reason})") from error
    try:
        found = os.fstat(descriptor)
        _check_file(found, path, key, forbidden)
        if found.st_size > _MAX_BYTES:
            raise ConfigError(key, str(path), f"at most {_MAX_BYTES} bytes long; it has {found.st_size}")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(_MAX_BYTES)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes | bytearray, *, mode: int = FILE_MODE) -> None:
    """Put `content` at `path`, whole or not at all, even across a crash. A symbolic link there is replaced.

    Raises:
        OutputError: it cannot be written; what was at `path` is still there.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with output_errors(path):
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_json(path: Path, document: Mapping[str, Any], *, mode: int = FILE_MODE) -> None:
    """Put `document` at `path`, see `write_whole`.

    Raises:
        ValueError: it holds a number that is not finite, which JSON does not have.
    """
    write_whole(path, f"{json.dumps(document, indent=2, allow_nan=False)}\n".encode(), mode=mode)


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the block, which writes to `path`, into an `OutputError`."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(str(path), error.strerror or str(error)) from error


def open_to_append(path: Path, key: str) -> int:
    """A descriptor that appends to the file at `path`, which is made if there is none.

    Raises:
        OutputError: it cannot be opened.
        ConfigError: there is a symbolic link, something that is no regular file, or a file of another user.
    """
    # Without O_NONBLOCK the open of a named pipe waits for a reader.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with output_errors(path):
        try:
            descriptor = os.open(path, flags, FILE_MODE)
        except OSError as error:
            if error.errno in _NO_FILE:
                raise ConfigError(key, str(path), "a regular file, not a symbolic link") from error
            raise
    try:
        _check_file(os.fstat(descriptor), path, key, 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_own_folder(path: Path, key: str) -> int:
    """A descriptor of the folder at `path`, which belongs to this user, and to which no other may write.

    Raises:
        FileNotFoundError: there is none.
        ConfigError: it is no such folder, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(key, str(path), f"must be a folder that can be written ({error.strerror})") from error
    try:
        _check_folder(os.fstat(descriptor), path, key)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def make_own_folder(path: Path, key: str, mode: int = FOLDER_MODE) -> None:
    """Make the folder at `path`, unless there is one that belongs to this user and to which no other may write.

    Raises:
        OutputError: it cannot be made.
        ConfigError: something else is there.
    """
    with output_errors(path):
        try:
            path.mkdir(mode)
        except FileExistsError:
            _check_folder(path.lstat(), path, key)


def make_own_folders(root: Path, path: Path, key: str) -> None:
    """As `make_own_folder`, for every folder on the way from `root`, which is there, to `path`."""
    for part in path.relative_to(root).parts:
        root /= part
        make_own_folder(root, key)


def check_own_tree(root: Path, key: str) -> None:
    """Make sure that the folder `root` and all in it belong to this user, and that no other may write there.

    Symbolic links in it are not followed: they are this user's own.

    Raises:
        ConfigError: something belongs to another user, or may be written by others.
    """
    _check_folder(root.lstat(), root, key)
    for folder, folders, files in os.walk(root):
        for path in (Path(folder, name) for name in (*folders, *files)):
            found = path.lstat()
            _check_owner(found, path, key, "a file or folder")
            if not stat.S_ISLNK(found.st_mode):
                _check_mode(found, path, key, _OTHERS_WRITE)


def _check_file(found: os.stat_result, path: Path, key: str, forbidden: int) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(key, str(path), "a regular file")
    _check_owner(found, path, key, "a file")
    _check_mode(found, path, key, forbidden)


def _check_folder(found: os.stat_result, path: Path, key: str) -> None:
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(key, str(path), "a folder, not a symbolic link or a file")
    _check_owner(found, path, key, "a folder")
    _check_mode(found, path, key, _OTHERS_WRITE)


def _check_owner(found: os.stat_result, path: Path, key: str, what: str) -> None:
    if found.st_uid != os.geteuid():
        raise ConfigError(key, str(path), f"{what} of this user (uid {os.geteuid()}); its owner is {found.st_uid}")


def _check_mode(found: os.stat_result, path: Path, key: str, forbidden: int) -> None:
    mode = stat.S_IMODE(found.st_mode)
    if mode & forbidden:
        allowed = (
            f"a file for its owner only, mode 600; its mode is {mode:o}"
            if forbidden == _OTHERS
            else f"one that no other user may write to (chmod go-w); its mode is {mode:o}"
        )
        raise ConfigError(key, str(path), allowed)
