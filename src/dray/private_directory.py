"""A folder for one process's Unix sockets: entered only by its owner, swept when its owner is dead."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dray.errors import ConfigError
from dray.resources import needing
from dray.system_calls import needed

MAX_SOCKET_PATH = 107
"""The kernel's limit on the path of a Unix socket, in bytes."""

_LOG = logging.getLogger("dray.private_directory")
_LOCK = "lock"
_LONGEST_NAME = len("/12345678/redis.sock")
_LONGEST_ROOT = MAX_SOCKET_PATH - _LONGEST_NAME


class PrivateDirectory:
    """A fresh folder with mode 0700, locked while its process, or a child that inherits `lock`, lives.

    Args:
        root: where the folder is made; by default `default_root`. Folders there whose owner is dead are removed.

    Attributes:
        path: the folder.
        lock: descriptor that holds the lock, -1 after `close`.

    Raises:
        ConfigError: the root cannot be used, is another user's, can be replaced by another user, or is too long
            for a socket's path; or a sandbox refuses locks.
        OutOfResources: no descriptor is left for the lock.
    """

    def __init__(self, root: Path | None = None) -> None:
        import fcntl  # there is none where dray only has to import

        root = default_root() if root is None else root
        _own(root)
        self.path = root / secrets.token_hex(4)
        with needing("a folder of sockets"), _locked(root):
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
    """Where this user's folders are: ``$DRAY_RUNTIME_DIR`` or ``/tmp/dray-<uid>``, which outlast a login session.

    Where another user has taken the latter, ``/tmp/dray-<uid>-<random>`` takes its place: one that this user has
    made before, else a new one.

    Raises:
        ConfigError: no folder can be made in ``/tmp``.
    """
    chosen = os.environ.get("DRAY_RUNTIME_DIR")
    return Path(chosen) if chosen else _root_in(Path("/tmp"))


def _root_in(parent: Path) -> Path:
    usual = parent / f"dray-{os.getuid()}"
    others = sorted(parent.glob(f"{usual.name}-" + "?" * 8))
    for root in (usual, *others):
        try:
            if root == usual:
                root.mkdir(mode=0o700, exist_ok=True)
            if not _refused(root.lstat()):
                return root
        except OSError:
            continue  # something else is there, or it is gone
    try:
        root = Path(tempfile.mkdtemp(prefix=f"{usual.name}-", dir=parent))
    except OSError as error:
        allowed = f"a folder in which others can be made ({error.strerror})"
        raise ConfigError("runtime directory", str(parent), allowed, f"cannot be made in {parent}") from error
    _LOG.warning("%s is not a folder of this user with mode 0700: %s is used instead", usual, root)
    return root


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
        for path in reversed([root, *(each for each in root.absolute().parents if not each.exists())]):
            path.mkdir(mode=0o700, exist_ok=True)
        refused = _refused(root.lstat())
        # Both the folders in which links on the way lie, and those that the links lead to.
        parents = {*root.absolute().parents, *root.resolve().parents}
        replaceable = sorted(path for path in parents if _others_may_replace(path.stat()))
    except OSError as error:
        allowed = f"must be a folder that can be made ({error.strerror})"
        raise ConfigError("runtime directory", str(root), allowed, problem) from error
    if refused:
        allowed = "must be a folder of this user with mode 0700, not a link"
        raise ConfigError("runtime directory", str(root), allowed, problem)
    if replaceable:
        allowed = (
            f"other users can replace what is in {replaceable[-1]}: it must belong to root or to this user, "
            "or have the sticky bit (chmod +t)"
        )
        raise ConfigError("runtime directory", str(root), allowed, problem)


def _refused(found: os.stat_result) -> bool:
    return not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or bool(found.st_mode & 0o077)


def _others_may_replace(found: os.stat_result) -> bool:
    """Whether another user may rename what is in this folder. The folders of root are as root wants them."""
    if found.st_mode & stat.S_ISVTX or found.st_uid == 0:
        return False
    return found.st_uid != os.getuid() or bool(found.st_mode & 0o002)
