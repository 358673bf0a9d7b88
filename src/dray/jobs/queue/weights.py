"""Where the newest weights are: a stream of one entry, so that a replica can read it and wait for the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dray.clock import Deadline
from dray.errors import ConfigError, ControlPlaneError
from dray.jobs.queue import scripts
from dray.jobs.queue.connection import OldEpochError, RedisClient, RedisConnection, block_ms, paired
from dray.jobs.queue.scripts import JobKeys


@dataclass(frozen=True, slots=True)
class PublishedWeights:
    """The newest weights when they were asked for; `reference` is the JSON of their `PayloadRef`.

    `publication` grows with each publication, also with one of an older version after a restart.
    """

    reference: str
    version: int
    publication: str


class WeightsChannel:
    """The reference of the newest weights: the policy publishes, every rollout replica reads.

    Newest is what was published last. A policy that restarts from a checkpoint publishes an older version, and it
    is the newest then. Every call raises `ControlPlaneError` if Redis refuses, or does not answer within `timeout`
    seconds; the connection's shutdown event ends every wait.
    """

    def __init__(self, connection: RedisConnection, keys: JobKeys) -> None:
        self._connection = connection
        self._keys = keys
        self._published: tuple[str, int, int | None] | None = None

    def publish(
        self, reference: str, version: int, timeout: float | None = 30.0, *, epoch: int | None = None
    ) -> bool:
        """Make `reference` the newest weights; False if it was so already.

        Args:
            epoch: epoch of the policy group that publishes; None: whichever it is.

        Raises:
            OldEpochError: the group has a newer epoch; nothing was published.
        """
        if version < 0:
            raise ConfigError("version", version, "at least 0")
        self._published = (reference, version, epoch)
        return self._publish(keep=False, timeout=timeout)

    def restore(self, timeout: float | None = 30.0) -> bool:
        """Publish again, as `publish`, what this process published last, if Redis has lost it; true if so."""
        return self._published is not None and self._publish(keep=True, timeout=timeout)

    def newest(self, timeout: float | None = 30.0) -> PublishedWeights | None:
        """The newest weights, or None if nothing was published yet."""
        deadline = Deadline.after(timeout)
        return self._decoded(
            self._connection.call("read the newest weights", self._read, deadline, reads_only=True)
        )

    def wait_newer(
        self, than: PublishedWeights | None = None, timeout: float | None = 30.0
    ) -> PublishedWeights | None:
        """The newest weights, as soon as they are others than `than`, which the caller has.

        None when the time has passed or shutdown has begun, and during an outage that is shorter than the
        connection's patience.
        """
        deadline = Deadline.after(timeout)
        after = "0-0" if than is None else than.publication

        def wait(client: RedisClient) -> Any:
            found = self._read(client)
            if deadline.expired or self._decoded(found) not in (None, than):
                return found
            client.do("XREAD", "BLOCK", block_ms(deadline), "STREAMS", self._keys.weights, after)
            return self._read(client)

        while True:
            weights = self._decoded(
                self._connection.poll("wait for newer weights", wait, deadline, [], reads_only=True)
            )
            if weights is not None and weights != than:
                return weights
            if deadline.expired or self._connection.shutdown.is_set():
                return None

    def _publish(self, *, keep: bool, timeout: float | None) -> bool:
        assert self._published is not None
        reference, version, epoch = self._published

        def publish(client: RedisClient) -> int:
            shown_epoch = "" if epoch is None else epoch
            script = scripts.PUBLISH_WEIGHTS
            return int(script.run(client, self._keys, reference, version, int(keep), shown_epoch))

        published = self._connection.call(f"publish weights {version}", publish, Deadline.after(timeout))
        if published < 0:
            raise OldEpochError(f"weights {version} are of epoch {epoch}, but the policy group has a newer one")
        return bool(published)

    def _read(self, client: RedisClient) -> Any:
        return client.do("XREVRANGE", self._keys.weights, "+", "-", "COUNT", 1)

    def _decoded(self, entries: list[tuple[bytes, list[bytes]]]) -> PublishedWeights | None:
        if not entries:
            return None
        publication, flat = entries[0]
        fields = paired(flat)
        try:
            return PublishedWeights(fields[b"reference"].decode(), int(fields[b"version"]), publication.decode())
        except (KeyError, ValueError) as error:
            raise ControlPlaneError(
                f"{self._keys.weights} does not hold weights", endpoint=str(self._connection.address)
            ) from error
