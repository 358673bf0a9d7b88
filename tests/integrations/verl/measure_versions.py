"""How long an update of weights takes beneath the checkpoint engine, on this machine alone.

python tests/integrations/verl/measure_versions.py [MIB]

For rollouts on the host of the actor, and over TCP on loopback: whole, and as deltas of 2 % of the elements. Here,
a rollout is a process that copies every tensor once; neither verl nor Ray is needed.
"""

import multiprocessing
import statistics
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from dray.integrations.tensor_versions import Place, TensorPublisher, TensorSubscriber

UPDATES = 6
ROLLOUTS = 2
LAYERS = 16


def rollout(place: Place, delta: Any, ready: Connection) -> None:
    torch.set_num_threads(1)
    engine = torch.empty(0, dtype=torch.bfloat16)
    with TensorSubscriber(place, delta=delta) as subscriber:
        for version in range(UPDATES):
            for bucket in subscriber.buckets(after=version, timeout=120.0):
                for _, tensor in bucket:
                    engine = engine if engine.shape == tensor.shape else torch.empty_like(tensor)
                    engine.copy_(tensor)
            ready.send(version)


def measure(mib: int, *, remote: bool, delta: Any) -> tuple[float, float]:
    """Median seconds of publishing, and until the last rollout has read the version."""
    spawn = multiprocessing.get_context("spawn")
    weights = torch.randn(mib << 19).to(torch.bfloat16).view(LAYERS, -1)
    listen = "tcp://127.0.0.1:0" if remote else ()
    with TensorPublisher(bucket_bytes=64 << 20, delta=delta, listen=listen) as publisher:
        place = publisher.place._replace(host="another") if remote else publisher.place
        pipes = [spawn.Pipe() for _ in range(ROLLOUTS)]
        processes = [spawn.Process(target=rollout, args=(place, delta, child)) for _, child in pipes]
        for each in processes:
            each.start()
        found = []
        for _ in range(UPDATES):
            chosen = torch.rand(weights.shape) < 0.02
            weights[chosen] += 1
            began = time.perf_counter()
            with publisher.version() as add:
                for number, layer in enumerate(weights):
                    add(f"layers.{number}", layer)
            published = time.perf_counter() - began
            for parent, _ in pipes:
                parent.recv()
            found.append((published, time.perf_counter() - began))
        for each in processes:
            each.join()
    steady = found[2:]  # the first is put together in private memory, and the second touches new memory
    return statistics.median(first for first, _ in steady), statistics.median(last for _, last in steady)


def main() -> None:
    """Print a table."""
    mib = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    print(f"{mib} MiB of bfloat16, {ROLLOUTS} rollouts")
    for name, remote, delta in (
        ("one host", False, "full"),
        ("tcp", True, "full"),
        ("tcp, sparse", True, "sparse"),
    ):
        published, read = (1000 * each for each in measure(mib, remote=remote, delta=delta))
        print(f"{name:<12} published after {published:>7.0f} ms, read after {read:>7.0f} ms", flush=True)


if __name__ == "__main__":
    main()
