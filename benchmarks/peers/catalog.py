"""The peers: what they are called, what they copy, and what they need."""

from __future__ import annotations

from dataclasses import dataclass

OWN = ""
"""The environment that the harness itself runs in."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One way from a producer's arrays to a consumer's.

    Attributes:
        name: as the report calls it.
        kind: for `benchmarks.peers.kinds`.
        copies: of a payload's bytes on the way, those of the kernel included.
        environment: the name of the virtual environment it needs, or `OWN`.
        needed: the module without which it does not run.
        runs_ray: Ray's background processes would disturb the others, so it is measured after them; and it runs in
            a network of its own, which has nothing but loopback.
        quick: part of a quick run.
    """

    name: str
    kind: str
    copies: str
    environment: str = OWN
    needed: str = "dray"
    runs_ray: bool = False
    quick: bool = True

    @property
    def is_dray(self) -> bool:
        return self in DRAY


IN_PLACE = Peer("dray stream in place", "stream:in-place", "into the slot")
DRAY = (
    IN_PLACE,
    Peer("dray stream with a copy", "stream:copy", "into the slot, out of it"),
    Peer("dray shm", "dray:shm:read:socket", "into the slot, out of it"),
    Peer("dray shm in place", "dray:shm:lease:socket", "into the slot"),
    Peer("dray shm, by Redis", "dray:shm:read:redis", "into the slot, out of it", needed="redis"),
    Peer("dray tcp", "dray:tcp:read:socket", "into the slot, into the kernel, out of it", quick=False),
    Peer(
        "dray ucx",
        "dray:ucx:read:socket",
        "into the slot, into UCX's segments and the kernel, out of them",
        needed="ucxx",
        quick=False,
    ),
)
"""Without a stream, references go over a socket between the two processes, or through a job's stream in Redis."""

REDIS = Peer(
    "Redis inline",
    "redis",
    "packing, bytes, kernel in and out, the server's own, kernel in and out, the parser's, the trainer's own",
    needed="redis",
)
OTHERS = (
    REDIS,
    Peer("ZeroMQ ipc", "zeromq:ipc", "into the kernel, out of it", "zeromq", "zmq"),
    Peer("ZeroMQ tcp", "zeromq:tcp", "into the kernel, out of it", "zeromq", "zmq", quick=False),
    Peer(
        "multiprocessing.Queue",
        "multiprocessing",
        "into a pickle, into the kernel, out of it, out of the pickle",
        needed="multiprocessing",
    ),
    Peer("torch queue", "torch", "into new shared memory", "torch", "torch"),
    Peer(
        "Ray", "ray", "into the object store; below 100 KiB into a message and out of it", "ray", "ray", True, True
    ),
    Peer(
        "TransferQueue",
        "transferqueue",
        "kernel in and out on the way into the storage process, and again out of it",
        "transferqueue",
        "transfer_queue",
        True,
        quick=False,
    ),
)
PEERS = (*DRAY, *OTHERS)

REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "zeromq": ("numpy", "pyzmq"),
    "torch": ("numpy", "torch"),
    "ray": ("numpy", "ray"),
    # tensordict needs torch, and takes any: it is named so that constraints.txt chooses it.
    "transferqueue": ("numpy", "torch", "TransferQueue==0.1.11"),
}
"""What pip installs into each environment."""
