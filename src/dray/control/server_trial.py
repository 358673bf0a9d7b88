"""Whether a server is of use to a job: everything that a job does with Redis, done once."""

from __future__ import annotations

from typing import Final

from dray.clock import Deadline
from dray.control.client import RedisClient
from dray.control.connection import RedisConnection
from dray.control.entry import RolloutEntry
from dray.control.errors import RedisUnavailableError
from dray.control.names import JobKeys
from dray.control.rollout_consumer import RolloutConsumer
from dray.control.rollout_producer import RolloutProducer
from dray.control.weights_key import WeightsKey
from dray.errors import ControlPlaneError

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
    weights = WeightsKey(connection, keys)
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
