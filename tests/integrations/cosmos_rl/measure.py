"""How fast trajectories travel through cosmos-rl's packers with dray: `python measure.py [MIB [COUNT]]`.

A rollout worker in a process of its own publishes COUNT trajectories of MIB MiB; a policy worker prefetches them
in batches of 16. Printed are the best of three rounds, for each lane.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from cosmos_package import TensorPacker, config
from cosmos_rl.utils.payload_transport import PrefetchDataPackerMixin

from dray.integrations.cosmos_rl import transport

BATCH, ROUNDS = 16, 3


class Packer(PrefetchDataPackerMixin, TensorPacker):  # type: ignore[misc]
    pass


def produce(lane: str, mib: int, count: int) -> None:
    packer = TensorPacker()
    transport.attach_data_packer(packer, config=config(lane=lane, slots=count, slot_bytes=(mib + 1) << 20))
    trajectory = {"observations": np.ones((mib << 8, 1024), np.float32), "rewards": np.ones(mib << 8, np.float32)}
    for _ in sys.stdin:
        started = time.perf_counter()
        completions, *_ = packer.get_rollout_output([trajectory] * count, None, None, None)
        print(json.dumps([time.perf_counter() - started, completions]), flush=True)


def measure(lane: str, mib: int, count: int) -> None:
    command = [sys.executable, __file__, "produce", lane, str(mib), str(count)]
    packer = Packer()
    transport.attach_data_packer(packer, config=config(lane=lane))
    with subprocess.Popen(
        command, cwd=Path(__file__).parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        puts, gets = [], []
        for _ in range(ROUNDS):
            print("go", file=child.stdin, flush=True)
            put, completions = json.loads(child.stdout.readline())
            started = time.perf_counter()
            for first in range(0, count, BATCH):
                batch = completions[first : first + BATCH]
                packer.start_prefetch(batch)
                packer.wait_prefetch()
                assert all(packer.get_policy_input(rollout_output=each) is not None for each in batch)
            puts.append(put / count)
            gets.append((time.perf_counter() - started) / count)
        child.stdin.close()
    transport.close_data_packer(packer)
    rate = mib / 1024 / min(gets)
    print(f"{lane}: put {1e3 * min(puts):.2f} ms, get {1e3 * min(gets):.2f} ms a trajectory ({rate:.2f} GiB/s)")


if __name__ == "__main__":
    if sys.argv[1:2] == ["produce"]:
        produce(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        size, number = (int(each) for each in (*sys.argv[1:], *("1", "64")[len(sys.argv) - 1 :]))
        for name in ("shm", "ucx", "tcp"):
            measure(name, size, number)
