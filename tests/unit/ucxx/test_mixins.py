"""The mixins: names that frameworks know; each call goes to an object behind the mixin."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from waiting import wait_until

import dray.ucxx
from dray.errors import BufferClosedError, ConfigError, DrayError, StaleSlotError
from dray.payload import Arrays
from dray.prefetch import Fetched
from dray.protocol import PayloadRef
from dray.ucxx import (
    UCXXBufferConfig,
    UCXXConfig,
    UCXXDataPackerMixin,
    UCXXRolloutMixin,
    completion_for,
    is_completion,
    reference_of,
)


class Rollout(UCXXRolloutMixin):
    pass


class DataPacker:
    """As a framework has it."""

    def get_policy_input(self, sample: Any, rollout_output: Any, n_ignore_prefix_tokens: int = 0) -> Any:
        return sample, rollout_output, n_ignore_prefix_tokens


class Packer(UCXXDataPackerMixin, DataPacker):
    def read_one(self, ref: PayloadRef) -> Arrays:
        return self._read_one(ref)

    def fetch_all(self, refs: list[PayloadRef], timeout: float) -> list[Fetched]:
        return self._ucxx_dp_fetch_all(refs, timeout=timeout)


@pytest.fixture
def rollout() -> Iterator[Rollout]:
    rollout = Rollout()
    rollout.setup_ucxx({"lane": ["shm"], "slots": 8, "n_server_threads": 1})
    yield rollout
    rollout.cleanup_ucxx()


@pytest.fixture
def packer() -> Iterator[Packer]:
    packer = Packer()
    packer.setup_ucxx_reader({"ucxx_prefetch_timeout": 20}, lane="shm")
    yield packer
    assert packer.cleanup_ucxx_reader()


def test_the_packer_behind_the_mixin_gets_the_arrays(rollout: Rollout, packer: Packer) -> None:
    completion = json.loads(json.dumps(rollout.write_to_buffer({"rewards": [1.0, 2.0]})))
    sample, arrays, ignored = packer.get_policy_input("sample", completion, n_ignore_prefix_tokens=3)
    assert (sample, ignored) == ("sample", 3)
    assert list(arrays["rewards"]) == [1.0, 2.0]
    assert arrays["episode_length"] == 2


def test_arguments_are_handed_on_as_they_were_given_by_keyword_or_position(rollout: Rollout) -> None:
    class Recorder:
        def get_policy_input(self, *args: Any, **kwargs: Any) -> Any:
            return args, kwargs

    class Recording(UCXXDataPackerMixin, Recorder):
        pass

    packer = Recording()
    packer.setup_ucxx_reader({}, lane="shm")
    for completion in ("text", rollout.write_to_buffer({"rewards": [1.0]})):
        read = is_completion(completion)
        args, kwargs = packer.get_policy_input("sample", completion, 3, more=4)
        assert (args[0], args[2:], kwargs) == ("sample", (3,), {"more": 4})
        assert "rewards" in args[1] if read else args[1] == "text"
    for completion in ("text", rollout.write_to_buffer({"rewards": [1.0]})):
        read = is_completion(completion)
        args, kwargs = packer.get_policy_input(
            rollout_output=completion, sample="sample", n_ignore_prefix_tokens=3
        )
        assert args == ()
        assert list(kwargs) == ["rollout_output", "sample", "n_ignore_prefix_tokens"]
        assert "rewards" in kwargs["rollout_output"] if read else kwargs["rollout_output"] == "text"
    assert packer.cleanup_ucxx_reader()


def test_an_episode_may_be_all_that_is_given_and_must_be(rollout: Rollout) -> None:
    packer = UCXXDataPackerMixin()
    packer.setup_ucxx_reader(config={"ucxx_prefetch_timeout": 20}, lane="shm")
    completion = rollout.write_to_buffer(trajectory={"rewards": [1.0]})
    assert packer.start_prefetch(batch=[completion])
    assert packer.wait_prefetch(timeout=20)
    assert packer.collect_prefetch(timeout=0) == 1
    assert list(packer.get_policy_input(rollout_output=completion)["rewards"]) == [1.0]
    assert packer.get_policy_input(rollout_output=None) is None
    with pytest.raises(TypeError, match="rollout_output"):
        packer.get_policy_input("sample")
    assert packer.cleanup_ucxx_reader(timeout=5.0)


def test_a_mixin_alone_returns_the_arrays(rollout: Rollout) -> None:
    packer = UCXXDataPackerMixin()
    packer.setup_ucxx_reader(UCXXConfig(), lane="shm")
    completion = rollout.write_to_buffer({"rewards": [1.0]}, metadata={"weights": "3"}, timeout=1)
    assert list(packer.get_policy_input(None, completion)["rewards"]) == [1.0]
    assert packer.get_policy_input(None, "text") == "text"
    assert packer.cleanup_ucxx_reader()


def test_everything_else_passes_untouched(packer: Packer) -> None:
    for output in ("a text", {"text": "a text"}, None, ["list"], object(), SimpleNamespace(completion="a text")):
        assert packer.get_policy_input(0, output)[1] is output
    assert packer.ucxx_reader is not None
    assert packer.ucxx_reader.statistics().skipped == 0


def test_an_episode_that_cannot_be_had_is_skipped_and_counted(rollout: Rollout, packer: Packer) -> None:
    completion = rollout.write_to_buffer({"rewards": [1.0]})
    assert packer.get_policy_input(0, completion) is not None
    assert packer.get_policy_input(0, completion) is None
    assert packer.ucxx_reader is not None
    assert packer.ucxx_reader.statistics().skipped_stale == 1


def test_two_batches_are_double_buffered(rollout: Rollout, packer: Packer) -> None:
    first, second = ([rollout.write_to_buffer({"rewards": [step + n / 4]}) for n in range(3)] for step in (1, 2))
    assert packer.start_prefetch(first)
    assert packer.defer_prefetch(second)
    for step, batch in ((1, first), (2, second)):
        assert packer.wait_prefetch()
        assert packer.collect_prefetch() == 3
        inputs = [packer.get_policy_input(None, completion)[1] for completion in batch]
        assert [float(arrays["rewards"][0]) for arrays in inputs] == [step + n / 4 for n in range(3)]
    assert packer.ucxx_reader is not None
    assert packer.ucxx_reader.statistics().prefetched == 6


def test_layers_two_and_three_have_the_names_frameworks_know(rollout: Rollout, packer: Packer) -> None:
    first, second = (reference_of(rollout.write_to_buffer({"rewards": [float(n)]})) for n in range(2))
    assert packer.read_one(first)["rewards"] == [0.0]
    _, came = packer._ucxx_dp_fetch_all([first, second], consume=False)  # noqa: SLF001 - a documented name
    assert not isinstance(came.outcome, DrayError)
    stale, came = packer.fetch_all([first, second], timeout=10)
    assert isinstance(stale.outcome, StaleSlotError)
    assert not isinstance(came.outcome, DrayError)
    assert came.outcome["rewards"] == [1.0]


def test_c8_a_batch_without_completions_is_waited_for_no_moment(packer: Packer) -> None:
    assert packer.start_prefetch(["text", {"text": 1}, None])
    assert packer.wait_prefetch(0)
    assert packer.collect_prefetch() == 0


@pytest.mark.parametrize(
    "output",
    [
        "text", {}, {"text": 1}, None, 3, {"dray_payload": "{"}, {"dray_payload": 1}, [], "dray_payload",
        '{"dray_payload": 1}', SimpleNamespace(completion="text"), SimpleNamespace(completion={"dray_payload": 1}),
    ],
)  # fmt: skip
def test_c10_prefetch_and_interception_agree_on_what_is_a_completion(packer: Packer, output: Any) -> None:
    assert packer.start_prefetch([output])
    assert packer.wait_prefetch(5)
    packer.collect_prefetch()
    passed = packer.get_policy_input(0, output)
    assert (passed is None) == is_completion(output)


FORMS: dict[str, Callable[[dict[str, str]], Any]] = {
    "mapping": lambda completion: {**completion, "work_item": "with a key of the framework's own"},
    "text": json.dumps,
    "reference": reference_of,
    "text of a reference": lambda completion: reference_of(completion).to_json(),
    "object": lambda completion: SimpleNamespace(work_item="text", completion=completion),
    "object with text": lambda completion: SimpleNamespace(completion=json.dumps(completion)),
}


@pytest.mark.parametrize("form", FORMS)
def test_c10_what_prefetch_fetches_interception_finds(form: str, rollout: Rollout, packer: Packer) -> None:
    output = FORMS[form](rollout.write_to_buffer({"rewards": [1.0]}))
    assert packer.start_prefetch([output])
    assert packer.collect_prefetch() == 1
    assert packer.get_policy_input(0, output)[1]["rewards"] == [1.0]
    assert packer.ucxx_reader is not None
    assert packer.ucxx_reader.statistics().prefetched == 1


def test_with_payloads_in_redis_nothing_starts_and_everything_passes() -> None:
    rollout, packer = Rollout(), Packer()
    rollout.setup_ucxx(None, UCXXConfig(payload_transfer="redis"))
    packer.setup_ucxx_reader({"payload_transfer": "redis"})
    assert rollout.ucxx_buffer is None
    assert packer.ucxx_reader is None
    with pytest.raises(BufferClosedError, match="setup_ucxx"):
        rollout.write_to_buffer({"rewards": [1.0]})
    assert packer.start_prefetch(["text"])
    assert packer.defer_prefetch(["text"])
    assert packer.wait_prefetch(0)
    assert packer.collect_prefetch() == 0
    packer.discard_completions(["text"])
    assert packer.get_policy_input(0, "text")[1] == "text"
    assert rollout.cleanup_ucxx() == 0
    assert packer.cleanup_ucxx_reader()


def test_a_completion_without_a_reader_is_an_error_and_not_a_silent_pass(rollout: Rollout) -> None:
    completion = rollout.write_to_buffer({"rewards": [1.0]})
    packer = Packer()
    for call in (
        lambda: packer.get_policy_input(0, completion),
        lambda: packer.start_prefetch([completion]),
        lambda: packer.defer_prefetch([completion]),
        lambda: packer.discard_completions([completion]),
    ):
        with pytest.raises(BufferClosedError, match="setup_ucxx_reader"):
            call()


def test_set_up_twice_is_an_error_and_cleaned_up_twice_is_fine(rollout: Rollout, packer: Packer) -> None:
    with pytest.raises(DrayError, match="cleanup_ucxx"):
        rollout.setup_ucxx(UCXXBufferConfig(lane=("shm",)))
    with pytest.raises(DrayError, match="cleanup_ucxx_reader"):
        packer.setup_ucxx_reader(lane="shm")
    rollout.write_to_buffer({"rewards": [1.0]})
    assert rollout.cleanup_ucxx(drain=0.01) == 1
    assert rollout.cleanup_ucxx() == 0
    assert packer.cleanup_ucxx_reader()
    assert packer.cleanup_ucxx_reader()
    packer.setup_ucxx_reader(lane="shm")


def test_a_trajectory_that_cannot_be_written_is_none_if_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    rollout = Rollout()
    rollout.setup_ucxx({"lane": "shm", "slots": 1, "on_error": "none", "write_timeout": 0.05})
    assert rollout.write_to_buffer({"rewards": [1.0]}) is not None
    assert rollout.write_to_buffer({"rewards": [1.0]}) is None
    assert rollout.write_to_buffer({"rewards": object()}) is None
    assert [record.name for record in caplog.records] == ["dray.ucxx"] * 2
    rollout.cleanup_ucxx()
    with pytest.raises(BufferClosedError):
        rollout.write_to_buffer({"rewards": [1.0]})


def test_a_full_buffer_drops_the_oldest_payload_if_asked_for(packer: Packer) -> None:
    rollout = Rollout()
    rollout.setup_ucxx({"lane": "shm", "slots": 2, "on_full": "overwrite"})
    batch = [rollout.write_to_buffer({"rewards": [float(number)]}) for number in range(3)]
    assert [packer.get_policy_input(0, each) is None for each in batch] == [True, False, False]
    rollout.cleanup_ucxx()


def test_a_full_buffer_has_room_again_when_discards_are_freed(packer: Packer) -> None:
    rollout = Rollout()
    rollout.setup_ucxx({"lane": "shm", "slots": 2, "write_timeout": 20})
    batch = [rollout.write_to_buffer({"rewards": [1.0]}) for _ in range(2)]
    packer.discard_completions([SimpleNamespace(completion=each) for each in batch])
    assert rollout.write_to_buffer({"rewards": [2.0]}) is not None
    rollout.cleanup_ucxx()


def test_settings_are_parsed_strictly() -> None:
    with pytest.raises(ConfigError) as raised:
        Rollout().setup_ucxx({"slot": 8})
    assert raised.value.key == "slot"
    with pytest.raises(ConfigError) as raised:
        Packer().setup_ucxx_reader({"ucxx_read_max_attempts": "two"})
    assert raised.value.key == "ucxx_read_max_attempts"


def test_the_names_of_the_transport_are_there() -> None:
    names = {
        "UCXXBuffer", "UCXXBufferConfig", "UCXXClient", "UCXXRolloutMixin", "UCXXDataPackerMixin",
        "SharedRingBuffer", "SlotState", "SlotError", "StaleSlotError", "TensorSpec", "UCXX_AVAILABLE",
    }  # fmt: skip
    assert names <= set(dray.ucxx.__all__)
    assert all(hasattr(dray.ucxx, name) for name in dray.ucxx.__all__)


WITHOUT_UCXX = """
import sys
sys.modules["ucxx"] = sys.modules["torch"] = sys.modules["redis"] = None
import dray.ucxx
from dray.errors import MissingDependencyError
assert not dray.ucxx.UCXX_AVAILABLE
served = dray.ucxx.UCXXBufferConfig(secret=bytes(16))
starts = (lambda: dray.ucxx.UCXXBuffer(served), dray.ucxx.UCXXClient, dray.ucxx.CompletionReader)
for start in starts:
    for caught in (MissingDependencyError, ImportError, RuntimeError):
        try:
            start()
        except caught as error:
            assert "pip install 'dray-rl[ucxx]'" in str(error), error
            assert error.name == "ucxx"
        else:
            raise SystemExit(f"{start} started")
config = dray.ucxx.UCXXBufferConfig(lane=("shm",))
with dray.ucxx.UCXXBuffer(config) as buffer, dray.ucxx.CompletionReader(lane="shm") as reader:
    assert reader.resolve(buffer.write({"rewards": [2.0]}))["rewards"] == [2.0]
"""


def test_it_imports_without_ucxx_and_names_the_package_to_install_when_it_is_needed() -> None:
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT_UCXX], capture_output=True, text=True, timeout=60, check=False
    )
    assert found.returncode == 0, found.stderr


def test_a_completion_for_a_reference_frees_its_slot_once_resolved(rollout: Rollout, packer: Packer) -> None:
    buffer = rollout.ucxx_buffer
    assert buffer is not None
    reference = buffer.server.put({"tokens": [1, 2]})
    assert packer.get_policy_input(0, completion_for(reference)) is not None
    wait_until(lambda: buffer.ring.statistics().free == 8, "the slot to be free again")
