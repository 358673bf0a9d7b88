"""The rollout stream of a job: from rollout replicas to the policy group.

::

    RolloutProducer: attach → publish … publish     StreamLostError → attach, publish all payloads again
    RolloutConsumer: receive → train → commit       or discard what is too old

Delivery is at least once. An entry is in the stream from `publish` to `commit` or `discard`, is given to one
consumer of the group at a time, and changes hands only by `claim_from`, when its consumer was declared dead. A
consumer never hands out what it holds or has ended already, so that publishing again after Redis was restarted
empty gives no payload twice.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping
from typing import TypeVar

from redis.exceptions import ResponseError

from dray.clock import Deadline
from dray.control import scripts
from dray.control.client import RedisClient, paired
from dray.control.connection import RedisConnection
from dray.control.entry import QueueStatistics
from dray.control.names import GROUP, JobKeys

logger = logging.getLogger("dray.control")

T = TypeVar("T")


class RolloutQueue:
    """What producers, consumers and mere observers of the stream share; thread-safe.

    Args:
        connection: shared with others; its shutdown event ends every wait here.
        keys: the job's names.
        epoch: epoch of the policy group to put back if Redis has lost it.
    """

    def __init__(self, connection: RedisConnection, keys: JobKeys, *, epoch: int | None = None) -> None:
        self._connection = connection
        self._keys = keys
        self._epoch = epoch
        self._stream_epoch: str | None = None

    def attach(self, timeout: float | None = 30.0) -> bool:
        """Make the stream and its group if they are missing, and take up the stream's epoch.

        Returns:
            True if this is another stream than before: every payload that is READY or being read must be published
            again.

        Raises:
            ControlPlaneError: Redis does not answer, or refuses.
        """
        before = self._stream_epoch
        self._connection.call("attach to the rollout stream", self._attach, self._deadline(timeout))
        return before is not None and before != self._stream_epoch

    def backlog(self, timeout: float | None = 30.0) -> int:
        """Entries in the stream: published and not ended.

        Raises:
            ControlPlaneError: Redis does not answer, or refuses.
        """
        return int(
            self._connection.call(
                "measure the backlog",
                lambda client: client.do("XLEN", self._keys.rollouts),
                self._deadline(timeout),
                reads_only=True,
            )
        )

    def statistics(self, timeout: float | None = 30.0) -> QueueStatistics:
        """What the stream holds and has seen, over all producers and consumers.

        Raises:
            ControlPlaneError: Redis does not answer, or refuses.
        """
        keys = [self._keys.rollouts, self._keys.counters, self._keys.dead]
        backlog, pending, dead, oldest, now_ms, counters = self._connection.call(
            "read statistics",
            lambda client: scripts.STATISTICS.run(client, keys, [GROUP]),
            self._deadline(timeout),
            reads_only=True,
        )
        return QueueStatistics(
            backlog=backlog,
            pending=pending,
            dead_letters=dead,
            oldest_age=None if not oldest else max(0.0, (now_ms - int(oldest.split(b"-")[0])) / 1000),
            counters={name.decode(): int(value) for name, value in paired(counters).items()},
        )

    def listed_prompts(self, timeout: float | None = 30.0) -> list[int]:
        """The prompt of every entry of the stream.

        Raises:
            ControlPlaneError: Redis does not answer, or refuses.
        """
        prompts = self._connection.call(
            "list prompts",
            lambda client: scripts.LISTED_PROMPTS.run(client, [self._keys.rollouts], []),
            self._deadline(timeout),
            reads_only=True,
        )
        return [int(prompt) for prompt in prompts if prompt.isdigit()]

    def raise_counters(self, least: Mapping[str, int], timeout: float | None = 30.0) -> None:
        """Put counters that are lower, as after a restart of Redis, at what the caller knows.

        Raises:
            ControlPlaneError: Redis does not answer, or refuses.
        """
        arguments = [part for counter in least.items() for part in counter]
        self._connection.call(
            "raise counters",
            lambda client: scripts.RAISE_COUNTERS.run(client, [self._keys.counters], arguments),
            self._deadline(timeout),
        )

    def dead_letters(self, count: int = 100, timeout: float | None = 30.0) -> list[dict[str, str]]:
        """The newest `count` dead letters, newest first, with the fields that `names` lists.

        Raises:
            ControlPlaneError: Redis does not answer, or refuses.
        """
        letters = self._connection.call(
            "read dead letters",
            lambda client: client.do("XREVRANGE", self._keys.dead, "+", "-", "COUNT", count),
            self._deadline(timeout),
            reads_only=True,
        )
        return [
            {name.decode(): value.decode(errors="replace") for name, value in paired(fields).items()}
            for _, fields in letters
        ]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._keys.job} at {self._connection.address}>"

    def _deadline(self, timeout: float | None) -> Deadline:
        return Deadline.after(timeout, self._connection.clock)

    def _attach(self, client: RedisClient) -> bool:
        """Whether anything was missing."""
        keys = [self._keys.rollouts, self._keys.index, self._keys.stream_epoch, self._keys.group_epoch]
        epoch = "" if self._epoch is None else self._epoch
        stream_epoch, made = scripts.ATTACH.run(client, keys, [GROUP, secrets.token_hex(8), epoch])
        self._stream_epoch = stream_epoch.decode()
        return bool(made)

    def _healing(self, operation: Callable[[RedisClient], T]) -> Callable[[RedisClient], T]:
        # NOGROUP has no exception class of its own. What tells it: attaching finds something missing, or another
        # epoch than before, because somebody else has made the stream again meanwhile.
        def healed(client: RedisClient) -> T:
            while True:
                before = self._stream_epoch
                try:
                    return operation(client)
                except ResponseError:
                    made = self._attach(client)
                    if not made and self._stream_epoch == before:
                        raise
                    if before is not None:
                        logger.warning("the rollout stream of job %s was lost and made again", self._keys.job)

        return healed
