"""A rollout worker of cosmos-rl in a process of its own: `python rollout_process.py PORT LANE COUNT SLOTS`.

It publishes the completions of COUNT trajectories on the stream of policy-0, and then waits for a line on stdin.
"""

import json
import sys

import msgpack
import numpy as np
import torch
from cosmos_package import TensorPacker, config
from cosmos_rl.utils.payload_transport import PayloadTransportRegistry, get_payload_transfer_mode
from cosmos_rl.utils.redis_stream import RedisStreamHandler

import dray.integrations.cosmos_rl


def main(port: int, lane: str, count: int, slots: int) -> None:
    job = config(lane=lane, slots=slots, slot_bytes=1 << 20, write_timeout=60)
    handler = RedisStreamHandler(["127.0.0.1"], port)
    transport = PayloadTransportRegistry.get(get_payload_transfer_mode(job))
    assert transport is dray.integrations.cosmos_rl.transport
    packer = TensorPacker()
    transport.attach_data_packer(packer, config=job)
    for number in range(count):
        steps = number % 7 + 1
        trajectory = {
            "observations": np.full((16, 4), number, np.float32),
            "rewards": torch.full((16,), float(number), dtype=torch.bfloat16),
            "episode_length": np.array([steps], np.int64),
        }
        (completion,), *_ = packer.get_rollout_output([trajectory], [None], [None], [None])
        handler.publish_rollout(msgpack.packb({"completion": completion, "prompt_idx": number}), "policy-0")
    print("published", flush=True)
    sys.stdin.readline()
    ring = transport.producer_statistics().ring
    transport.close_producer(object(), timeout=5.0)
    transport.close_data_packer(packer, timeout=5.0)
    print(json.dumps({"committed": ring.committed, "free": ring.free, "consumed": ring.consumed}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
