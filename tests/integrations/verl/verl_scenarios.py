"""Scenarios with verl's own workers and its `CheckpointEngineManager`, each in a Ray cluster of its own.

    python verl_scenarios.py SCENARIO ARGUMENTS

ARGUMENTS is JSON; the last line of the output is JSON as well: what the scenario has found. It runs where only
loopback can be reached; see `test_verl`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import ray
import torch
from verl.checkpoint_engine.base import CheckpointEngineManager, CheckpointEngineRegistry, CheckpointEngineWorker
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.utils.import_utils import import_external_libs
from verl.workers.config import CheckpointEngineConfig, RolloutConfig
from verl.workers.rollout import BaseRollout

MODULE = "dray.integrations.verl"
DTYPES = (torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int64, torch.bool)


def model(step: int, megabytes: int, changed: float = 1.0) -> dict[str, torch.Tensor]:
    """Weights of a step. A fraction of the elements differs from those of the step before."""
    make = torch.Generator().manual_seed(0 if changed < 1 else step)
    found = {}
    rows = max(1, megabytes << 20 >> 16)
    for layer in range(8):
        weight = torch.randn(rows, 4096, generator=make).to(torch.bfloat16)
        if changed < 1:
            chosen = torch.rand(rows, 4096, generator=torch.Generator().manual_seed(step)) < changed
            weight[chosen] = float(step)
        found[f"model.layers.{layer}.weight"] = weight
    for number, dtype in enumerate(DTYPES):
        found[f"model.odd.{number}"] = (torch.randn(3, 7, generator=make) * 10).to(dtype)
    return found | {"model.scalar": torch.tensor(float(step)), "model.empty": torch.empty(0, 4)}


def digest(name: str, tensor: torch.Tensor) -> str:
    """Of name, dtype, shape and every byte of a tensor."""
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(
        f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + content.tobytes()
    ).hexdigest()


def digests(weights: dict[str, torch.Tensor]) -> list[str]:
    return [digest(name, tensor) for name, tensor in weights.items()]


class Actor(Worker):
    """The part of verl's actor that has to do with its checkpoint engine."""

    def __init__(self, config: CheckpointEngineConfig, megabytes: int, changed: float) -> None:
        super().__init__()
        import_external_libs(config.custom_backend_module or None)
        self.megabytes, self.changed = megabytes, changed
        self.drained = 0
        self.engine = CheckpointEngineRegistry.new(
            config.backend, is_master=self.rank == 0, bucket_size=config.update_weights_bucket_megabytes << 20,
            **config.engine_kwargs.get(config.backend, {}),
        )  # fmt: skip

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    async def update_weights(self, global_steps: int | None = None, mode: str = "auto") -> dict[str, Any]:
        self.drained = 0

        def gathered() -> Any:
            scratch = None
            for name, tensor in model(global_steps or 0, self.megabytes, self.changed).items():
                if scratch is not None:
                    scratch.zero_()  # as a buffer in which tensors are gathered, one after the other
                scratch = tensor.clone()
                self.drained += 1
                yield name, scratch

        began = time.perf_counter()
        found = await self.engine.send_weights(gathered(), global_steps=global_steps)
        if self.rank == 0:
            found |= {"seconds": time.perf_counter() - began}
        return {**found, f"drained/{self.rank}": self.drained}

    @register(dispatch_mode=Dispatch.DP_COMPUTE, blocking=False)
    def execute_checkpoint_engine(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.engine, method)(*args, **kwargs)


class Server(BaseRollout):
    """In the place of an inference engine: it keeps digests."""

    replica_rank, is_leader_rank = 0, True

    def __init__(self) -> None:
        self.found: list[str] = []

    async def resume(self, tags: list[str]) -> None: ...

    async def release(self) -> None: ...

    async def update_weights(self, weights: Any, **about: Any) -> None:
        self.found = [digest(name, tensor) async for name, tensor in weights]


class RolloutWorker(CheckpointEngineWorker):
    """verl's worker; the test asks it what its server has got."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def state(self) -> dict[str, Any]:
        maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "/memfd:dray" in line]
        shared = sorted({inode for _, _, _, _, inode, *_ in maps})
        return {"found": self.server_adapter.found, "shared": shared}

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    async def cached(self) -> list[str]:
        """What the engine has in its cache."""
        return [digest(name, tensor) async for name, tensor in self.checkpoint_engine.get_weights()]


class Replica:
    """In the place of a replica of an inference engine, whose server has nothing to pause."""

    def __init__(self, workers: list[Any]) -> None:
        self.workers = workers

    async def nothing(self, **about: Any) -> None: ...

    abort_all_requests = release_kv_cache = resume_kv_cache = resume_generation = sleep = wake_up = nothing


class Job:
    """Actors and rollouts, as verl starts them.

    Args:
        engine: ``engine_kwargs.dray``.
        plugin: dray is known by its entry point; otherwise by `custom_backend_module`.
        rollouts: how many replicas, of one worker each.
        elsewhere: rollout workers have another folder of streams, so that they are on another host for dray.
        settings: of verl's checkpoint engine; by default the least that selects dray.
    """

    def __init__(
        self, engine: dict[str, Any], *, plugin: bool = False, actors: int = 2, rollouts: int = 2,
        megabytes: int = 1, bucket_megabytes: int = 1, changed: float = 1.0, elsewhere: str = "",
        settings: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.megabytes, self.changed = megabytes, changed
        if settings is None:
            settings = {"backend": "dray", "custom_backend_module": None if plugin else MODULE}
        self.config = CheckpointEngineConfig(
            update_weights_bucket_megabytes=bucket_megabytes, engine_kwargs={"dray": engine}, **settings
        )
        self.actors = group(actors, {}, Actor, self.config, megabytes, changed)
        rollout = RolloutConfig(name="stand-in", checkpoint_engine=self.config)
        environment = {"DRAY_RUNTIME_DIR": elsewhere} if elsewhere else {}
        self.groups = [group(1, environment, RolloutWorker, rollout, None, Server()) for _ in range(rollouts)]
        self.replicas = [Replica(each.workers) for each in self.groups]
        self.manager = CheckpointEngineManager(self.config, self.actors, list(self.replicas))

    def update(self, step: int) -> dict[str, Any]:
        return asyncio.run(self.manager.update_weights.__wrapped__(self.manager, global_steps=step))

    def right(self, step: int) -> list[bool]:
        """Which rollout workers have every byte of a step."""
        expected = digests(model(step, self.megabytes, self.changed))
        return [each.state()[0]["found"] == expected for each in self.groups if each.workers]


def group(count: int, environment: dict[str, str], cls: type, *arguments: Any) -> RayWorkerGroup:
    pool = RayResourcePool([count], use_gpu=False, max_colocate_count=1)
    made = RayClassWithInitArgs(ray.remote(cls), *arguments)
    return RayWorkerGroup(pool, made, device_name="cpu", worker_env=environment)


# --- scenarios --------------------------------------------------------------------------------------------------


def updates(steps: int, **job: Any) -> dict[str, Any]:
    """Several updates; which rollout workers have the right bytes after each, and what the actor reports."""
    made = Job(**job)
    found = []
    for step in range(1, steps + 1):
        metrics = made.update(step)
        found.append({"right": made.right(step), "metrics": metrics})
    states = [each.state()[0] for each in made.groups]
    expected = digests(model(steps, made.megabytes, made.changed))
    cached = [each.cached()[0] == expected for each in made.groups]
    return {"updates": found, "cached": cached, "shared": [state["shared"] for state in states]}


def killed(**job: Any) -> dict[str, Any]:
    """A rollout worker is killed between updates; then it is removed, and another replica is added."""
    made = Job(**job)
    made.update(1)
    ray.kill(made.groups[0].workers[0])
    began = time.perf_counter()
    try:
        made.update(2)
        error = ""
    except ray.exceptions.RayError as caught:
        error = f"{type(caught).__name__}: {caught}"
    seconds = time.perf_counter() - began
    made.manager.remove_replicas(made.replicas[:1])
    del made.groups[0]
    after = []
    for step in (3, 4, 5):
        made.update(step)
        after.append(made.right(step))
    return {"error": error, "seconds": seconds, "after": after}


def missing(**job: Any) -> dict[str, Any]:
    """A rollout worker waits for weights that the actor does not send, and for those of another step."""
    made = Job(**job)
    made.update(1)
    worker = made.groups[0]
    found = {}
    for name, step in (("absent", 2), ("unsent", None)):
        began = time.perf_counter()
        try:
            if name == "unsent":
                made.manager.build_process_group(made.groups[0])
            ray.get(worker.update_weights(global_steps=step))
            error = ""
        except ray.exceptions.RayTaskError as caught:
            error = f"{type(caught.cause).__name__}: {caught.cause}"
        found[name] = {"error": error, "seconds": time.perf_counter() - began}
    return found


# --- samples ----------------------------------------------------------------------------------------------------

GROUP, VOCABULARY = 2, 1000
"""Trajectories of each prompt; tokens are below the second."""


def trajectory(uid: str, session: int, tokens: int) -> dict[str, Any]:
    """What a rollout of verl stores of one trajectory, in the same form: ragged, dense and other values."""
    make = torch.Generator().manual_seed(int(uid) * GROUP + session)
    prompt, response = (tokens + int(torch.randint(1, 9, (), generator=make)) for _ in range(2))
    found = {"prompts": prompt, "responses": response, "input_ids": prompt + response}
    ids: dict[str, Any] = {
        name: torch.randint(VOCABULARY, (size,), generator=make) for name, size in found.items()
    }
    return ids | {
        "response_mask": torch.ones(response, dtype=torch.int64),
        "rm_scores": torch.randn(response, generator=make),
        "raw_prompt": [{"role": "user", "content": f"prompt {uid}, µ"}],
        "extra_fields": {"uid": uid, "session": session, "min_global_steps": 1},
    }


class Rollouts(Worker):
    """The part of verl's `AgentLoopWorkerTQ` that has to do with TransferQueue."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def generate(self, uids: list[str], step: int, tokens: int) -> None:
        import transfer_queue as tq
        from verl.utils.tensordict_utils import list_of_dict_to_tensordict

        tq.init()
        for uid in uids[self.rank :: self.world_size]:
            tq.kv_put(key=uid, partition_id="train", tag={"status": "running"})
            fields = [trajectory(uid, session, tokens) for session in range(GROUP)]
            sizes = [each["input_ids"].numel() for each in fields]
            tags = [{"status": "success", "seq_len": size, "global_steps": step} for size in sizes]
            keys = [f"{uid}_{session}" for session in range(GROUP)]
            tq.kv_batch_put(keys=keys, partition_id="train", fields=list_of_dict_to_tensordict(fields), tags=tags)
            tq.kv_put(key=uid, partition_id="train", tag={"status": "finished"})


class Trainer(Worker):
    """A worker of the actor: verl gives it the samples behind a `KVBatchMeta`, and stores what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self._register_dispatch_collect_info("actor", dp_rank=self.rank, is_collect=True)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn("actor"))
    def compute_log_prob(self, batch: Any) -> Any:
        from verl.utils.tensordict_utils import get_tensordict

        return get_tensordict({"log_probs": log_probs(batch["responses"]), "entropy": batch["rm_scores"] * 2})


def log_probs(responses: Any) -> Any:
    """In the place of a model."""
    return torch.nested.as_nested_tensor([row / -VOCABULARY for row in responses.unbind()], layout=torch.jagged)


def equal(found: Any, expected: Any) -> bool:
    """Values of one field of one sample."""
    found = getattr(found, "data", found) if not isinstance(found, torch.Tensor) else found
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    return bool(found == expected)


def samples(steps: int, prompts: int, tokens: int, overrides: list[str]) -> dict[str, Any]:
    """Steps of verl's trainer, with its replay buffer, bridge and dispatch, and no model; all values are compared.

    Args:
        overrides: of verl's configuration.
    """
    import transfer_queue as tq
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides)
    tq.init(config.transfer_queue)
    rollouts, trainers = group(2, {}, Rollouts), group(2, {}, Trainer)
    buffer = ReplayBuffer(
        trainer_mode="sync", trainer_config=OmegaConf.create({}), max_off_policy_threshold=None,
        max_off_policy_strategy="drop", sampler_kwargs=OmegaConf.create({}), poll_interval=0.05,
    )  # fmt: skip
    wrong, compared, stored = [], 0, 0
    for step in range(1, steps + 1):
        uids = [str(step * prompts + each) for each in range(prompts)]
        pending = [{"is_prompt": True, "status": "pending", "global_steps": step} for _ in uids]
        tq.kv_batch_put(keys=uids, partition_id="train", tags=pending)
        rollouts.generate(uids, step, tokens)
        batch, _ = buffer.sample(global_steps=step, partition_id="train", batch_size=prompts)
        batch.reorder(list(reversed(range(len(batch.keys)))))
        returned = trainers.compute_log_prob(batch)
        assert len(returned) == len(batch.keys) == prompts * GROUP
        data = tq.kv_batch_get(keys=batch.keys, partition_id="train")
        for row, key in enumerate(batch.keys):
            uid, _, session = key.partition("_")
            expected = trajectory(uid, int(session), tokens)
            expected["log_probs"] = expected["responses"] / -VOCABULARY
            expected["entropy"] = expected["rm_scores"] * 2
            stored += sum(each.nbytes for each in expected.values() if isinstance(each, torch.Tensor))
            for name, value in expected.items():
                compared += 1
                if not equal(list(data[name])[row], value):
                    wrong.append(f"{key} {name}")
        tq.kv_clear(keys=batch.keys, partition_id="train")
    left = tq.kv_list() or {}
    tq.close()
    return {"wrong": wrong, "compared": compared, "stored": stored, "left": sum(map(len, left.values()))}


STARTS = 3
"""Ray gives its processes 30 s to start, which a busy machine can exceed."""


def start_ray() -> None:
    for left in reversed(range(STARTS)):
        try:
            ray.init(
                address="local", _node_ip_address="127.0.0.1", include_dashboard=False, num_cpus=16,
                object_store_memory=128 << 20, log_to_driver=False,
            )  # fmt: skip
            return
        except Exception as error:  # of no type of its own
            ray.shutdown()
            if not left or "timed out during startup" not in str(error):
                raise


def main() -> None:
    scenario, arguments = sys.argv[1:]
    start_ray()
    try:
        print(json.dumps(globals()[scenario](**json.loads(arguments))))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    # Workers import this module by its name; what they are sent must not name `__main__`.
    import verl_scenarios

    verl_scenarios.main()
