"""A folder for the Unix sockets of one process, private to its user and removed after the process has ended."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dray.errors import ConfigError
from dray.resources import Closing, needing
from dray.system_calls import needed

if sys.platform != "win32":
    import fcntl

MAX_SOCKET_PATH = 107
"""The kernel's limit on the path of a Unix socket, in bytes."""

_LOG = logging.getLogger("dray.private_directory")
_LOCK = "lock"
_OWN = re.compile("[0-9a-f]{8}")
_MAX_ROOT = MAX_SOCKET_PATH - len("/12345678/redis.sock")


class PrivateDirectory(Closing):
    """A fresh folder with mode 0700, locked while its process, or a child that inherits `lock`, is alive.

    Args:
        root: where the folder is made; by default `default_root`. Folders there of dead processes are removed now,
            and at the end.

    Attributes:
        path: the folder.
        lock: the descriptor of the lock; -1 after `close`.

    Raises:
        ConfigError: the root cannot be used, belongs to another user, can be replaced by another user, or is too
            long for a socket's path; or a sandbox refuses locks.
        OutOfResources: no descriptor is left for the lock.
    """

    def __init__(self, root: Path | None = None) -> None:
        root = own_root(root)
        self.path = root / secrets.token_hex(4)
        with needing("a folder of sockets"), locked(root):
            _sweep(root)
            self.path.mkdir(mode=0o700)
            try:
                self.lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            except OSError:
                self.path.rmdir()  # a folder without a lock would never be removed
                raise
            with needed("flock"):
                fcntl.flock(self.lock, fcntl.LOCK_EX)

    @property
    def closed(self) -> bool:
        return self.lock < 0

    def close(self) -> None:
        """Remove the folder and its content, and those of dead processes beside it. Twice is fine."""
        if self.lock >= 0:
            with contextlib.suppress(OSError):
                for path in self.path.iterdir():
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path, ignore_errors=True)
                    elif path.name != _LOCK:  # the lock last: a folder without one is empty
                        path.unlink()
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self.lock)
            self.lock = -1
            with contextlib.suppress(OSError), locked(self.path.parent, wait=False):
                _sweep(self.path.parent)


def default_root() -> Path:
    """The folder of this user's folders: ``$DRAY_RUNTIME_DIR``, else ``/tmp/dray-<uid>``; both outlast a login.

    If ``/tmp/dray-<uid>`` is not this user's, it is ``/tmp/dray-<uid>-<random>``: an earlier one of this user,
    else a new one.

    Raises:
        ConfigError: no folder can be made in ``/tmp``.
    """
    if chosen := os.environ.get("DRAY_RUNTIME_DIR"):
        return Path(chosen)
    parent = Path("/tmp")
    usual = parent / f"dray-{os.getuid()}"
    others = sorted(parent.glob(f"{usual.name}-" + "?" * 8))
    for root in (usual, *others):
        try:
            if root == usual:
                root.mkdir(mode=0o700, exist_ok=True)
            if not _refused(root.lstat()):
                return root
        except OSError:
            continue  # not a folder, or removed meanwhile
    try:
        root = Path(tempfile.mkdtemp(prefix=f"{usual.name}-", dir=parent))
    except OSError as error:
        allowed = f"a folder in which folders can be made ({error.strerror})"
        raise ConfigError("runtime directory", str(parent), allowed, f"cannot be made in {parent}") from error
    _LOG.warning("%s is not a folder of this user with mode 0700: %s is used instead", usual, root)
    return root


@contextlib.contextmanager
def locked(root: Path, *, wait: bool = True) -> Iterator[None]:
    """Keep other processes from removing folders in `root` meanwhile: a new one without a lock would seem dead.

    Without `wait`, it raises `BlockingIOError` if another process does so now.
    """
    lock = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with needed("flock"):
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)


def _sweep(root: Path) -> None:
    """Remove the folders of dead processes; a folder without a lock file is not dray's."""
    for folder in root.iterdir():
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:  # not dray's, or its owner is removing it or was killed while it made or removed it
            if _OWN.fullmatch(folder.name):
                with contextlib.suppress(OSError):
                    folder.rmdir()  # it is empty then
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass  # its process is alive
        finally:
            os.close(lock)


def own_root(root: Path | None = None) -> Path:
    """`root`, by default `default_root`, which exists then and belongs to this user alone.

    Raises:
        ConfigError: it cannot be used, belongs to another user, can be replaced by another user, or is too long
            for a socket's path.
    """
    root = default_root() if root is None else root
    problem = f"{root} cannot be used"
    if len(os.fsencode(root)) > _MAX_ROOT:
        allowed = f"must be a path of at most {_MAX_ROOT} bytes"
        raise ConfigError("runtime directory", str(root), allowed, problem)
    try:
        for path in reversed([root, *(each for each in root.absolute().parents if not each.exists())]):
            path.mkdir(mode=0o700, exist_ok=True)
        refused = _refused(root.lstat())
        # The folders that contain symlinks of the path, and those to which the symlinks point.
        parents = {*root.absolute().parents, *root.resolve().parents}
        replaceable = sorted(path for path in parents if _others_may_replace(path.stat()))
    except OSError as error:
        allowed = f"must be a folder that exists or can be made ({error.strerror})"
        raise ConfigError("runtime directory", str(root), allowed, problem) from error
    if refused:
        allowed = "must be a folder of this user with mode 0700, not a symlink"
        raise ConfigError("runtime directory", str(root), allowed, problem)
    if replaceable:
        allowed = (
            f"other users can replace what is in {replaceable[-1]}: it must belong to root or to this user, "
            "or have the sticky bit (chmod +t)"
        )
        raise ConfigError("runtime directory", str(root), allowed, problem)
    return root


def _refused(found: os.stat_result) -> bool:
    return not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or bool(found.st_mode & 0o077)


def _others_may_replace(found: os.stat_result) -> bool:
    """Whether another user may rename files in this folder. Folders of root are trusted."""
    if found.st_mode & stat.S_ISVTX or found.st_uid == 0:
        return False
    return found.st_uid != os.getuid() or bool(found.st_mode & 0o002)
