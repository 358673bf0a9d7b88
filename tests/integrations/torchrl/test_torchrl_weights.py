"""TorchRL's own collectors with dray's weight-sync backend: what docs/how-to/torchrl.md promises."""

import os
import signal
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from optional import require

require("torch", "torchrl", "tensordict")

with warnings.catch_warnings():  # of torchrl and torch about their own use of other packages
    warnings.simplefilter("ignore")
    import torch
    from policies import Pendulum, constant_policy
    from tensordict import TensorDict
    from torchrl.collectors import MultiAsyncCollector, MultiSyncCollector
    from torchrl.weight_update.weight_sync_schemes import WeightSyncScheme

    import dray.integrations.torchrl  # noqa: F401

from dray.errors import BufferClosedError, ConfigError, StreamError, StreamTimeout  # noqa: E402

SECONDS = 60.0
pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore"),
]

Made = tuple[Any, Any, Any]


@pytest.fixture(params=["tensordict", "state_dict"])
def collecting(request: pytest.FixtureRequest) -> Iterator[Made]:
    """A policy, its scheme, and a collector with two workers."""
    policy = constant_policy()
    with WeightSyncScheme.from_backend("dray", strategy=request.param, timeout=SECONDS) as scheme:
        collector = MultiSyncCollector(
            [Pendulum] * 2, policy, frames_per_batch=20, total_frames=-1, weight_sync_schemes={"policy": scheme}
        )
        yield policy, scheme, collector
        collector.shutdown()


def set_weights(policy: Any, value: float) -> None:
    with torch.no_grad():
        policy.module.value.fill_(value)


def actions(batch: TensorDict) -> list[list[float]]:
    """The different actions of each worker."""
    return [[round(each, 4) for each in row["action"].unique().tolist()] for row in batch]


def test_weights_arrive_in_every_worker_and_act(collecting: Made) -> None:
    policy, scheme, collector = collecting
    batches = iter(collector)
    assert actions(next(batches)) == [[0.0], [0.0]], "the weights that the policy had at the start"
    for step in (1, 2, 3):
        set_weights(policy, step / 8)
        collector.update_policy_weights_()
        assert actions(next(batches)) == [[step / 8]] * 2

    set_weights(policy, 0.75)
    collector.update_policy_weights_(worker_ids=1)
    assert actions(next(batches)) == [[0.375], [0.75]], "for one worker alone"
    collector.update_policy_weights_()
    assert actions(next(batches)) == [[0.75], [0.75]]

    scheme.send(constant_policy(0.5))
    assert actions(next(batches)) == [[0.5], [0.5]], "weights that are no module of the collector"
    with pytest.raises(ConfigError, match="workers from 0 to 1"):
        scheme.send(worker_ids=[2])
    with pytest.raises(StreamError, match=r"worker \d cannot apply version \d+: .*Error"):
        scheme.send(TensorDict({"module": {"value": torch.zeros(7, 7, 7)}}))
    set_weights(policy, 0.25)
    collector.update_policy_weights_()
    assert actions(next(batches)) == [[0.25], [0.25]], "weights that fit, after some that do not"

    scheme.shutdown()
    scheme.shutdown()
    with pytest.raises(BufferClosedError):
        scheme.send()


def test_without_sync_the_newest_weights_arrive_while_workers_collect() -> None:
    policy = constant_policy()
    with WeightSyncScheme.from_backend("dray", sync=False, timeout=SECONDS) as scheme:
        collector = MultiAsyncCollector(
            [Pendulum] * 2, policy, frames_per_batch=10, total_frames=-1, weight_sync_schemes={"policy": scheme}
        )
        try:
            for step in range(1, 51):
                set_weights(policy, step / 64)
                scheme.send()
            scheme.wait()
            batches = iter(collector)
            assert any(0.7812 in row for _ in range(20) for row in [_actions_of(next(batches))])
        finally:
            collector.shutdown()


def _actions_of(batch: TensorDict) -> list[float]:
    return [round(each, 4) for each in batch["action"].unique().tolist()]


def test_a_killed_worker_is_named_in_time() -> None:
    policy = constant_policy()
    with WeightSyncScheme.from_backend("dray", timeout=15.0) as scheme:
        collector = MultiSyncCollector(
            [Pendulum] * 2, policy, frames_per_batch=20, total_frames=-1, weight_sync_schemes={"policy": scheme}
        )
        try:
            next(iter(collector))
            collector.update_policy_weights_()
            os.kill(collector.procs[1].pid, signal.SIGKILL)
            began = time.monotonic()
            with pytest.raises(StreamTimeout, match="is not applied by worker 1"):
                collector.update_policy_weights_()
            assert time.monotonic() - began < SECONDS
        finally:
            collector.shutdown()
