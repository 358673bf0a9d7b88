import numpy as np
import pytest

from dray.errors import SchemaError
from dray.payload import trajectory


def steps(length, padded=None, **more):
    rows = length if padded is None else padded
    arrays = {
        "observations": np.arange(rows * 4, dtype=np.float32).reshape(rows, 4) + 1,
        "actions": np.arange(rows) + 1,
        "rewards": [1.0] * rows,
        "terminated": np.arange(rows) == length - 1,
        "truncated": np.zeros(rows, bool),
        "seed": np.asarray(7),
        **more,
    }
    if padded is not None:
        arrays["episode_length"] = np.int32(length)
    return arrays


def test_the_length_is_the_stored_one_or_that_of_the_rows():
    assert trajectory.resolve_episode_length(steps(5)) == 5
    assert trajectory.resolve_episode_length(steps(5, padded=8)) == 5
    assert trajectory.resolve_episode_length(steps(0)) == 0
    assert trajectory.resolve_episode_length({"episode_length": [3]}) == 3
    assert trajectory.resolve_episode_length({"tokens": [1, 2]}, per_step=("tokens",)) == 2


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "neither"),
        ({"seed": 1}, "neither"),
        ({"rewards": [1, 2], "actions": [1, 2, 3]}, "'actions' has 3 rows, but 'rewards' has 2"),
        ({"rewards": [1, 2], "actions": [1], "episode_length": 1}, "'actions' has 1 rows"),
        ({"rewards": 1.0}, "'rewards' has one row per step, but is a scalar"),
        ({"rewards": [1, 2], "episode_length": 3}, "'episode_length' is 3, but .* 2 rows"),
        ({"rewards": [1, 2], "episode_length": -1}, "'episode_length' is -1"),
        ({"rewards": [1, 2], "episode_length": 2.0}, "'episode_length' has dtype float64"),
        ({"rewards": [1, 2], "episode_length": True}, "'episode_length' has dtype bool"),
        ({"rewards": [1, 2], "episode_length": [1, 1]}, r"shape \(2,\), expected one integer"),
        ({"rewards": [1, 2], "episode_length": []}, "expected one integer|dtype float64"),
    ],
)
def test_a_length_that_cannot_be_resolved_is_a_schema_error(arrays, message):
    with pytest.raises(SchemaError, match=message):
        trajectory.resolve_episode_length(arrays)
