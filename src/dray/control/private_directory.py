"""A directory for one Unix socket, which only its owner can enter and which no crash leaves for good."""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
from pathlib import Path

from dray.errors import ControlPlaneError

logger = logging.getLogger("dray.control")

_SOCKET_NAME = "s"
_LONGEST_SOCKET_PATH = 106
_PREFIX = "redis-"


class PrivateDirectory:
    """A directory for one socket, locked while this process or a child that inherits `lock` lives."""

    def __init__(self, base: Path, prefix: str) -> None:
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
            self.socket_path = self.path / _SOCKET_NAME
            # Somebody's sweep may remove it until it is locked.
            try:
                self.lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            fcntl.flock(self.lock, fcntl.LOCK_EX)
            if self.path.is_dir():
                return
            os.close(self.lock)

    @classmethod
    def below(cls, base: Path) -> PrivateDirectory:
        """In `base` or, if the socket's path would be too long there, in a directory for temporary files.

        Raises:
            ControlPlaneError: the path would be too long everywhere.
        """
        temporary = f"dray-{os.getuid()}-{_PREFIX}"
        for place, prefix in (
            (base, _PREFIX),
            (Path(tempfile.gettempdir()), temporary),
            (Path("/tmp"), temporary),
        ):
            # mkdtemp adds eight characters to the prefix.
            if len(os.fsencode(place / f"{prefix}12345678" / _SOCKET_NAME)) <= _LONGEST_SOCKET_PATH:
                _sweep(place, prefix)
                return cls(place, prefix)
        raise ControlPlaneError(f"{base}: the path of a Unix socket may have {_LONGEST_SOCKET_PATH} bytes only")

    @property
    def closed(self) -> bool:
        return self.lock < 0

    def close(self) -> None:
        """Remove the directory and the socket in it; twice is fine."""
        if self.lock < 0:
            return
        _remove(self.path)
        os.close(self.lock)
        self.lock = -1


def _sweep(base: Path, prefix: str) -> None:
    """Remove what dead owners left."""
    for path in base.glob(prefix + "*"):
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        try:
            if os.fstat(lock).st_uid == os.getuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
        except BlockingIOError:
            continue  # its owner lives
        finally:
            os.close(lock)


def _remove(path: Path) -> None:
    (path / _SOCKET_NAME).unlink(missing_ok=True)
    try:
        path.rmdir()
    except OSError as error:
        logger.warning("%s stays: %s", path, error)
