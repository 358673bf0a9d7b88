"""The rollout replica's end of the rollout stream."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence

from dray.clock import Deadline
from dray.control import scripts
from dray.control.connection import RedisConnection, block_ms
from dray.control.entry import RolloutEntry
from dray.control.errors import BacklogFullError, ControlPlaneStopped, StreamLostError
from dray.control.names import GROUP, JobKeys
from dray.control.rollout_queue import RolloutQueue
from dray.errors import ConfigError

logger = logging.getLogger("dray.control")

# What the script LISTED returns for an entry.
_ENDED, _LISTED, _TRIMMED = range(3)


class RolloutProducer(RolloutQueue):
    """Publishes entries; thread-safe.

    Args:
        connection: shared with others; its shutdown event ends every wait here.
        keys: the job's names.
        max_backlog: `publish` waits while the stream holds this many entries; None for references, which the
            producers' rings bound.

    Raises:
        ConfigError: `max_backlog` is less than 1.
    """

    def __init__(self, connection: RedisConnection, keys: JobKeys, *, max_backlog: int | None = None) -> None:
        if max_backlog is not None and max_backlog < 1:
            raise ConfigError("max_backlog", max_backlog, "at least 1, or None")
        super().__init__(connection, keys)
        self._max_backlog = max_backlog

    def publish(self, entry: RolloutEntry, timeout: float | None = 30.0) -> bool:
        """Put `entry` into the stream, unless its identity is there and no other client has removed it.

        Args:
            entry: what to publish.
            timeout: seconds to wait for Redis and, with `max_backlog`, for room; None: until shutdown.

        Returns:
            True if it was added, False if it was there.

        Raises:
            StreamLostError: Redis was restarted empty; nothing was published.
            BacklogFullError: there was no room until the deadline.
            ControlPlaneStopped: there was no room when shutdown began.
            ControlPlaneError: Redis does not answer, or refuses.
        """
        deadline = self._deadline(timeout)
        if self._stream_epoch is None:
            self._connection.call("attach to the rollout stream", self._attach, deadline)
        keys = [getattr(self._keys, name) for name in ("rollouts", "index", "stream_epoch", "counters", "room")]
        arguments = [self._stream_epoch or "", entry.identity, GROUP, self._max_backlog or 0, *entry.to_fields()]
        what = f"publish {entry.identity}"
        while True:
            status, *after = self._connection.call(
                what, lambda client: scripts.PUBLISH.run(client, keys, arguments), deadline
            )
            if status == b"lost":
                raise StreamLostError(f"{what}: Redis was restarted empty; payloads must be published again")
            if status != b"full":
                return bool(status == b"added")
            if self._connection.shutdown.is_set():
                raise ControlPlaneStopped(f"{what}: shutdown began while the stream was full")
            if deadline.expired:
                raise BacklogFullError(
                    f"{what}: the stream holds {self._max_backlog} entries that were not trained on",
                    elapsed=deadline.elapsed,
                )
            self._wait_for_room(after[0], deadline)

    def restore(self, waiting: Callable[[], Iterable[RolloutEntry]]) -> None:
        """Make the stream if it is missing; if it is another one than before, publish again what is `waiting`.

        Raises:
            ControlPlaneError: Redis does not answer, or refuses; or as `publish`.
        """
        while self.attach():
            # Another restart meanwhile makes another stream, which `attach` tells: all of it again.
            with contextlib.suppress(StreamLostError):
                for entry in waiting():
                    self.publish(entry)

    def publish_trimmed(self, entries: Sequence[RolloutEntry], timeout: float | None = 30.0) -> list[RolloutEntry]:
        """Publish again those of `entries`, all published by this process, whose stream entries another client has
        removed (XTRIM, XDEL) and that no consumer holds.

        Returns:
            Those of `entries` that the stream no longer lists because they were ended: a READY payload among them
            is an orphan that no consumer will ask for.

        Raises:
            StreamLostError: Redis was restarted empty, so that the index proves nothing.
            ControlPlaneError: Redis does not answer, or refuses; or as `publish`.
        """
        deadline = self._deadline(timeout)
        keys = [self._keys.rollouts, self._keys.index, self._keys.stream_epoch]
        arguments = [self._stream_epoch or "", GROUP, *(entry.identity for entry in entries)]
        status, *states = self._connection.call(
            "look entries up",
            lambda client: scripts.LISTED.run(client, keys, arguments),
            deadline,
            reads_only=True,
        )
        if status == b"lost":
            raise StreamLostError("look entries up: Redis was restarted empty")
        by_state: dict[int, list[RolloutEntry]] = {_ENDED: [], _LISTED: [], _TRIMMED: []}
        for entry, state in zip(entries, states[0], strict=True):
            by_state[state].append(entry)
        if trimmed := by_state[_TRIMMED]:
            logger.warning(
                "another client has removed %d entries from the rollout stream of job %s; publishing them again",
                len(trimmed), self._keys.job,
            )  # fmt: skip
        for entry in trimmed:
            self.publish(entry, deadline.timeout)
        return by_state[_ENDED]

    def _wait_for_room(self, after: bytes, deadline: Deadline) -> None:
        self._connection.poll(
            "wait for room in the stream",
            lambda client: client.do(
                "XREAD", "COUNT", 1, "BLOCK", block_ms(deadline), "STREAMS", self._keys.room, after
            ),
            deadline,
            None,
            reads_only=True,
        )
