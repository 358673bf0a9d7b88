"""The processes of a job: controller, rollout replicas, policy replicas; and what the user supplies to them."""

from dray.runtime.contract import PolicyGroup, PolicyTrainer, Prompt, ReplicaContext, RolloutWorker, Trajectory

__all__ = ["PolicyGroup", "PolicyTrainer", "Prompt", "ReplicaContext", "RolloutWorker", "Trajectory"]
