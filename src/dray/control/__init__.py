"""The control plane: Redis Streams that carry references, commands and the newest weights.

The rings of the producers are the truth; what lies in Redis is an index of them, and can be built again from them
at any time. `redis` is imported in this package only.

* `start_redis` finds or starts a server, `RedisConnection` talks to it.
* `RolloutProducer` and `RolloutConsumer` carry references (or payloads inline) from rollout replicas to the policy
  group; `RolloutQueue` observes them.
* `CommandStream` carries commands to one replica, `WeightsKey` the reference of the newest weights.
"""

from dray.control.address import RedisAddress
from dray.control.commands import Command, CommandStream
from dray.control.connection import RedisConnection, delete_job
from dray.control.embedded import REDIS_STOP_BOUND, RedisServer, start_redis
from dray.control.entry import CommitOutcome, Delivery, QueueStatistics, RolloutEntry
from dray.control.errors import (
    BacklogFullError,
    ControlPlaneStopped,
    OldEpochError,
    RedisUnavailableError,
    StreamLostError,
)
from dray.control.names import KEY_LIFETIME, JobKeys
from dray.control.rollout_consumer import RolloutConsumer
from dray.control.rollout_producer import RolloutProducer
from dray.control.rollout_queue import RolloutQueue
from dray.control.weights_key import PublishedWeights, WeightsKey

__all__ = [
    "KEY_LIFETIME",
    "REDIS_STOP_BOUND",
    "BacklogFullError",
    "Command",
    "CommandStream",
    "CommitOutcome",
    "ControlPlaneStopped",
    "Delivery",
    "JobKeys",
    "OldEpochError",
    "PublishedWeights",
    "QueueStatistics",
    "RedisAddress",
    "RedisConnection",
    "RedisServer",
    "RedisUnavailableError",
    "RolloutConsumer",
    "RolloutEntry",
    "RolloutProducer",
    "RolloutQueue",
    "StreamLostError",
    "WeightsKey",
    "delete_job",
    "start_redis",
]
