"""The replicas of a job: rollout and policy processes, and how payloads travel between them."""
