"""Points cosmos-rl's own tests of transports at dray. A pytest plug-in: `pytest -p pointed_at_dray`.

The tests come from the source distribution of the installed release. In the text of a module, what names the
transport under test is replaced before the module runs; the rest is as it is. In test_transport_strategy.py, the
test double that stands for a transport is replaced by one that reads real payloads of a real ring.
"""

import re
from pathlib import Path
from typing import Any

import absent_packages  # noqa: F401 - before the first import of cosmos-rl
import cosmos_package  # noqa: F401
import pytest

import dray.integrations.cosmos_rl
from dray.integrations.cosmos_rl import DrayStrategy
from dray.integrations.cosmos_rl_settings import CosmosSettings
from dray.integrations.cosmos_rl_trajectories import Trajectories

SETTINGS = CosmosSettings(output="numpy", timeout=10)
TRAJECTORIES = Trajectories(SETTINGS)
_completions: dict[str, str] = {}


def completion(name: str) -> str:
    """The completion of a payload that is `name`; of one that is gone for ``"ref:gone"``."""
    if name not in _completions:
        text = "from-sync" if name == "ref:never-prefetched" else name
        _completions[name] = TRAJECTORIES.publish({"payload": text})
        if name == "ref:gone":
            strategy = RecordingDrayStrategy()
            strategy.sync_fetch(_completions[name])
            strategy.shutdown()
    return _completions[name]


class RecordingDrayStrategy(DrayStrategy):
    """dray's strategy, which records what cosmos-rl's scheduler calls, as the double of its tests does."""

    def __init__(self, *, sync_result: Any = None) -> None:
        super().__init__(SETTINGS)
        self.calls: list[str] = []
        self.completed: list[Any] = []
        self.failed: list[str] = []
        self.before_join_calls = 0
        self.sync_result = sync_result

    def should_intercept(self, rollout_output: Any) -> bool:
        self.calls.append("should_intercept")
        return super().should_intercept(rollout_output)

    def fetch_batch(self, tasks: list[Any]) -> dict[str, Any]:
        self.calls.append("fetch_batch")
        return super().fetch_batch(tasks)

    def sync_fetch(self, rollout_output: Any) -> Any:
        self.calls.append("sync_fetch")
        return super().sync_fetch(rollout_output)

    def on_prefetch_complete(self, batch_id: int, n_results: int, fetch_ms: float, step: int) -> None:
        self.calls.append("on_prefetch_complete")
        self.completed.append((batch_id, n_results, step))

    def on_resolve_failed(self, rollout_output: Any, cache_key: str) -> None:
        self.calls.append("on_resolve_failed")
        (name,) = [name for name, made in _completions.items() if made == rollout_output]
        assert cache_key == self.cache_key(rollout_output)
        self.failed.append(f"key::{name}")

    def before_join(self) -> None:
        self.before_join_calls += 1
        super().before_join()


def pointed(text: str) -> str:
    """The text of a test module in which dray stands where a transport of cosmos-rl stood."""
    text = (
        text.replace('"nccl"', '"dray"')
        .replace('"  NCCL  "', '"  DRAY  "')
        .replace("NcclPayloadTransport", "DrayTransport")
    )
    text = re.sub(r'"nccl:([^"]*)"', r'"dray:\1"', text).replace("    NCCL_COMPLETION_PREFIX,\n", "")
    text = text.replace("    DrayTransport,\n", "")
    text = re.sub(r'(?<!"payload": )(?<!key::)"(ref:[^"]+)"', r'completion("\1")', text)
    if "import CommMixin" in text:  # with dray, it is the worker that gives a packer its Redis client
        text = text.replace("utils.payload_transport.nccl.transport._redis_lib", "comm.base._redis_lib")
    text = re.sub(r"^class _RecordingStrategy\(", "class _Replaced(", text, flags=re.MULTILINE)
    text = text.replace("_RecordingStrategy(", "RecordingDrayStrategy(")
    head, separator, rest = text.partition("\nimport unittest\n")
    names = "from pointed_at_dray import RecordingDrayStrategy, completion\n"
    names += "from dray.integrations.cosmos_rl import DrayTransport\n"
    names += "from dray.integrations.cosmos_rl_trajectories import PREFIX as NCCL_COMPLETION_PREFIX\n"
    return f"{head}{separator}{names}{rest}"


def pytest_sessionfinish() -> None:
    TRAJECTORIES.close()
    dray.integrations.cosmos_rl.transport.close()


def point(source: Path, destination: Path) -> None:
    """Write a module that is pointed at dray."""
    destination.write_text(pointed(source.read_text(encoding="utf-8")), encoding="utf-8")


@pytest.fixture(autouse=True)
def _each_test_has_its_own_payloads() -> None:
    _completions.clear()
