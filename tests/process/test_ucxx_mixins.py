"""Rollout workers and a data packer in processes of their own, which exchange completions only."""

import contextlib
import json
from collections.abc import Iterator
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
from transport_fixtures import Child
from waiting import wait_until

from dray.ucxx import CompletionReaderStatistics, UCXXDataPackerMixin

ROLLOUT = """
from dray.ucxx import UCXXRolloutMixin

class Rollout(UCXXRolloutMixin):
    def episode(self, number):
        steps = 1 + number % 5
        observations = np.full((steps, 8), number, np.float64)
        if arguments["torch"]:
            import torch
            observations = torch.from_numpy(observations)
        return self.write_to_buffer({"observations": observations, "rewards": [float(number)] * steps})

rollout = Rollout()
settings = {"lane": arguments["lanes"], "slots": arguments["slots"], "slot_bytes": 1 << 16}
rollout.setup_ucxx({**settings, "secret": bytes.fromhex(arguments["secret"])})
send("serving")
while (wanted := receive()) is not None:
    if wanted == "free":
        send(rollout.ucxx_buffer.ring.statistics().free)
    elif wanted == "end":
        send(rollout.cleanup_ucxx(drain=20))
    else:
        send([rollout.episode(number) for number in wanted])
"""
SECRET = bytes(range(32))
LANE_SETS = [(("ucx",), "ucx"), (("shm", "ucx"), "auto"), (("tcp",), "tcp")]


class DataPacker:
    def get_policy_input(self, sample: int, rollout_output: Any) -> tuple[int, int, float]:
        assert rollout_output["observations"].shape == (1 + sample % 5, 8)
        assert (rollout_output["observations"] == sample).all()
        return sample, int(rollout_output["episode_length"]), float(rollout_output["rewards"].sum())


class Packer(UCXXDataPackerMixin, DataPacker):
    pass


@contextlib.contextmanager
def packing(lane: str, **config: Any) -> Iterator[Packer]:
    packer = Packer()
    packer.setup_ucxx_reader(config, lane=lane, secret=SECRET)  # type: ignore[arg-type]
    try:
        yield packer
    finally:
        packer.cleanup_ucxx_reader()


def rollout(lanes: tuple[str, ...], slots: int = 32, torch: bool = False) -> Child:
    return Child(ROLLOUT, lanes=lanes, slots=slots, secret=SECRET.hex(), torch=torch)


def counted(packer: Packer) -> CompletionReaderStatistics:
    assert packer.ucxx_reader is not None
    return packer.ucxx_reader.statistics()


@pytest.mark.parametrize(("lanes", "lane"), LANE_SETS)
def test_episodes_of_two_rollout_workers_reach_the_packer_double_buffered(
    lanes: tuple[str, ...], lane: str
) -> None:
    with rollout(lanes) as first, rollout(lanes, torch=lane == "auto") as second, packing(lane) as packer:
        workers = (first, second)
        for worker in workers:
            assert worker.receive(60) == "serving"

        def batch(step: int) -> list[tuple[int, Any]]:
            numbers = [[step * 20 + 2 * n + offset for n in range(10)] for offset in range(2)]
            written = [worker.ask(wanted) for worker, wanted in zip(workers, numbers, strict=True)]
            return list(zip(chain(*numbers), chain(*written), strict=True))

        upcoming = batch(0)
        assert packer.start_prefetch([completion for _, completion in upcoming])
        for step in range(1, 6):
            current, upcoming = upcoming, batch(step)
            assert packer.defer_prefetch([completion for _, completion in upcoming])
            assert packer.wait_prefetch()
            assert packer.collect_prefetch() == 20
            for number, completion in current:
                steps = 1 + number % 5
                assert packer.get_policy_input(number, completion) == (number, steps, number * steps)
        for number, completion in upcoming:
            assert packer.get_policy_input(number, completion) is not None
        statistics = counted(packer)
        assert (statistics.prefetched, statistics.read_at_once, statistics.skipped) == (120, 0, 0)
        for worker in workers:
            assert worker.ask("end") == 0, "every payload was read and freed"


@pytest.mark.parametrize(("lanes", "lane"), LANE_SETS)
def test_r13_episodes_of_a_killed_rollout_worker_are_skipped_and_the_others_are_not(
    lanes: tuple[str, ...], lane: str
) -> None:
    with rollout(lanes) as killed, rollout(lanes) as alive, packing(lane, ucxx_prefetch_timeout=20) as packer:
        for worker in (killed, alive):
            assert worker.receive(60) == "serving"
        lost, good = killed.ask([1, 2, 3]), alive.ask([4, 5, 6])
        killed.kill()
        assert packer.start_prefetch([*lost, *good])
        assert packer.wait_prefetch()
        assert packer.collect_prefetch() == 3
        assert [packer.get_policy_input(0, completion) for completion in lost] == [None] * 3
        assert [packer.get_policy_input(n, each)[0] for n, each in zip((4, 5, 6), good, strict=True)] == [4, 5, 6]  # type: ignore[index]
        assert counted(packer).skipped_lost == 3
        wait_until(lambda: alive.ask("free") == 32, "the slots to be free again")


@pytest.mark.parametrize(
    ("slow", "timeout", "prefetched"),
    [(False, None, True), (False, 0, None), (True, None, False), (True, 0, False)],
    ids=["healthy", "healthy, not waited for", "slow", "slow, not waited for"],
)
def test_no_episode_is_lost_when_a_batch_is_collected_without_a_wait_before(
    slow: bool, timeout: float | None, prefetched: bool | None
) -> None:
    """Callers of earlier transports of this kind make the calls in this order."""
    with rollout(("tcp",)) as worker, packing("tcp", ucxx_prefetch_timeout=2.0 if slow else 60.0) as packer:
        assert worker.receive(60) == "serving"
        outputs = [SimpleNamespace(completion=each) for each in worker.ask(list(range(16)))]
        if slow:
            worker.stop()
        assert packer.start_prefetch(outputs)
        collected = packer.collect_prefetch() if timeout is None else packer.collect_prefetch(timeout)
        if slow:
            worker.resume()
        assert worker.ask("free") >= 16, "what was collected is freed, and nothing else"
        for number, output in enumerate(outputs):
            found = packer.get_policy_input(sample=number, rollout_output=output)
            assert found == (number, 1 + number % 5, number * (1 + number % 5))
        statistics = counted(packer)
        assert (statistics.prefetched, statistics.read_at_once) == (collected, 16 - collected)
        assert statistics.skipped == 0
        if prefetched is not None:
            assert collected == (16 if prefetched else 0)
        assert worker.ask("end") == 0, "every payload was read and freed"


def test_a_small_buffer_goes_round_many_times_while_the_packer_reads_behind_it() -> None:
    with rollout(("ucx",), slots=4) as worker, packing("ucx") as packer:
        assert worker.receive(60) == "serving"
        for number in range(0, 60, 2):
            written = worker.ask([number, number + 1])
            assert packer.start_prefetch(json.loads(json.dumps(written)))
            for offset, completion in enumerate(written):
                found = packer.get_policy_input(number + offset, completion)
                assert found is not None
                assert found[0] == number + offset
        assert counted(packer).prefetched == 60
        assert worker.ask("end") == 0
