"""Where the two ends of a stream find each other: a name in a scope, in a folder of this user on this host.

Each producer and each consumer has an entry there while its process is alive. Both sides register first, then list
the others, so that one of two that start at the same time always sees the other. A producer that registers also
sends an empty datagram to each consumer (`Nudges`), which then lists the producers again.

A process holds a POSIX record lock for each of its entries. The lock ends with the process and is not inherited by
its children. Any process of the user removes entries without a lock.

| file | content |
|---|---|
| ``p-<random>.json``, ``c-<random>.json`` | what a producer or a consumer states about itself |
| the same with ``.lock`` | locked while its process is alive |
| ``publisher.lock`` | locked by the one `Publisher` of the name |
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from dray.errors import ConfigError, ProtocolError
from dray.forking import call_in_children, here, not_inherited
from dray.identifiers import PRODUCER_ID_BYTES
from dray.private_directory import PrivateDirectory, locked, own_root
from dray.resources import Closing, needing
from dray.system_calls import needed
from dray.text import MAX_LINE, printable
from dray.transport.lanes import parse_endpoint

if sys.platform != "win32":
    import fcntl

SCOPE_VARIABLE: Final = "DRAY_SCOPE"
"""The environment variable with the scope."""

_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_UNSET_SESSION: Final = "4294967295"
_MAX_ENTRY_BYTES: Final = 64 * 1024
_UNREADABLE: Final = (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError)
"""What reading an entry raises that is not as this module writes it."""
_NETWORK_FILE_SYSTEMS: Final = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "9p", "afs", "ceph", "lustre", "glusterfs"}
)


def checked_name(name: object, what: str = "name") -> str:
    """The name of a stream, or of `what`.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(what, name, "1 to 64 letters, digits, '.', '_' and '-'")
    return name


def default_scope() -> str:
    """The scope of this process: ``$DRAY_SCOPE``, else its job, else its login session, else its user.

    The job is that of Slurm or torchrun; for its replicas, `dray run` sets ``$DRAY_SCOPE``.
    """
    environ = os.environ
    if chosen := environ.get(SCOPE_VARIABLE):
        return chosen
    if job := environ.get("SLURM_JOB_ID"):
        return f"slurm job {job}"
    if (run := environ.get("TORCHELASTIC_RUN_ID", "none")) != "none":
        return f"torchrun {run}"
    with contextlib.suppress(OSError):
        session = Path("/proc/self/sessionid").read_text().strip()
        if session and session != _UNSET_SESSION:
            return f"login session {session}"
    if login := environ.get("XDG_SESSION_ID"):
        return f"login session {login}"
    return f"user {os.getuid()}"


class Peer(NamedTuple):
    """The other end of a stream, as its entry describes it.

    Attributes:
        entry: the name of its entry.
        pid, command: its process.
        about: the content of its entry.
    """

    entry: str
    pid: int
    command: str
    about: Mapping[str, Any]

    def __str__(self) -> str:
        return f"process {self.pid} ({self.command})"


class ProducerEntry(NamedTuple):
    """What a producer states about itself in its entry.

    Attributes:
        producer: its id.
        groups: the names of its groups.
        schema: the text of its schema, or None.
        endpoints: its addresses on this host.
    """

    producer: bytes
    groups: tuple[str, ...]
    schema: str | None
    endpoints: tuple[str, ...]

    @classmethod
    def of(cls, peer: Peer) -> ProducerEntry:
        """The entry of a peer; any process of the user may have written it.

        Raises:
            ProtocolError: it is not that of a producer.
        """
        about = peer.about
        groups, schema, endpoints = about.get("groups"), about.get("schema"), about.get("endpoints")
        try:
            producer = bytes.fromhex(about["producer"])
            if not all(isinstance(each, list) and each for each in (groups, endpoints)):
                raise ValueError("groups and endpoints must be lists")
            if not all(isinstance(each, str) for each in (*groups, *endpoints)):  # type: ignore[misc]
                raise ValueError("groups and endpoints must be texts")
            if len(producer) != PRODUCER_ID_BYTES or not isinstance(schema, str | None):
                raise ValueError("the id or the schema of the producer is none")
            if not all(parse_endpoint(each).lane.local for each in endpoints):  # type: ignore[union-attr]
                raise ValueError("the endpoints must be on this host")
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            why = printable(str(error), 200)
            raise ProtocolError(f"the entry {peer.entry} is not that of a producer: {why}") from error
        return cls(producer, tuple(groups), schema, tuple(endpoints))  # type: ignore[arg-type]


def command_line() -> str:
    """The command of this process, printable and of bounded length."""
    arguments = [Path(sys.executable or "python").name, *sys.argv] if sys.argv else ["python"]
    return printable(" ".join(arguments), 200)


_held: dict[str, int] = {}
"""The lock files of this process, with their descriptors: opening and closing one again would end its lock."""

call_in_children(_held.clear)


@atexit.register
def _remove_own() -> None:
    """At the end of the process: what an exception of a signal handler has kept from being closed."""
    for root in {Path(lock).parents[1] for lock in _held}:
        with contextlib.suppress(OSError), locked(root):
            for lock in [each for each in map(Path, _held) if each.parents[1] == root]:
                _remove(lock.with_suffix(".json"))
            _remove_ended(root)


class Registry(Closing):
    """The entries of one name in one scope, and those that this object has added.

    Args:
        name: the name of the stream.
        scope: the scope; by default that of this process.
        root: the user's folder; by default `dray.private_directory.default_root`.

    Attributes:
        name, scope: as given.
        folder: where the entries are.

    Raises:
        ConfigError: the name, the scope or the folder cannot be used.
    """

    def __init__(self, name: str, scope: str | None = None, root: Path | None = None) -> None:
        self.name = checked_name(name)
        self.scope = default_scope() if scope is None else scope
        if not isinstance(self.scope, str) or not 0 < len(self.scope) <= MAX_LINE:
            raise ConfigError("scope", scope, f"a text of 1 to {MAX_LINE} characters")
        self._root = own_root(root) / "streams"
        digest = hashlib.blake2b(f"{self.scope}\0{name}".encode("utf-8", "surrogateescape"), digest_size=8)
        self.folder = self._root / digest.hexdigest()
        self._added: list[str] = []
        self._mark = here[0]
        self._publishes = False
        with needing("the folder of streams"):
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            _refuse_network(self._root)

    def add(self, role: str, about: Mapping[str, Any]) -> str:
        """Register this process, as ``"p"`` or ``"c"``; returns the name of the entry.

        Raises:
            ConfigError: the folder cannot be written, or a sandbox refuses locks.
            OutOfResources: no descriptor is left.
        """
        entry = f"{role}-{secrets.token_hex(8)}"
        lock = self.folder / f"{entry}.lock"
        partial = lock.with_suffix(".new")
        with self._made():
            _create_locked(partial, lock)
            self._added.append(entry)
            _write(
                self.folder / f"{entry}.json",
                {"pid": os.getpid(), "command": command_line(), "folder": str(Path.cwd()), **about},
            )
        return entry

    def lock_publisher(self) -> None:
        """Be the only publisher of the name.

        Raises:
            ConfigError: another process is, or this one already.
        """
        path = self.folder / "publisher.lock"
        taken = f"is served by another publisher in scope {self.scope!r}"
        allowed = "one publisher at a time, or another name"
        if str(path) in _held:
            raise ConfigError("name", self.name, allowed, f"{self.name!r} {taken}: this process")
        with self._made():
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                with needed("fcntl"):
                    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                owner = os.pread(descriptor, 256, 0).decode("utf-8", "replace")
                os.close(descriptor)
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                raise ConfigError("name", self.name, allowed, f"{self.name!r} {taken}: process {owner}") from error
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} ({command_line()})".encode(), 0)
            _held[str(path)] = descriptor
            self._publishes = True

    @contextlib.contextmanager
    def _made(self) -> Iterator[None]:
        """The folder exists in the block, in which an entry is made. Folders of other streams that ended go."""
        with _writable(self.folder), locked(self._root):
            _remove_ended(self._root)
            self.folder.mkdir(mode=0o700, exist_ok=True)
            for partial in self.folder.glob("*.new"):  # of a process that was killed here
                partial.unlink(missing_ok=True)
            about = self.folder / "stream.json"
            if not about.exists():
                _write(about, {"name": self.name, "scope": self.scope})
            yield

    def peers(self, role: str) -> list[Peer]:
        """The living producers (``"p"``) or consumers (``"c"``). Entries of dead processes are removed."""
        found = []
        for path in sorted(self.folder.glob(f"{role}-*.json")):
            if _is_held(path.with_suffix(".lock")):
                with contextlib.suppress(*_UNREADABLE):
                    about = _read(path)
                    command = printable(str(about["command"]), 200)
                    found.append(Peer(path.stem, int(about["pid"]), command, about))
            else:
                _remove(path)
        self._sweep()
        return found

    def _sweep(self) -> None:
        """Remove what a process has left that was killed between two steps of `add` or `close`."""
        for lock in self.folder.glob("[pc]-*.lock"):
            if not lock.with_suffix(".json").exists() and not _is_held(lock):
                lock.unlink(missing_ok=True)

    def elsewhere(self) -> list[str]:
        """What is served now under the same name in other scopes, and under other names in this one."""
        found = []
        for about in sorted(self._root.glob("*/stream.json")):
            with contextlib.suppress(*_UNREADABLE):
                stream = _read(about)
                name, scope = str(stream["name"]), str(stream["scope"])
                other = name == self.name, scope == self.scope
                if about.parent == self.folder or not any(other):
                    continue
                producers = [
                    path.stem for path in about.parent.glob("p-*.json") if _is_held(path.with_suffix(".lock"))
                ]
                if producers:
                    found.append(printable(f"{name!r} in scope {scope!r} ({len(producers)} producers)", 200))
        return found

    def nudge_consumers(self) -> None:
        """Let the consumers list the producers again."""
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sender:
            sender.setblocking(False)
            for consumer in self.peers("c"):
                path = str(consumer.about.get("nudges"))
                # A full queue is as good: the consumer has not looked yet.
                with contextlib.suppress(OSError, ValueError, TypeError):
                    sender.sendto(b"", path)

    def close(self) -> None:
        """Remove the entries that this object has added. Twice is fine; in a forked child nothing happens."""
        if here[0] != self._mark:
            return
        if not (self._added or self._publishes):
            return
        for entry in self._added:
            _remove(self.folder / f"{entry}.json")
        self._added.clear()
        if self._publishes:
            self._publishes = False
            os.close(_held.pop(str(self.folder / "publisher.lock")))
        with contextlib.suppress(OSError), locked(self._root):
            _remove_ended(self._root)

    def __repr__(self) -> str:
        return f"<Registry {self.name!r} in scope {self.scope!r}>"


class Nudges(Closing):
    """The datagram socket by which a consumer learns of new producers.

    Attributes:
        path: its path, for its entry.
    """

    def __init__(self) -> None:
        self._directory = PrivateDirectory()
        self.path = str(self._directory.path / "nudges")
        with needing("a socket"):
            self._socket = not_inherited(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            self._socket.setblocking(False)
            self._socket.bind(self.path)

    def fileno(self) -> int:
        """Readable when there may be a new producer."""
        return self._socket.fileno()

    def clear(self) -> bool:
        """Forget what has come; False if nothing has."""
        came = False
        with contextlib.suppress(BlockingIOError):
            while True:
                self._socket.recv(1)
                came = True
        return came

    def close(self) -> None:
        self._socket.close()
        self._directory.close()


# --- files ------------------------------------------------------------------------------------------------------


def _create_locked(partial: Path, lock: Path) -> None:
    """Make a lock file that is locked before others can see it."""
    descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        with needed("fcntl"):
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _held[str(lock)] = descriptor
        partial.rename(lock)
    except BaseException:
        _held.pop(str(lock), None)
        os.close(descriptor)
        partial.unlink(missing_ok=True)
        raise


def _is_held(lock: Path) -> bool:
    """A living process has the lock."""
    if str(lock) in _held:
        return True
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _remove(path: Path) -> None:
    """Remove an entry; its lock last, so that no entry is without one."""
    lock = path.with_suffix(".lock")
    path.unlink(missing_ok=True)
    lock.unlink(missing_ok=True)
    descriptor = _held.pop(str(lock), None)
    if descriptor is not None:
        os.close(descriptor)


def _remove_ended(root: Path) -> None:
    """Remove the folders of streams in which no living process has an entry. With the lock of the root."""
    for folder in root.iterdir():
        if not any(map(_is_held, folder.glob("*.lock"))):
            shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path, about: Mapping[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(about, file)
    partial.rename(path)


def _read(path: Path) -> dict[str, Any]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        found = json.loads(file.read(_MAX_ENTRY_BYTES))
    if not isinstance(found, dict):
        raise ValueError("an entry is a JSON object")
    return found


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    with needing("an entry of a stream"):
        try:
            yield
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EPERM):
                allowed = f"a folder in which files can be made ({error.strerror})"
                raise ConfigError("runtime directory", str(folder), allowed, f"{folder} cannot be used") from error
            raise


def _refuse_network(folder: Path) -> None:
    """Locks and sockets of a network file system reach other hosts, or do not work."""
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines():
            fields = line.split()
            kind = fields[fields.index("-") + 1] if "-" in fields else ""
            if len(fields) > 2 and fields[2] == number and kind in _NETWORK_FILE_SYSTEMS:
                allowed = "a folder of this host; set DRAY_RUNTIME_DIR"
                raise ConfigError("runtime directory", str(folder), allowed, f"{folder} is on {kind}")
