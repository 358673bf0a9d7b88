"""The job runtime: controller, rollout replicas and policy replicas; and what the user supplies to them."""

from dray.jobs.api import (
    PolicyGroup,
    PolicyTrainer,
    ReplicaContext,
    Rollout,
    RolloutWorker,
    Trajectory,
    WorkItem,
)

__all__ = [
    "PolicyGroup",
    "PolicyTrainer",
    "ReplicaContext",
    "Rollout",
    "RolloutWorker",
    "Trajectory",
    "WorkItem",
]
