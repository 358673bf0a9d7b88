"""Median latency of a tensor from actor to actor: dray beside Ray's object store and Ray's gloo transport.

    python tests/integrations/ray/ray_latency.py [--rounds N]

In one cluster, between the same two actors, the ways one after the other in each round. Two calls are timed in the
driver: one actor returns a tensor that it has; the other, whose argument it is, reads a byte of each page. In the
column "no tensor" it is None. Prints a table in Markdown.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WAYS = ("no tensor", "dray", "object store", "gloo")
SIZES = {"64 KiB": 64 << 10, "1 MiB": 1 << 20, "64 MiB": 64 << 20}


def measure(rounds: Sequence[int]) -> dict[str, dict[str, float]]:
    """Seconds by size and way; in the driver of a cluster.

    Args:
        rounds: how often each size of `SIZES` is sent.
    """
    import ray
    import torch
    from ray.experimental.collective import create_collective_group

    @ray.remote(enable_tensor_transport=True)
    class End:
        def prepare(self, nbytes: int) -> None:
            self.tensor = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)

        def nothing(self) -> None:
            return None

        def by_store(self) -> torch.Tensor:
            return self.tensor

        @ray.method(tensor_transport="dray")
        def by_dray(self) -> torch.Tensor:
            return self.tensor

        @ray.method(tensor_transport="gloo")
        def by_gloo(self) -> torch.Tensor:
            return self.tensor

        def receive(self, tensor: torch.Tensor | None) -> int:
            return 0 if tensor is None else int(tensor[::4096].sum())

    source, sink = End.remote(), End.remote()
    create_collective_group([source, sink], backend="gloo")
    methods: dict[str, Any] = dict(
        zip(WAYS, (source.nothing, source.by_dray, source.by_store, source.by_gloo), strict=True)
    )
    found: dict[str, dict[str, float]] = {}
    for (size, nbytes), count in zip(SIZES.items(), rounds, strict=True):
        ray.get(source.prepare.remote(nbytes))
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        sums = set()
        for index in range(count + 3):
            for way, method in methods.items():
                begun = time.perf_counter()
                total = ray.get(sink.receive.remote(method.remote()))
                if index >= 3:  # those before warm up memory and connections
                    seconds[way].append(time.perf_counter() - begun)
                if way != "no tensor":
                    sums.add(total)
        assert len(sums) == 1, "a way has delivered other bytes"
        found[size] = {way: statistics.median(each) for way, each in seconds.items()}
    return found


def main() -> None:
    from ray_cluster import Cluster

    parser = argparse.ArgumentParser(description="Latency of tensors between Ray actors, as a table.")
    parser.add_argument("--rounds", type=int, default=200, metavar="N", help="of the small sizes; default 200")
    rounds = parser.parse_args().rounds
    cluster = Cluster()
    try:
        found = cluster.run("latencies", rounds=[rounds, rounds, max(1, rounds // 5)], seconds=900)
    finally:
        cluster.close()
    print("| actor to actor, median |", " | ".join(WAYS), "|")
    print("|---|" + "---|" * len(WAYS))
    for size, medians in found.items():
        print(f"| {size} |", " | ".join(f"{medians[way] * 1000:.2f} ms" for way in WAYS), "|")


if __name__ == "__main__":
    here = Path(__file__).parent
    sys.path[:0] = [str(here), str(here.parents[1]), str(here.parents[2] / "src")]
    main()
