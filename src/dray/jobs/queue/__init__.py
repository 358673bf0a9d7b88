"""The queue of a job: Redis Streams that carry references and the newest weights.

The rings of the producers are the truth; what lies in Redis is an index of them, and can be built again from them
at any time. `redis` is imported in this package only.

* `configured_redis` tries a server, `start_redis` starts one, `RedisConnection` calls it.
* `RolloutProducer` and `RolloutConsumer` carry references (or payloads inline) from rollout replicas to the policy
  group; `RolloutQueue` observes them.
* `WeightsChannel` has the reference of the newest weights.
"""

from dray.jobs.queue.connection import (
    BacklogFullError,
    ControlPlaneStopped,
    OldEpochError,
    RedisAddress,
    RedisConnection,
    RedisUnavailableError,
    StreamLostError,
)
from dray.jobs.queue.consumer import RolloutConsumer
from dray.jobs.queue.producer import (
    CommitOutcome,
    Delivery,
    QueueStatistics,
    RolloutEntry,
    RolloutProducer,
    RolloutQueue,
)
from dray.jobs.queue.redis_server import REDIS_STOP_BOUND, RedisServer, configured_redis, delete_job, start_redis
from dray.jobs.queue.scripts import KEY_LIFETIME, JobKeys
from dray.jobs.queue.weights import PublishedWeights, WeightsChannel

__all__ = [
    "KEY_LIFETIME",
    "REDIS_STOP_BOUND",
    "BacklogFullError",
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
    "WeightsChannel",
    "configured_redis",
    "delete_job",
    "start_redis",
]
