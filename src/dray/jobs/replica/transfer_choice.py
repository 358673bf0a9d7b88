"""Which of the two ways payloads travel, by the job's configuration."""

from __future__ import annotations

from dray.jobs.replica.base import Replica
from dray.jobs.replica.redis_transfer import inline_inlet, inline_outlet
from dray.jobs.replica.ring_transfer import reference_inlet, reference_outlet
from dray.jobs.replica.transfer import InletContext, OutletContext


def open_outlet(replica: Replica) -> OutletContext:
    """The ends of a rollout replica."""
    if replica.spec.config.job.payload_transfer == "redis":
        return inline_outlet(replica)
    return reference_outlet(replica)


def open_inlet(replica: Replica) -> InletContext:
    """The ends of the policy replica."""
    if replica.spec.config.job.payload_transfer == "redis":
        return inline_inlet(replica)
    return reference_inlet(replica)
