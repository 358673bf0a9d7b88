"""The configuration keys of the UCXX transport: strict, and every error names key, value and what is allowed."""

from typing import Any

import numpy as np
import pytest

from dray.errors import ConfigError
from dray.payload import PayloadSchema, TensorSpec
from dray.ucxx import UCXXBufferConfig, UCXXConfig


def test_the_defaults_are_the_documented_ones() -> None:
    config = UCXXConfig.parse({})
    assert config == UCXXConfig()
    assert config.enabled
    assert (config.ucxx_prefetch_timeout, config.ucxx_read_max_attempts, config.ucxx_read_timeout) == (60, 2, 30)


def test_the_four_keys_are_accepted() -> None:
    table = {
        "payload_transfer": "redis",
        "ucxx_prefetch_timeout": 5,
        "ucxx_read_max_attempts": 1,
        "ucxx_read_timeout": 0.5,
    }
    config = UCXXConfig.parse(table)
    assert not config.enabled
    assert {key: getattr(config, key) for key in table} == table


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("payload_transfer", "ucx", '"ucxx" or "redis"'),
        ("payload_transfer", None, '"ucxx" or "redis"'),
        ("ucxx_prefetch_timeout", 0, "above 0"),
        ("ucxx_prefetch_timeout", "60", "a number of seconds"),
        ("ucxx_prefetch_timeout", float("nan"), "a number of seconds"),
        ("ucxx_read_timeout", True, "a number of seconds"),
        ("ucxx_read_timeout", 86_401, "at most 86400"),
        ("ucxx_read_max_attempts", 0, "a whole number from 1 to 100"),
        ("ucxx_read_max_attempts", 2.0, "a whole number"),
        ("ucxx_trim", 1, "true or false"),
        ("ucxx_per_step", "tokens", "a list of field names"),
        ("ucxx_device", 0, "a device as text"),
        ("ucxx_prefetch_timeot", 60, "the keys are payload_transfer, ucxx_prefetch_timeout"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_is_allowed(key: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError) as raised:
        UCXXConfig.parse({key: value})
    assert raised.value.key == key
    assert raised.value.value is value
    assert allowed in raised.value.allowed


def test_keys_of_the_framework_in_the_same_table_are_ignored_and_misspelt_ones_of_the_transport_are_not() -> None:
    table = {"ucxx_read_timeout": 5, "env_name": "CartPole-v1", "nccl_max_live_comms": 64}
    assert UCXXConfig.parse(table) == UCXXConfig(ucxx_read_timeout=5)
    with pytest.raises(ConfigError) as raised:
        UCXXConfig.parse({**table, "ucxx_read_timeot": 5})
    assert raised.value.key == "ucxx_read_timeot"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("slots", 0),
        ("on_error", None),
        ("slot_bytes", 1.5),
        ("on_full", "drop"),
        ("readers", 65),
        ("lane", ()),
        ("lane", "rdma"),
        ("lane", ("ucx", "rdma")),
        ("port", 65_536),
        ("n_server_threads", 17),
        ("idle_timeout", -1),
        ("write_timeout", "soon"),
        ("schema", {"rewards": "F32"}),
        ("per_step", "rewards"),
        ("secret", "text"),
        ("chunks", 4),
    ],
)
def test_a_wrong_buffer_setting_is_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        UCXXBufferConfig.parse({key: value})
    assert raised.value.key == key


def test_without_a_secret_only_shared_memory_is_served_unless_a_lane_is_named() -> None:
    assert UCXXBufferConfig().served_lanes == "shm"
    assert UCXXBufferConfig(secret=bytes(16)).served_lanes == ("shm", "ucx")
    assert UCXXBufferConfig(lane=("tcp",)).served_lanes == ("tcp",)


def test_the_secret_is_not_shown() -> None:
    assert "hidden" not in repr(UCXXBufferConfig(secret=b"hidden" * 3))
    for wrong in ("hidden", b"hidden"):
        with pytest.raises(ConfigError) as raised:
            UCXXBufferConfig.parse({"secret": wrong})
        assert "hidden" not in str(raised.value)


def test_a_schema_gets_the_length_that_every_trajectory_has() -> None:
    rewards = TensorSpec.of(np.float32, (None,))
    config = UCXXBufferConfig(schema=PayloadSchema({"rewards": rewards}))
    assert config.trajectory_schema is not None
    assert dict(config.trajectory_schema) == {"rewards": rewards, "episode_length": TensorSpec("I64", ())}
    complete = PayloadSchema({"rewards": rewards, "episode_length": TensorSpec("I32", ())})
    assert UCXXBufferConfig(schema=complete).trajectory_schema is complete
    assert UCXXBufferConfig().trajectory_schema is None
