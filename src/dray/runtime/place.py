"""Where a replica runs, as its launcher tells it in the environment: nothing is set for a job on one machine."""

from __future__ import annotations

import os

ADDRESS_VARIABLE = "DRAY_ADDRESS"
"""The address of this node that the job's other nodes reach."""

REPLICA_NODES_VARIABLE = "DRAY_REPLICA_NODES"
"""The names of all nodes that belong to the replica, separated by spaces; its process runs on the first."""

LOOPBACK = "127.0.0.1"


def own_address() -> str:
    """Where to listen, and what to advertise to the other processes of the job."""
    return os.environ.get(ADDRESS_VARIABLE, LOOPBACK)


def folder_is_local() -> bool:
    """Whether the job's folder is on this machine: Unix sockets in a folder that nodes share are no good."""
    return ADDRESS_VARIABLE not in os.environ
