"""The CartPole example on its own: no runtime, no transport."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from optional import imported_later, require

from dray.jobs import PolicyGroup

require("gymnasium", reason="the example needs gymnasium")
torch = imported_later("torch", reason="the example needs torch")

EXAMPLE = Path(__file__).parents[2] / "examples" / "cartpole"


@dataclass(frozen=True)
class Context:
    args: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    group: PolicyGroup = field(default_factory=PolicyGroup)


@dataclass(frozen=True)
class WorkItem:
    index: int
    seed: int


@dataclass(frozen=True)
class Trajectory:
    arrays: dict[str, np.ndarray]
    weight_version: int = 0


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    """The example's module, which imports its sibling."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        yield importlib.import_module("cartpole")
    for name in ("cartpole", "ranks"):
        del sys.modules[name]


@pytest.fixture(autouse=True)
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def trainer_of(example: ModuleType, seed: int = 0, **args: Any) -> Any:
    trainer = example.CartPoleTrainer()
    trainer.setup(Context(args, seed))
    return trainer


def worker_of(example: ModuleType, trainer: Any) -> Any:
    worker = example.CartPoleRollout()
    worker.setup(Context())
    worker.load_weights(trainer.weights(), 0)
    return worker


def received(arrays: dict[str, np.ndarray]) -> Trajectory:
    """The trajectory as a trainer sees it: the arrays may be read-only views of a slot."""
    for array in arrays.values():
        array.setflags(write=False)
    return Trajectory(arrays)


def batch_of(worker: Any, seeds: range) -> list[Trajectory]:
    return [received(worker.rollout(WorkItem(seed, seed))) for seed in seeds]


def test_rollout_returns_fields_of_one_consistent_length(example: ModuleType) -> None:
    worker = worker_of(example, trainer_of(example))
    arrays = worker.rollout(WorkItem(0, 7))
    length = len(arrays["rewards"])
    assert 1 <= length <= 500
    assert {name: (array.dtype.name, array.shape) for name, array in arrays.items()} == {
        "observations": ("float32", (length, 4)),
        "actions": ("int64", (length,)),
        "log_probs": ("float32", (length,)),
        "rewards": ("float32", (length,)),
        "terminated": ("bool", (length,)),
        "truncated": ("bool", (length,)),
        "last_observation": ("float32", (4,)),
    }
    ended = arrays["terminated"] | arrays["truncated"]
    assert ended[-1]
    assert not ended[:-1].any()
    assert arrays["rewards"].sum() == length


def test_same_seed_and_weights_give_the_same_episode_and_another_seed_another(example: ModuleType) -> None:
    trainer = trainer_of(example)
    first = worker_of(example, trainer).rollout(WorkItem(0, 11))
    second = worker_of(example, trainer).rollout(WorkItem(1, 11))
    other = worker_of(example, trainer).rollout(WorkItem(2, 12))
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])
    assert not np.array_equal(first["last_observation"], other["last_observation"])


def test_log_probabilities_of_the_rollout_are_those_of_the_trainers_actor(example: ModuleType) -> None:
    trainer = trainer_of(example)
    worker = worker_of(example, trainer)
    trainer.train_step(batch_of(worker, range(8)))  # a policy that is no longer uniform
    worker.load_weights(trainer.weights(), 1)
    arrays = worker.rollout(WorkItem(0, 3))
    with torch.inference_mode():
        expected = torch.log_softmax(trainer.actor(torch.from_numpy(arrays["observations"])), dim=1).numpy()
    chosen = expected[np.arange(len(expected)), arrays["actions"]]
    np.testing.assert_allclose(arrays["log_probs"], chosen, atol=1e-5)
    assert np.ptp(chosen) > 0.01


def test_loaded_weights_are_copies(example: ModuleType) -> None:
    trainer = trainer_of(example)
    weights = trainer.weights()
    worker = worker_of(example, trainer)
    worker.load_weights(weights, 1)
    before = worker.rollout(WorkItem(0, 5))
    for array in weights.values():
        array[...] = np.nan
    after = worker.rollout(WorkItem(0, 5))
    np.testing.assert_array_equal(before["log_probs"], after["log_probs"])
    assert all(np.isfinite(array).all() for array in trainer.weights().values())


def test_train_step_changes_the_weights_and_returns_finite_metrics(example: ModuleType) -> None:
    trainer = trainer_of(example, evaluate_every=1, evaluate_above=0.0, evaluation_episodes=4)
    worker = worker_of(example, trainer)
    batch = batch_of(worker, range(8))
    before = trainer.weights()
    metrics = trainer.train_step(batch)
    assert {"mean_return", "loss", "evaluation_return"} <= metrics.keys()
    assert all(isinstance(value, float) and np.isfinite(value) for value in metrics.values())
    assert metrics["mean_return"] == np.mean([len(trajectory.arrays["rewards"]) for trajectory in batch])
    after = trainer.weights()
    assert before.keys() == after.keys()
    assert not any(np.array_equal(before[name], after[name]) for name in before)


def test_evaluation_waits_until_training_returns_are_promising(example: ModuleType) -> None:
    trainer = trainer_of(example, evaluate_every=1, evaluate_above=501.0)
    worker = worker_of(example, trainer)
    assert "evaluation_return" not in trainer.train_step(batch_of(worker, range(4)))


def test_training_continues_identically_after_save_and_load(example: ModuleType, tmp_path: Path) -> None:
    trainer = trainer_of(example, seed=1)
    worker = worker_of(example, trainer)
    first, second = batch_of(worker, range(8)), batch_of(worker, range(8, 16))
    trainer.train_step(first)
    trainer.save(tmp_path)
    metrics = trainer.train_step(second)

    resumed = trainer_of(example, seed=2)
    resumed.load(tmp_path)
    assert resumed.train_step(second) == metrics
    assert resumed.steps == trainer.steps == 2
    for name, array in trainer.weights().items():
        np.testing.assert_array_equal(array, resumed.weights()[name])
    assert [path.name for path in tmp_path.iterdir()] == ["trainer.pt"]


def test_unknown_setting_is_refused_by_name(example: ModuleType) -> None:
    with pytest.raises(TypeError, match="learning_speed"):
        trainer_of(example, learning_speed=1.0)


def test_advantage_counts_the_value_after_a_truncated_end_but_not_after_a_terminated_one(
    example: ModuleType,
) -> None:
    rewards, values = np.ones(2, np.float32), np.array([1.0, 2.0, 4.0], np.float32)
    settings = {"rewards": rewards, "values": values, "discount": 0.5, "gae_lambda": 0.5}
    truncated = example.generalised_advantage(terminated=False, **settings)
    terminated = example.generalised_advantage(terminated=True, **settings)
    # By hand: errors 1 + 0.5·2 - 1 = 1 and 1 + 0.5·4 - 2 = 1, or 1 + 0 - 2 = -1 at a terminated end.
    np.testing.assert_allclose(truncated, [1 + 0.25 * 1, 1])
    np.testing.assert_allclose(terminated, [1 + 0.25 * -1, -1])


def test_policy_improves_on_episodes_three_versions_old(example: ModuleType) -> None:
    trainer = trainer_of(example)
    worker = worker_of(example, trainer)
    versions = [trainer.weights()] * 4
    returns = []
    for step in range(24):
        worker.load_weights(versions[-4], step)
        metrics = trainer.train_step(batch_of(worker, range(16 * step, 16 * step + 16)))
        versions.append(trainer.weights())
        returns.append(metrics["mean_return"])
    assert np.mean(returns[-4:]) > 2 * np.mean(returns[:4])  # over many seeds it is 3 to 6 times
