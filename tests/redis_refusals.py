"""Ways in which a running Redis server refuses for a while, as in a fail-over or when it is full. Real ones: the
server is ordered to become a replica, to want a replica, to be full, or to run a script that does not end."""

import argparse
import contextlib
import secrets
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from waiting import wait_until

from dray.jobs.queue import RedisAddress, start_redis
from dray.jobs.queue.connection import RedisClient

CARTPOLE = Path(__file__).parents[1] / "examples" / "cartpole" / "job.toml"


def _restore(admin: RedisClient, *command: str | bytes) -> None:
    with contextlib.suppress(RedisConnectionError):  # a server that has ended needs it no more
        admin.do(*command)


@contextmanager
def _setting(admin: RedisClient, name: str, value: str) -> Iterator[None]:
    before = admin.do("CONFIG", "GET", name)[1]
    admin.do("CONFIG", "SET", name, value)
    try:
        yield
    finally:
        _restore(admin, "CONFIG", "SET", name, before)


@contextmanager
def replica_of_nothing(admin: RedisClient) -> Iterator[None]:
    """READONLY: it is a replica of a server that is not there."""
    admin.do("REPLICAOF", "127.0.0.1", 1)
    try:
        yield
    finally:
        _restore(admin, "REPLICAOF", "NO", "ONE")


@contextmanager
def replica_that_serves_nothing_old(admin: RedisClient) -> Iterator[None]:
    """MASTERDOWN: as a replica without its master, it refuses reads as well."""
    with _setting(admin, "replica-serve-stale-data", "no"), replica_of_nothing(admin):
        yield


@contextmanager
def too_few_replicas(admin: RedisClient) -> Iterator[None]:
    """NOREPLICAS."""
    with _setting(admin, "min-replicas-to-write", "1"):
        yield


@contextmanager
def full(admin: RedisClient) -> Iterator[None]:
    """OOM."""
    with _setting(admin, "maxmemory", "1"):
        yield


@contextmanager
def blocked_by_a_script(admin: RedisClient) -> Iterator[None]:
    """BUSY: a script loops without end."""

    def loop() -> None:
        with contextlib.suppress(RedisError):  # it is killed
            admin.do("EVAL", "while true do end", 0)

    def is_busy() -> bool:
        try:
            admin.do("PING")
        except RedisError:
            return True
        return False

    with _setting(admin, "lua-time-limit", "10"):
        thread = threading.Thread(target=loop)
        thread.start()
        try:
            wait_until(is_busy, "the script to block the server")
            yield
        finally:
            _restore(admin, "SCRIPT", "KILL")
            thread.join(10)


REFUSALS: Mapping[str, Callable[[RedisClient], AbstractContextManager[None]]] = {
    "READONLY": replica_of_nothing,
    "NOREPLICAS": too_few_replicas,
    "OOM": full,
    "BUSY": blocked_by_a_script,
    "MASTERDOWN": replica_that_serves_nothing_old,
}
"""By the code of the answer."""


@contextmanager
def administrator(address: RedisAddress) -> Iterator[RedisClient]:
    """A client that gets no refusals: it makes them."""
    client = RedisClient(address, 20.0)
    try:
        yield client
    finally:
        client.close()


def run_through_refusals(
    command: list[str],
    address: RedisAddress,
    begins: Callable[[], object],
    *,
    refusals: int,
    seconds: float,
    between: float,
    bound: float,
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run `command`, which uses the server at `address`, while that refuses `refusals` times for `seconds` each.

    Args:
        begins: whether the first refusal may come.
        between: seconds before each refusal.
        bound: seconds that the command may take.

    Returns:
        How the command ended, with what it printed, and the codes with which the server refused meanwhile.
    """
    met: list[str] = []
    ended = threading.Event()

    def refuse() -> None:
        with administrator(address) as admin:
            wait_until(lambda: begins() or ended.is_set(), "the moment to begin", bound, pause=0.05)
            for code in [*REFUSALS, *REFUSALS][:refusals]:
                if ended.wait(between):
                    return
                with REFUSALS[code](admin):
                    met.append(code)
                    ended.wait(seconds)

    thread = threading.Thread(target=refuse)
    thread.start()
    try:
        completed = subprocess.run(command, capture_output=True, text=True, timeout=bound)
    finally:
        ended.set()
        thread.join(60)
    return completed, met


def main() -> int:
    """``python tests/redis_refusals.py``: CartPole, through five refusals of three seconds."""
    parser = argparse.ArgumentParser(description="Solve CartPole while its Redis server refuses repeatedly.")
    parser.add_argument("--refusals", type=int, default=5, help="how often the server refuses; by default 5")
    parser.add_argument("--seconds", type=float, default=3.0, help="for how long each time; by default 3")
    parser.add_argument("--between", type=float, default=0.5, help="seconds before each of them; by default 0.5")
    parser.add_argument("--job", type=Path, default=CARTPOLE, help="the job file; by default that of CartPole")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, start_redis(Path(folder)) as server:
        output = Path(folder) / secrets.token_hex(4)
        settings = [f"redis.url={server.address.url}", "job.plot="]
        command = [
            sys.executable, "-m", "dray.cli.app", "run", str(options.job), "--output", str(output),
            *(part for setting in settings for part in ("--set", setting)),
        ]  # fmt: skip
        completed, met = run_through_refusals(
            command, server.address, (output / "metrics.jsonl").exists,
            refusals=options.refusals, seconds=options.seconds, between=options.between, bound=1800,
        )  # fmt: skip
    sys.stdout.write(completed.stdout + completed.stderr)
    print(f"{len(met)} refusals of {options.seconds:g} s: {', '.join(met)}; exit code {completed.returncode}")
    return completed.returncode


if __name__ == "__main__":
    sys.exit(main())
