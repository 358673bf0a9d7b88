"""Where the newest weights are: a stream of one entry, so that a replica can read it and wait for the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dray.clock import Deadline
from dray.errors import ConfigError, ControlPlaneError
from dray.jobs.queue import keys, scripts
from dray.jobs.queue.connection import OldEpochError, RedisConnection, block_ms
from dray.jobs.queue.keys import JobKeys
from dray.jobs.queue.redis_client import RedisClient, paired


@dataclass(frozen=True, slots=True)
class PublishedWeights:
    """The newest weights when they were asked for.

    Args:
        reference: JSON of the `PayloadRef`.
        version: version of the weights.
        publication: grows with each publication, also with one of an older version after a restart.
    """

    reference: str
    version: int
    publication: str


class WeightsChannel:
    """The reference of the newest weights: the policy publishes, every rollout replica reads.

    Newest is what was published last. A policy that restarts from a checkpoint publishes an older version, and it
    is the newest then.

    Args:
        connection: shared with others; its shutdown event ends every wait here.
        keys: the job's names.
    """

    def __init__(self, connection: RedisConnection, keys: JobKeys) -> None:
        self._connection = connection
        self._key = keys.weights
        self._group_epoch = keys.group_epoch
        self._published: tuple[str, int, int | None] | None = None

    def publish(
        self, reference: str, version: int, timeout: float | None = 30.0, *, epoch: int | None = None
    ) -> bool:
        """Make `reference` the newest weights.

        Args:
            epoch: epoch of the policy group that publishes; None: whichever it is.

        Returns:
            False if it was so already.

        Raises:
            OldEpochError: the group has a newer epoch; nothing was published.
            ControlPlaneError: Redis does not answer, or refuses.
        """
        if version < 0:
            raise ConfigError("version", version, "at least 0")
        self._published = (reference, version, epoch)
        return self._publish(keep=False, timeout=timeout)

    def restore(self, timeout: float | None = 30.0) -> bool:
        """Publish again what this process published last, if Redis has lost it.

        Returns:
            True if it was lost.

        Raises:
            OldEpochError, ControlPlaneError: as `publish`.
        """
        return self._published is not None and self._publish(keep=True, timeout=timeout)

    def newest(self, timeout: float | None = 30.0) -> PublishedWeights | None:
        """The newest weights, or None if nothing was published yet.

        Raises:
            ControlPlaneError: Redis does not answer, or refuses.
        """
        deadline = Deadline.after(timeout, self._connection.clock)
        return self._decoded(
            self._connection.call("read the newest weights", self._read, deadline, reads_only=True)
        )

    def wait_newer(
        self, than: PublishedWeights | None = None, timeout: float | None = 30.0
    ) -> PublishedWeights | None:
        """The newest weights, as soon as they are others than `than`.

        Args:
            than: what the caller has; None: wait for the first ones.
            timeout: seconds to wait; None: until shutdown.

        Returns:
            The weights; None when the time has passed or shutdown has begun, and during an outage that is shorter
            than the connection's patience.

        Raises:
            ControlPlaneError: Redis is lost, or refuses.
        """
        deadline = Deadline.after(timeout, self._connection.clock)
        after = "0-0" if than is None else than.publication

        def wait(client: RedisClient) -> Any:
            found = self._read(client)
            if deadline.expired or self._decoded(found) not in (None, than):
                return found
            client.do("XREAD", "BLOCK", block_ms(deadline), "STREAMS", self._key, after)
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
        arguments: list[str | int] = [reference, version, int(keep), "" if epoch is None else epoch]
        published = self._connection.call(
            f"publish weights {version}",
            lambda client: scripts.PUBLISH_WEIGHTS.run(client, [self._key, self._group_epoch], arguments),
            Deadline.after(timeout, self._connection.clock),
        )
        if published < 0:
            raise OldEpochError(f"weights {version} are of epoch {epoch}, but the policy group has a newer one")
        return bool(published)

    def _read(self, client: RedisClient) -> Any:
        return client.do("XREVRANGE", self._key, "+", "-", "COUNT", 1)

    def _decoded(self, entries: list[tuple[bytes, list[bytes]]]) -> PublishedWeights | None:
        if not entries:
            return None
        publication, flat = entries[0]
        fields = paired(flat)
        try:
            return PublishedWeights(
                fields[keys.REFERENCE].decode(), int(fields[keys.VERSION]), publication.decode()
            )
        except (KeyError, ValueError) as error:
            raise ControlPlaneError(
                f"{self._key} does not hold weights", endpoint=str(self._connection.address)
            ) from error

    def __repr__(self) -> str:
        return f"<WeightsChannel at {self._connection.address}>"
