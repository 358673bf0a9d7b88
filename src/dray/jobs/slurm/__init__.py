"""A job on the nodes of a Slurm allocation.

The process on the first node, `head`, is the job's supervisor; on every other node a process of `node` starts the
replicas of that node as the head commands. Both read the `plan` that was written when the job was
submitted.
"""
