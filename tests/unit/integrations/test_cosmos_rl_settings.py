"""What the transport for cosmos-rl reads from `[custom]`, the environment and the policy's parallelism."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from optional import imported_later

from dray.errors import BufferClosedError, BufferFullError, ConfigError, ProtocolError
from dray.integrations.cosmos_rl_settings import ENVIRONMENT, CosmosSettings, address_of, read_secret
from dray.integrations.cosmos_rl_trajectories import (
    PREFIX,
    Trajectories,
    is_trajectory,
    reference_of,
    text_of,
)
from dray.transport import PayloadClient

torch = imported_later("torch")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DRAY_SECRET_FILE", "DRAY_HOST", "DRAY_INTERFACE", "COSMOS_ROLE", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def job(*, tp: int | None = 1, cp: int = 1, pp: int = 1, **custom: Any) -> Any:
    sizes = SimpleNamespace(tp_size=tp, cp_size=cp, pp_size=pp)
    return SimpleNamespace(custom=custom, policy=SimpleNamespace(parallelism=sizes))


def secret_file(folder: Path, *, mode: int = 0o600, text: bytes = b"0123456789abcdef0123456789abcdef\n") -> Path:
    path = folder / "secret"
    path.write_bytes(text)
    path.chmod(mode)
    return path


def test_without_settings_trajectories_stay_on_this_host() -> None:
    for config in (SimpleNamespace(), SimpleNamespace(custom=None), job(payload_transfer="dray", env_name="x")):
        settings = CosmosSettings.of(config)
        assert (settings.lanes, settings.address, settings.readers, settings.secret) == (
            "shm",
            "127.0.0.1",
            1,
            None,
        )


def test_settings_come_from_the_table_custom() -> None:
    settings = CosmosSettings.of(job(dray_slots=8, dray_lane=["shm", "tcp"], dray_timeout=5, dray_output="numpy"))
    assert (settings.slots, settings.lanes, settings.timeout) == (8, ["shm", "tcp"], 5)
    assert settings.device("cuda:1") is None
    assert CosmosSettings.of(job()).device("cuda:1") == "cpu"
    assert CosmosSettings.of(job(dray_output="worker")).device("cuda:1") == "cuda:1"
    assert CosmosSettings.of(job(dray_output="worker")).device(None) == "cpu"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dray_slot", 8),
        ("dray_readers", 2),
        ("dray_lane", "rdma"),
        ("dray_timeout", 0),
        ("dray_write_timeout", "60"),
        ("dray_trim", 1),
    ],
)
def test_a_wrong_key_or_value_is_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        CosmosSettings.of(job(**{key: value}))
    assert raised.value.key == key


def test_a_secret_in_a_file_opens_the_lane_between_nodes_and_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ucxx")
    monkeypatch.setenv("DRAY_SECRET_FILE", str(secret_file(tmp_path)))
    monkeypatch.setenv("DRAY_INTERFACE", "lo")
    settings = CosmosSettings.of(job(dray_host="10.0.0.1"))
    assert settings.lanes == ("shm", "ucx")
    assert settings.address == "127.0.0.1"
    assert "0123456789abcdef" not in repr(settings)


def test_a_secret_that_others_can_read_or_that_is_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="chmod 600"):
        read_secret(str(secret_file(tmp_path, mode=0o640)))
    with pytest.raises(ConfigError, match="at least 16"):
        read_secret(str(secret_file(tmp_path, text=b"short\n")))
    with pytest.raises(ConfigError, match="can be read"):
        read_secret(str(tmp_path / "none"))


def test_an_interface_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"lo"):
        address_of("none0")


@pytest.mark.parametrize(
    ("sizes", "world", "expected"),
    [
        ({}, 4, [0, 0, 0, 0]),
        ({"tp": 2}, 4, [0, 1, 0, 1]),
        ({"cp": 2, "tp": 2}, 8, [0, 1, 2, 3, 0, 1, 2, 3]),
        ({"pp": 2, "tp": 2}, 8, [0, 1, 0, 1, 2, 3, 2, 3]),
        ({"tp": None}, 1, [0]),
    ],
)
def test_ranks_with_the_same_place_in_data_parallelism_are_readers_of_different_numbers(
    sizes: dict[str, Any], world: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COSMOS_ROLE", "Policy")
    monkeypatch.setenv("WORLD_SIZE", str(world))
    found = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        settings = CosmosSettings.of(job(**sizes))
        assert settings.readers == len(set(expected))
        found.append(settings.reader)
    assert found == expected


def test_a_world_that_cannot_be_divided_is_refused_and_a_rollout_worker_has_no_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert CosmosSettings.of(job(tp=2)).reader == 0
    monkeypatch.setenv("COSMOS_ROLE", "Policy")
    with pytest.raises(ConfigError, match="a multiple of 2"):
        CosmosSettings.of(job(tp=2))


def test_a_trajectory_is_cut_to_its_length_and_comes_back_by_its_completion() -> None:
    padded = {"rewards": torch.arange(8.0), "observations": np.ones((8, 2)), "episode_length": np.array([3])}
    with Trajectories(CosmosSettings(slots=2, slot_bytes=4096)) as trajectories, PayloadClient() as client:
        completion = trajectories.publish(padded)
        assert completion.startswith(PREFIX)
        for output in (completion, f"{completion}<|end|>", {"completion": completion, "reward": 1.0}):
            assert text_of(output) is not None
            arrays = client.read(reference_of(output), consume=False)
            assert arrays["rewards"].tolist() == [0.0, 1.0, 2.0]
            assert arrays["observations"].shape == (3, 2)
    with pytest.raises(BufferClosedError):
        trajectories.publish(padded)


def test_a_rollout_worker_without_a_reader_gets_an_error_in_time_and_logs_what_is_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    trajectories = Trajectories(CosmosSettings(slots=1, slot_bytes=4096, write_timeout=0.05))
    trajectories.publish({"rewards": [1.0]})
    with pytest.raises(BufferFullError):
        trajectories.publish({"rewards": [1.0]})
    trajectories.close(timeout=0.05)
    trajectories.close()
    assert "1 unread trajectories are lost" in caplog.text


def test_text_and_references_are_no_trajectories() -> None:
    assert is_trajectory({"rewards": np.zeros(1)})
    assert is_trajectory({"text": "x", "rewards": torch.zeros(1)})
    for other in ("text", PREFIX, {"completion": PREFIX}, {}, None, [np.zeros(1)], np.zeros(1)):
        assert not is_trajectory(other)


@pytest.mark.parametrize("output", ["text", "nccl:0:1", None, 7, {}, {"completion": 7}, f"{PREFIX}0:abc", PREFIX])
def test_what_has_no_reference_is_a_protocol_error(output: Any) -> None:
    with pytest.raises(ProtocolError):
        reference_of(output)


def test_the_page_has_every_setting_with_its_default() -> None:
    page = (Path(__file__).parents[3] / "docs" / "how-to" / "cosmos-rl.md").read_text(encoding="utf-8")
    table = page.split("\n## Settings\n")[1].split("\n## ")[0]
    documented = dict(re.findall(r"^\| `dray_(\w+)`[^|]*\| ([^|]*?) ?\|", table, re.MULTILINE))
    expected = {}
    for each in dataclasses.fields(CosmosSettings):
        if each.init and each.name not in ("readers", "reader"):
            shown = json.dumps(each.default)
            expected[each.name] = "" if each.default is None else f"`{shown}`"
    assert documented == expected
    assert set(re.findall(r"`(DRAY_\w+)`", table)) == set(ENVIRONMENT.values())
