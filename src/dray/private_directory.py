"""A folder for one process's Unix sockets: entered only by its owner, swept when its owner is dead."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from dray.errors import ConfigError
from dray.system_calls import needed

MAX_SOCKET_PATH = 107
"""The kernel's limit on the path of a Unix socket, in bytes."""

_LOCK = "lock"
_LONGEST_NAME = len("/12345678/redis.sock")
_LONGEST_ROOT = MAX_SOCKET_PATH - _LONGEST_NAME


class PrivateDirectory:
    """A fresh folder with mode 0700, locked while its process, or a child that inherits `lock`, lives.

    Args:
        root: where the folder is made; default ``$DRAY_RUNTIME_DIR``, ``$XDG_RUNTIME_DIR/dray`` or
            ``/tmp/dray-<uid>``. Folders there whose owner is dead are removed.

    Attributes:
        path: the folder.
        lock: descriptor that holds the lock, -1 after `close`.

    Raises:
        ConfigError: the root cannot be used, belongs to someone else, or is too long for a socket's path; or a
            sandbox refuses locks.
    """

    def __init__(self, root: Path | None = None) -> None:
        import fcntl  # there is none where dray only has to import

        root = root or default_root()
        _own(root)
        self.path = root / secrets.token_hex(4)
        with _locked(root):
            _sweep(root)
            self.path.mkdir(mode=0o700)
            try:
                self.lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            except OSError:
                self.path.rmdir()  # without a lock in it nobody would ever sweep it
                raise
            with needed("flock"):
                fcntl.flock(self.lock, fcntl.LOCK_EX)

    @property
    def closed(self) -> bool:
        return self.lock < 0

    def close(self) -> None:
        """Remove the folder and what is in it. Twice is fine."""
        if self.lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self.lock)
            self.lock = -1


def default_root() -> Path:
    """Where this user's folders are."""
    chosen = os.environ.get("DRAY_RUNTIME_DIR")
    if chosen:
        return Path(chosen)
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime).is_dir() and len(os.fsencode(runtime)) <= _LONGEST_ROOT - len("/dray"):
        return Path(runtime) / "dray"
    return Path("/tmp") / f"dray-{os.getuid()}"


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Nobody else sweeps or makes a folder meanwhile: one that is not locked yet would look dead."""
    import fcntl

    lock = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with needed("flock"):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _sweep(root: Path) -> None:
    """Remove the folders whose owners are dead; what has no lock in it is not ours."""
    import fcntl

    for folder in root.iterdir():
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:  # not a folder of ours, or its owner removes it at this moment
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass  # its owner lives
        finally:
            os.close(lock)


def _own(root: Path) -> None:
    problem = f"{root} cannot be used"
    if len(os.fsencode(root)) > _LONGEST_ROOT:
        allowed = f"must be a path of at most {_LONGEST_ROOT} bytes"
        raise ConfigError("runtime directory", str(root), allowed, problem)
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = root.lstat()
    except OSError as error:
        allowed = f"must be a folder that can be made ({error.strerror})"
        raise ConfigError("runtime directory", str(root), allowed, problem) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        allowed = "must be a folder of this user with mode 0700, not a link"
        raise ConfigError("runtime directory", str(root), allowed, problem)
