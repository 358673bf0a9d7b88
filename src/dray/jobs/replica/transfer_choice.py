"""Which of the two ways payloads travel, by the job's configuration."""

from __future__ import annotations

from dray.jobs.replica.base import Replica
from dray.jobs.replica.redis_transfer import redis_policy_ends, redis_rollout_ends
from dray.jobs.replica.ring_transfer import ring_policy_ends, ring_rollout_ends
from dray.jobs.replica.transfer import PolicyEnds, RolloutEnds


def open_rollout_ends(replica: Replica) -> RolloutEnds:
    """The ends of a rollout replica."""
    if replica.spec.config.job.payload_transfer == "redis":
        return redis_rollout_ends(replica)
    return ring_rollout_ends(replica)


def open_policy_ends(replica: Replica) -> PolicyEnds:
    """The ends of the policy replica."""
    if replica.spec.config.job.payload_transfer == "redis":
        return redis_policy_ends(replica)
    return ring_policy_ends(replica)
