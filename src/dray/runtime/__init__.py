"""The processes of a job: controller, rollout replicas, policy replica; and what the user supplies to them."""

from dray.runtime.contract import PolicyTrainer, Prompt, ReplicaContext, RolloutWorker, Trajectory

__all__ = ["PolicyTrainer", "Prompt", "ReplicaContext", "RolloutWorker", "Trajectory"]
