"""Keeps a server that was started for a job reachable: connections that never authenticate do not fill it.

A Redis server counts every connection, authenticated or not, and refuses new ones once it has `maxclients`. Until
it authenticates, a client is the server's user `default`, which is switched off; the job's clients are another
user. A thread watches the number of connections, over one that it opens before the server's address is known, and
closes those of `default` when half of `maxclients` are open.
"""

from __future__ import annotations

import logging
import threading

from redis.exceptions import RedisError

from dray.clock import MONOTONIC, Clock, Deadline
from dray.control.address import RedisAddress
from dray.control.client import RedisClient

logger = logging.getLogger("dray.control")

STRANGERS = "default"
"""The server's user that a client is until it authenticates."""

_INTERVAL = 0.5
_ANSWER_TIMEOUT = 1.0
_REPORT_INTERVAL = 60.0


class IdleClientReaper:
    """The thread that closes them. `close` ends it, and may be called twice.

    Args:
        address: of the server, where the job's user is named.
        max_clients: how many clients the server admits.
    """

    def __init__(self, address: RedisAddress, max_clients: int, clock: Clock = MONOTONIC) -> None:
        self._address = address
        self._threshold = max(1, max_clients // 2)
        self._clock = clock
        self._client = RedisClient(address, _ANSWER_TIMEOUT)
        self._closing = threading.Event()
        self._closed_clients = 0
        self._next_report = Deadline.after(0, clock)
        self._reap()
        self._thread = threading.Thread(target=self._run, name="redis-idle-clients", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread: at once if the server has ended, otherwise with the answer to its last command."""
        self._closing.set()
        self._thread.join()
        self._client.close()

    def _run(self) -> None:
        while not self._closing.wait(_INTERVAL):
            self._reap()

    def _reap(self) -> None:
        try:
            if _connected(self._client.do("INFO", "clients")) > self._threshold:
                self._closed_clients += self._client.do("CLIENT", "KILL", "USER", STRANGERS)
        except RedisError:
            return  # it is asked again soon; the processes that wait for it report that it is away
        if self._closed_clients and self._next_report.expired:
            logger.warning(
                "Redis at %s: closed %d connections that had not authenticated",
                self._address,
                self._closed_clients,
            )
            self._closed_clients = 0
            self._next_report = Deadline.after(_REPORT_INTERVAL, self._clock)


def _connected(information: bytes) -> int:
    fields = dict(line.split(b":", 1) for line in information.splitlines() if b":" in line)
    return int(fields[b"connected_clients"])
