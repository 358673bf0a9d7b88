"""The transport behind cosmos-rl's own registry, strategy and prefetch: selected, attached, used and closed."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cosmos_package import Rollout, TensorPacker, config
from cosmos_rl.utils.payload_transport import (
    PayloadTransportRegistry,
    PrefetchDataPackerMixin,
    get_payload_transfer_mode,
    is_payload_transfer_mode_explicit,
    validate_single_receiver_topology,
)
from waiting import wait_until

from dray.errors import BufferClosedError, ConfigError, DrayError
from dray.integrations.cosmos_rl import DrayTransport, publish, transport

pytestmark = pytest.mark.integration


class Prefetching(PrefetchDataPackerMixin, TensorPacker):  # type: ignore[misc]
    pass


@pytest.fixture
def attached() -> Iterator[Any]:
    """Attaches packers to the transport; what they hold goes with the test."""
    packers: list[Any] = []

    def attach(packer: Any, job: Any, **more: Any) -> Any:
        transport.attach_data_packer(packer, config=job, **more)
        packers.append(packer)
        return packer

    yield attach
    transport.close_producer(object(), timeout=0)
    for packer in packers:
        transport.close_data_packer(packer)
    transport.close()


def trajectory(value: float) -> dict[str, Any]:
    return {"observations": np.full((4, 2), value, np.float32), "rewards": torch.full((4,), value)}


def completions(packer: Any, *values: float) -> list[Any]:
    found, conversations, logprobs, ids, more = packer.get_rollout_output(
        [trajectory(value) for value in values], ["c"], ["l"], ["i"], extra=1
    )
    assert (conversations, logprobs, ids, more) == (["c"], ["l"], ["i"], {"extra": 1})
    return list(found)


def free_slots() -> int:
    return transport.producer_statistics().ring.free


def test_the_configuration_alone_selects_it() -> None:
    job = config()
    assert get_payload_transfer_mode(job) == "dray"
    assert is_payload_transfer_mode_explicit(job)
    assert PayloadTransportRegistry.get("dray") is transport
    for sizes in ({"tp": 2}, {"cp": 4}, {"pp": 2}):
        validate_single_receiver_topology(config(**sizes), "dray")


def test_a_packer_without_prefetch_gets_payloads_and_everything_else_untouched(attached: Any) -> None:
    packer = attached(TensorPacker(), config())
    (completion,) = completions(packer, 3.0)
    assert PayloadTransportRegistry.active_for_completion(completion) is transport
    payload = packer.get_policy_input("sample", completion, n_ignore_prefix_tokens=2)
    assert torch.equal(payload["rewards"], torch.full((4,), 3.0))
    for other in ("text", {"reward": 1.0}, None):
        assert packer.get_policy_input(rollout_output=other) is other
    assert packer.get_policy_input(rollout_output=completion) is None  # it is consumed
    texts = ["a text", ""]
    assert packer.get_rollout_output(texts, None, None, None)[0] == texts


def test_a_packer_with_prefetch_gets_batches_ahead_and_the_rest_at_once(attached: Any) -> None:
    packer = attached(Prefetching(), config(output="numpy"))
    batch = [Rollout(each) for each in completions(packer, *map(float, range(6)))]
    late = Rollout({"completion": completions(packer, 9.0)[0], "reward": 1.0})
    packer.start_prefetch([*batch, Rollout("text")])
    packer.wait_prefetch()
    for value, rollout in enumerate(batch):
        for _ in range(2):
            assert packer.get_policy_input(rollout_output=rollout.completion)["rewards"].tolist() == [value] * 4
    assert packer.get_policy_input(rollout_output=late.completion)["rewards"].tolist() == [9.0] * 4
    wait_until(lambda: free_slots() == 256, "all slots to be free")


def test_an_episode_whose_reference_is_broken_or_gone_is_skipped_and_the_others_are_not(attached: Any) -> None:
    packer = attached(Prefetching(), config())
    gone, good = completions(packer, 1.0, 2.0)
    assert packer.get_policy_input(rollout_output=gone) is not None
    batch = [gone, good, "dray:0:abc"]
    packer.start_prefetch(batch)
    packer.wait_prefetch()
    assert [packer.get_policy_input(rollout_output=each) is None for each in batch] == [True, False, True]


def test_discarded_rollouts_are_freed_for_every_rank(attached: Any) -> None:
    job = config(slots=4, tp=2)
    packer = attached(TensorPacker(), job)
    rollouts = [Rollout(each) for each in completions(packer, 1.0, 2.0, 3.0, 4.0)]
    rollouts += [Rollout("text"), Rollout("dray:broken")]
    kept = rollouts[:1]
    assert PayloadTransportRegistry.handle_discarded(rollouts, kept, config=job, redis_client=None) == 3
    wait_until(lambda: free_slots() == 3, "discards to be freed")
    assert packer.get_policy_input(rollout_output=kept[0].completion) is not None


def test_every_rank_of_a_group_gets_every_trajectory(attached: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job = config(slots=4, tp=2, pp=2)
    rollout_worker = attached(TensorPacker(), job)
    batch = completions(rollout_worker, 1.0, 2.0)
    monkeypatch.setenv("COSMOS_ROLE", "Policy")
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank in range(4):
        assert free_slots() == 2
        monkeypatch.setenv("RANK", str(rank))
        packer = attached(Prefetching(), job)
        packer.start_prefetch(batch)
        packer.wait_prefetch()
        assert [packer.get_policy_input(rollout_output=each)["rewards"][0] for each in batch] == [1.0, 2.0]
    wait_until(lambda: free_slots() == 4, "the last rank's reads")


def test_a_rollout_engine_may_publish_itself_once_a_packer_is_attached(attached: Any) -> None:
    with pytest.raises(BufferClosedError, match="attached"):
        publish({"rewards": [1.0]})
    packer = attached(TensorPacker(), config())
    completion = publish({"rewards": np.ones(2)})
    assert packer.get_policy_input(rollout_output=completion)["rewards"].tolist() == [1.0, 1.0]


def test_both_hooks_end_what_they_belong_to_and_leave_the_packer_as_it_was(
    caplog: pytest.LogCaptureFixture,
) -> None:
    packer, prefetching = TensorPacker(), Prefetching()
    before = dict(vars(packer))
    for each in (packer, prefetching):
        transport.attach_data_packer(each, config=config())
    with pytest.raises(DrayError, match="attached already"):
        transport.attach_data_packer(packer, config=config())
    (completion,) = completions(packer, 1.0)
    transport.close_producer(object(), timeout=0.05)
    transport.close_producer(object())
    assert "1 unread trajectories are lost" in caplog.text
    with pytest.raises(BufferClosedError):
        completions(packer, 1.0)
    for each in (packer, prefetching):
        transport.close_data_packer(each, timeout=5.0)
    transport.close_data_packer(packer)
    assert vars(packer) == before
    assert packer.get_policy_input(rollout_output=completion) == completion
    with pytest.raises(RuntimeError, match="closed"):
        prefetching.get_policy_input(rollout_output=completion)


def test_a_wrong_setting_ends_the_worker_when_its_packer_is_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="dray_slot"):
        DrayTransport().attach_data_packer(TensorPacker(), config=config(slot=4))
    with pytest.raises(ConfigError, match="dray_output"):
        DrayTransport().attach_data_packer(TensorPacker(), config=config(output="nowhere"))
    monkeypatch.setenv("COSMOS_ROLE", "Rollout")
    with pytest.raises(ConfigError, match="loopback"):
        DrayTransport().attach_data_packer(TensorPacker(), config=config(lane="tcp", host="0.0.0.0"))


WITHOUT_UCXX = """
import sys
sys.modules["ucxx"] = None
from cosmos_package import TensorPacker, config
from dray.integrations.cosmos_rl import transport
for lane in ("auto", "ucx", ["shm", "ucx"]):
    for caught in (ImportError, RuntimeError):
        try:
            transport.attach_data_packer(TensorPacker(), config=config(lane=lane))
        except caught as error:
            assert "pip install 'dray-rl[ucxx]'" in str(error), error
        else:
            raise SystemExit(f"attached with lane {lane}")
packer = TensorPacker()
transport.attach_data_packer(packer, config=config())
transport.close_data_packer(packer)
"""


def test_without_ucxx_a_job_that_needs_it_ends_with_an_import_error_and_another_runs() -> None:
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT_UCXX], capture_output=True, text=True, timeout=100, check=False,
        cwd=__file__.rpartition("/")[0],
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
