import numpy as np
import pytest

from dray.errors import SchemaError
from dray.payload import pack, trajectory, unpack


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


def test_episode_length_is_always_written():
    written = unpack(pack(trajectory.with_episode_length(steps(5))))
    assert written["episode_length"].shape == ()
    assert written["episode_length"].dtype == np.int64
    assert int(written["episode_length"]) == 5


def test_an_episode_length_that_is_there_stays_as_it_is():
    complete = trajectory.with_episode_length({"rewards": [1, 2, 3], "episode_length": np.array([2], np.int32)})
    assert complete["episode_length"].tolist() == [2]
    assert complete["episode_length"].dtype == np.int32


def test_trim_drops_padding_without_a_copy():
    source = steps(5, padded=8)
    trimmed = trajectory.trim(source)
    assert {name: len(trimmed[name]) for name in trajectory.STEP_FIELDS} == dict.fromkeys(
        trajectory.STEP_FIELDS, 5
    )
    assert np.shares_memory(trimmed["observations"], source["observations"])
    assert int(trimmed["seed"]) == 7
    assert len(source["actions"]) == 8


def test_pad_fills_with_zeros_and_trim_undoes_it():
    source = trajectory.with_episode_length(steps(5, log_probs=np.ones(5)), per_step=("log_probs",))
    padded = trajectory.pad(source, 8, per_step=("log_probs",))
    assert padded["observations"].shape == (8, 4)
    assert not padded["observations"][5:].any()
    assert padded["log_probs"].tolist() == [1] * 5 + [0] * 3
    assert int(padded["episode_length"]) == 5
    back = trajectory.trim(padded, per_step=("log_probs",))
    assert back.keys() == source.keys()
    for name, array in source.items():
        assert np.array_equal(array, back[name]), name


def test_pad_zeroes_what_lay_beyond_the_episode_and_may_shorten_padding():
    padded = trajectory.pad(steps(5, padded=8), 6)
    assert padded["actions"].tolist() == [1, 2, 3, 4, 5, 0]


def test_an_episode_too_long_to_pad_is_a_schema_error():
    with pytest.raises(SchemaError, match="5 steps, more than the 4"):
        trajectory.pad(steps(5), 4)


def test_stack_pads_to_the_longest_and_masks_the_rest():
    batch = trajectory.stack([steps(2), steps(4, padded=6), steps(0)])
    assert batch.arrays["observations"].shape == (3, 4, 4)
    assert batch.arrays["observations"].dtype == np.float32
    assert batch.arrays["actions"].tolist() == [[1, 2, 0, 0], [1, 2, 3, 4], [0, 0, 0, 0]]
    assert batch.arrays["episode_length"].tolist() == [2, 4, 0]
    assert batch.arrays["seed"].tolist() == [7, 7, 7]
    assert batch.mask.tolist() == [[True, True, False, False], [True] * 4, [False] * 4]


def test_stack_to_a_given_length():
    batch = trajectory.stack([steps(2)], length=3)
    assert batch.mask.tolist() == [[True, True, False]]
    with pytest.raises(SchemaError, match="trajectory 1 has 4 steps"):
        trajectory.stack([steps(2), steps(4)], length=3)


@pytest.mark.parametrize(
    ("trajectories", "message"),
    [
        ([], "no trajectory"),
        ([steps(2), steps(2, extra=1)], "'extra' is in only one of the trajectories 0 and 1"),
        ([steps(2), steps(2, seed=np.asarray([7]))], "'seed' of trajectory 1"),
        ([steps(2), steps(2, observations=np.zeros((2, 3), np.float32))], "'observations' of trajectory 1"),
        ([steps(2), steps(2, observations=np.zeros((2, 4)))], "'observations' of trajectory 1 has dtype float64"),
        ([steps(2), steps(2, actions=[1])], "'actions' has 1 rows"),
    ],
)
def test_trajectories_that_do_not_fit_each_other_are_a_schema_error(trajectories, message):
    with pytest.raises(SchemaError, match=message):
        trajectory.stack(trajectories)
