"""The GRPO example on its own: no runtime, no transport."""

import importlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from optional import imported_later

torch = imported_later("torch", reason="the example needs torch")

EXAMPLE = Path(__file__).parents[2] / "examples" / "grpo"
MODULES = ["sorting", "transformer", "policy", "batch", "loss", "rollout", "trainer"]
GROUP_SIZE = 8


@dataclass(frozen=True)
class Context:
    args: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class WorkItem:
    index: int
    seed: int


@dataclass(frozen=True)
class Trajectory:
    arrays: dict[str, np.ndarray]
    weight_version: int = 0


@pytest.fixture(scope="module")
def example() -> Iterator[SimpleNamespace]:
    """The example's modules, which import each other as siblings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def trainer_of(example: SimpleNamespace, seed: int = 0, **args: Any) -> Any:
    trainer = example.trainer.GRPOTrainer()
    trainer.setup(Context(args, seed))
    return trainer


def worker_of(example: SimpleNamespace, trainer: Any) -> Any:
    worker = example.rollout.SortingRollout()
    worker.setup(Context({"group_size": GROUP_SIZE}))
    worker.load_weights(trainer.weights(), 0)
    return worker


def received(arrays: dict[str, np.ndarray]) -> Trajectory:
    """The trajectory as a trainer sees it: the arrays may be read-only views of a slot."""
    for array in arrays.values():
        array.setflags(write=False)
    return Trajectory(arrays)


def groups_of(worker: Any, seeds: range) -> list[Trajectory]:
    return [received(worker.rollout(WorkItem(seed, seed))) for seed in seeds]


# --- the task ----------------------------------------------------------------------------------------------------


def test_tokens_and_text_are_the_same_thing(example: SimpleNamespace) -> None:
    tokens = example.sorting.encode("7294=")
    assert tokens.tolist() == [7, 2, 9, 4, 11]
    assert tokens.dtype == np.int64
    assert example.sorting.decode(tokens) == "7294="
    assert example.sorting.decode(example.sorting.answer(tokens)) == "2479."
    with pytest.raises(ValueError):
        example.sorting.encode("7+2=")


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("2479.", 1.0),
        ("2497.", 0.5 * 3 / 5),  # two digits exchanged
        ("2479", 0.5 * 4 / 5),  # does not stop
        ("2479.0", 0.5 * 5 / 6),  # continues after the end
        ("247.", 0.5 * 3 / 5),
        ("24799.", 0.5 * 4 / 6),
        (".", 0.0),
        ("7294.", 0.5 * 1 / 5),  # the prompt, whose end is where it belongs
    ],
)
def test_reward_is_half_for_positions_and_half_for_the_whole(
    example: SimpleNamespace, completion: str, expected: float
) -> None:
    encode = example.sorting.encode
    assert example.sorting.reward(encode("7294="), encode(completion)) == pytest.approx(expected)


def test_training_prompts_are_never_held_out_and_have_every_length(example: SimpleNamespace) -> None:
    sorting = example.sorting
    texts = [sorting.decode(sorting.training_prompt(seed)) for seed in range(3000)]
    assert not sorting.HELD_OUT.intersection(texts)
    assert {len(text) - 1 for text in texts} == set(sorting.DIGITS)
    assert all(text[-1] == "=" and len(set(text)) == len(text) for text in texts)


def test_held_out_prompts_are_200_different_ones_of_every_length(example: SimpleNamespace) -> None:
    sorting = example.sorting
    assert len(sorting.HELD_OUT) == 200
    lengths = [len(text) - 1 for text in sorting.HELD_OUT]
    assert all(lengths.count(length) >= 30 for length in sorting.DIGITS)


# --- the model ---------------------------------------------------------------------------------------------------


def test_padding_behind_a_sequence_does_not_change_its_logits(example: SimpleNamespace) -> None:
    policy = example.policy.new_policy()
    tokens = torch.from_numpy(example.sorting.encode("7294=24"))[None]
    padded = torch.cat([tokens, torch.zeros(1, 4, dtype=torch.int64)], dim=1)
    with torch.inference_mode():
        torch.testing.assert_close(policy(padded)[:, : tokens.shape[1]], policy(tokens))


def sorter(example: SimpleNamespace, limit: int) -> Any:
    """In place of the transformer: certain of what comes next, and right about prompts of up to `limit` digits."""
    sorting = example.sorting

    class Sorter(torch.nn.Module):  # type: ignore[misc]
        def forward(self, sequences: Any) -> Any:
            logits = torch.full((*sequences.shape, sorting.GENERATED_TOKENS), -100.0)
            for row, sequence in enumerate(sequences.tolist()):
                at = sequence.index(sorting.VOCABULARY.index("="))
                right = [*sorted(sequence[:at]), sorting.END]
                done = len(sequence) - at - 1
                logits[row, -1, right[min(done, at)] if at <= limit else 0] = 100.0
            return logits

    return Sorter()


def test_completions_stop_at_the_end_token_each_at_its_own_length(example: SimpleNamespace) -> None:
    prompts = torch.tensor([[3, 1, 11, 0], [9, 5, 4, 11]])  # the first as if it had generated a 0 already
    found = example.transformer.complete(sorter(example, 5), prompts, end=10, limit=6)
    assert found.lengths.tolist() == [2, 4]
    assert found.tokens[0, :2].tolist() == [3, 10]
    assert found.tokens[1, :4].tolist() == [4, 5, 9, 10]
    cut = example.transformer.complete(sorter(example, 5), prompts, end=10, limit=3)
    assert cut.lengths.tolist() == [2, 3]


def test_accuracy_is_the_share_of_held_out_prompts_that_are_right_to_the_end(example: SimpleNamespace) -> None:
    accuracy = example.policy.held_out_accuracy
    assert accuracy(sorter(example, 5)) == 1.0
    assert accuracy(sorter(example, 1)) == 0.0
    short = sum(len(text) - 1 <= 3 for text in example.sorting.HELD_OUT)
    assert accuracy(sorter(example, 3)) == short / 200
    assert accuracy(example.policy.new_policy()) <= 0.1


# --- acting ------------------------------------------------------------------------------------------------------


def test_rollout_returns_a_group_of_completions_of_various_lengths_without_padding(
    example: SimpleNamespace,
) -> None:
    sorting = example.sorting
    arrays = worker_of(example, trainer_of(example)).rollout(WorkItem(0, 7))
    length, total = len(arrays["prompt"]), int(arrays["lengths"].sum())
    assert {name: (array.dtype.name, array.shape) for name, array in arrays.items()} == {
        "prompt": ("int64", (length,)),
        "lengths": ("int64", (GROUP_SIZE,)),
        "tokens": ("int64", (total,)),
        "log_probs": ("float32", (total,)),
        "rewards": ("float32", (GROUP_SIZE,)),
    }
    assert len(set(arrays["lengths"])) > 1
    np.testing.assert_array_equal(arrays["prompt"], sorting.training_prompt(7))
    completions = np.split(arrays["tokens"], arrays["lengths"].cumsum()[:-1])
    for completion, reward in zip(completions, arrays["rewards"], strict=True):
        assert sorting.END not in completion[:-1]
        assert completion[-1] == sorting.END or len(completion) == sorting.MAX_COMPLETION
        assert reward == pytest.approx(sorting.reward(arrays["prompt"], completion))


def test_same_seed_and_weights_give_the_same_group_and_another_seed_another(example: SimpleNamespace) -> None:
    trainer = trainer_of(example)
    first = worker_of(example, trainer).rollout(WorkItem(0, 11))
    second = worker_of(example, trainer).rollout(WorkItem(1, 11))
    other = worker_of(example, trainer).rollout(WorkItem(2, 12))
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])
    assert not np.array_equal(first["tokens"], other["tokens"])


def test_loaded_weights_are_copies(example: SimpleNamespace) -> None:
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


# --- learning ----------------------------------------------------------------------------------------------------


def test_advantages_compare_completions_with_their_group_alone(example: SimpleNamespace) -> None:
    advantages = example.batch.group_advantages
    np.testing.assert_allclose(advantages(np.array([1, 0, 0, 1], np.float32)), [1, -1, -1, 1], atol=1e-3)
    np.testing.assert_allclose(advantages(np.array([0.2, 0.1, 0.3, 0.2], np.float32)).mean(), 0, atol=1e-6)
    np.testing.assert_array_equal(advantages(np.full(4, 0.25, np.float32)), np.zeros(4))


def test_groups_of_different_lengths_become_one_batch(example: SimpleNamespace) -> None:
    encode = example.sorting.encode
    first = {
        "prompt": encode("21="),
        "lengths": np.array([3, 1]),
        "tokens": encode("12.."),
        "log_probs": np.array([-1, -2, -3, -4], np.float32),
        "rewards": np.array([1, 0], np.float32),
    }
    second = {
        "prompt": encode("543="),
        "lengths": np.array([2, 2]),
        "tokens": encode("3.5."),
        "log_probs": np.array([-5, -6, -7, -8], np.float32),
        "rewards": np.array([0.5, 0.5], np.float32),
    }
    batch = example.batch.batch_of([first, second])
    expected = ["21=12.", "21=.", "543=3.", "543=5."]
    rows = [encode(text).tolist() for text in expected]
    assert batch.sequences.tolist() == [row + [0] * (6 - len(row)) for row in rows]
    assert batch.generated.int().tolist() == [
        [0, 0, 0, 1, 1, 1],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 1, 1],
    ]
    assert batch.log_probs.tolist() == [-1, -2, -3, -4, -5, -6, -7, -8]
    np.testing.assert_allclose(batch.advantages, [1, 1, 1, -1, 0, 0, 0, 0], atol=1e-3)


def test_loss_of_a_known_case(example: SimpleNamespace) -> None:
    # Two tokens, each of 4 equally likely: one was half as likely when it was chosen, the other twice as likely.
    batch = example.batch.Batch(
        sequences=torch.tensor([[3, 0, 1]]),
        generated=torch.tensor([[False, True, True]]),
        log_probs=torch.tensor([1 / 8, 1 / 2]).log(),
        advantages=torch.tensor([1.0, -1.0]),
    )
    loss = example.loss.grpo_loss(torch.zeros(1, 2, 4), batch, clip=0.2, entropy_bonus=0.1)
    # Ratios 2 and 1/2 are clipped to 1.2 and 0.8, the lower bounds of what they promise.
    assert loss.policy.item() == pytest.approx(-(1.2 * 1 + 0.8 * -1) / 2)
    assert loss.entropy.item() == pytest.approx(math.log(4))
    assert loss.total.item() == pytest.approx(-0.2 - 0.1 * math.log(4))
    assert loss.divergence.item() == pytest.approx((2 - 1 - math.log(2) + 0.5 - 1 + math.log(2)) / 2)
    assert loss.clipped.item() == 1.0


def test_log_probabilities_of_the_rollout_are_those_of_the_trainers_policy(example: SimpleNamespace) -> None:
    trainer = trainer_of(example)
    worker = worker_of(example, trainer)
    trainer.train_step(groups_of(worker, range(8)))  # a policy that is no longer uniform
    worker.load_weights(trainer.weights(), 1)
    batch = example.batch.batch_of([group.arrays for group in groups_of(worker, range(8, 16))])
    with torch.inference_mode():
        loss = example.loss.grpo_loss(trainer.policy(batch.sequences[:, :-1]), batch, 0.2, 0.0)
    assert loss.divergence.item() == pytest.approx(0, abs=1e-6)
    assert loss.clipped.item() == 0
    assert np.ptp(batch.log_probs.numpy()) > 0.01


def test_step_makes_what_was_better_than_its_group_more_likely(example: SimpleNamespace) -> None:
    trainer = trainer_of(example)
    groups = groups_of(worker_of(example, trainer), range(16))
    batch = example.batch.batch_of([group.arrays for group in groups])
    trainer.train_step(groups)
    with torch.inference_mode():
        choices = torch.log_softmax(trainer.policy(batch.sequences[:, :-1])[batch.generated[:, 1:]], dim=1)
    gained = choices.gather(1, batch.sequences[batch.generated][:, None]).squeeze(1) - batch.log_probs
    assert gained[batch.advantages > 0.5].mean() > gained[batch.advantages < -0.5].mean() + 0.01


def test_accuracy_is_measured_before_the_first_step_and_every_few_steps(example: SimpleNamespace) -> None:
    trainer = trainer_of(example, evaluate_every=2)
    worker = worker_of(example, trainer)
    first, second, third = (trainer.train_step(groups_of(worker, range(8 * at, 8 * at + 8))) for at in range(3))
    measured = [{name for name in metrics if "accuracy" in name} for metrics in (first, second, third)]
    assert measured == [{"accuracy_before"}, {"accuracy"}, set()]
    assert first["accuracy_before"] <= 0.1
    assert all(isinstance(value, float) and np.isfinite(value) for value in (first | second | third).values())
    assert first["completions"] == 8 * GROUP_SIZE


def test_training_continues_identically_after_save_and_load(example: SimpleNamespace, tmp_path: Path) -> None:
    trainer = trainer_of(example, seed=1)
    worker = worker_of(example, trainer)
    first, second = groups_of(worker, range(8)), groups_of(worker, range(8, 16))
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


def test_unknown_setting_is_refused_by_name(example: SimpleNamespace) -> None:
    with pytest.raises(TypeError, match="learning_speed"):
        trainer_of(example, learning_speed=1.0)
