"""The Redis server of a job on this machine, from its start to the end of the job's keys in it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dray.clock import Deadline
from dray.errors import ConfigError, ControlPlaneError
from dray.jobs.config import JobConfig
from dray.jobs.process import LOOPBACK
from dray.jobs.queue import (
    KEY_LIFETIME,
    JobKeys,
    RedisAddress,
    RedisConnection,
    RedisServer,
    RedisUnavailableError,
    delete_job,
    start_redis,
)

_NO_LOGS = Path()
"""A server that was configured has its logs elsewhere."""

_SOON = 1.0
"""Seconds within which a configured server answers without a word about it."""


@contextmanager
def job_redis(
    config: JobConfig,
    job_id: str,
    place: Path,
    host: str | None,
    say: Callable[[str], None],
    complain: Callable[[str], None],
) -> Iterator[RedisServer]:
    """The configured server, waited for with a bound, or one that is started. The job's keys go with it.

    Args:
        place: folder for the log of a server that is started.
        host: an address at which a server that is started listens for other machines; None: at none.
        say: shows a line.
        complain: notes a line for the end of the run.

    Raises:
        ConfigError: the configured server does not answer within `timeouts.redis`, or is of no use to the job.
        ControlPlaneError: none can be started.
    """
    keys = JobKeys(job_id)
    with _start(config, keys, place, host, say) as server:
        try:
            yield server
        finally:
            if server.source == "configured":
                _forget_keys(server.address, keys, complain)


def _start(
    config: JobConfig, keys: JobKeys, place: Path, host: str | None, say: Callable[[str], None]
) -> RedisServer:
    if config.redis.url is not None:
        return answering_server(config, keys, say)
    with _quiet("dray.jobs.queue"):
        return start_redis(None, place, tcp=host is not None, host=host or LOOPBACK, timeout=config.timeouts.redis)


def answering_server(config: JobConfig, keys: JobKeys, say: Callable[[str], None]) -> RedisServer:
    """The configured server, which has answered and has been tried.

    Args:
        keys: what it is tried with; nothing of them is left.
        say: shows a line.

    Raises:
        ConfigError: it does not answer within `timeouts.redis`, or is of no use to a job.
    """
    url, timeout = config.redis.url, config.timeouts.redis
    deadline = Deadline.after(timeout)
    with _quiet("dray.jobs.queue"):  # that it does not answer is said once
        try:
            return start_redis(url, _NO_LOGS, keys=keys, timeout=min(_SOON, timeout))
        except ConfigError as error:
            cause = error.__cause__
            if not isinstance(cause, RedisUnavailableError) or deadline.remaining < _SOON:
                raise
            state = f"refuses ({cause.answer})" if cause.answer else "does not answer"
            say(f"{error.value} {state}; waiting for it, at most {timeout:g} s")
        return start_redis(url, _NO_LOGS, keys=keys, timeout=deadline.remaining)


def _forget_keys(address: RedisAddress, keys: JobKeys, complain: Callable[[str], None]) -> None:
    """A server that outlives the job keeps nothing of it."""
    with RedisConnection(address, answer_timeout=1.0) as connection:
        try:
            delete_job(connection, keys, timeout=2.0)
        except ControlPlaneError as error:
            complain(f"the job's keys stay in Redis for at most {KEY_LIFETIME / 3600:g} hours: {error}")


@contextmanager
def _quiet(logger_name: str) -> Iterator[None]:
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
