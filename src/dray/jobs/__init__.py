"""The job runtime: controller, rollout replicas and policy replicas; and what the user supplies to them."""

from dray.jobs.api import PolicyGroup, PolicyTrainer, Prompt, ReplicaContext, RolloutWorker, Trajectory

__all__ = ["PolicyGroup", "PolicyTrainer", "Prompt", "ReplicaContext", "RolloutWorker", "Trajectory"]
