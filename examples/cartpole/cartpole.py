"""CartPole with PPO: the two classes that a dray job needs. `ranks.py` is for several trainers of one policy.

A job has two kinds of process. Rollout replicas act: each runs a `CartPoleRollout`, which plays one episode per
work item with the newest weights it was given. Policy replicas learn: each runs a `CartPoleTrainer`, which turns a
batch of episodes into one update and hands out the new weights. dray moves the episodes one way and the weights
the other way; neither class knows how.

Rollouts and training run at the same time, so an episode is usually a few versions older than the policy it
updates. PPO copes with that as long as each action comes with the log-probability it had when it was taken:
the ratio of new to old probability corrects for the difference, and clipping it bounds how far one batch can
push the policy. Everything else that depends on the policy (values, advantages) is computed in the trainer.

Both classes are seeded. A run is still not repeatable bit by bit, because which episodes share a batch depends on
how fast the rollout replicas are.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch
from torch import nn

from ranks import Ranks

if TYPE_CHECKING:
    from dray.jobs import ReplicaContext, Trajectory, WorkItem

ENVIRONMENT = "CartPole-v1"
OBSERVATION_SIZE = 4
ACTION_COUNT = 2


# --- Acting: one episode per work item ---------------------------------------------------------------------------


class CartPoleRollout:
    """Plays CartPole with a NumPy copy of the policy network.

    For one observation at a time NumPy is about eight times as fast as torch, and the weights arrive as NumPy
    arrays anyway.
    """

    def setup(self, context: "ReplicaContext") -> None:
        del context  # nothing to configure
        self.environment = gym.make(ENVIRONMENT, disable_env_checker=True)

    def load_weights(self, weights: Mapping[str, np.ndarray], version: int) -> None:
        """Keep a copy of `weights`, the arrays of `CartPoleTrainer.weights()`."""
        del version
        # Transposed and contiguous, so that the forward pass is `x @ weight + bias`.
        self.layers = [
            (np.array(weights[f"{index}.weight"].T, order="C"), np.array(weights[f"{index}.bias"]))
            for index in (0, 2, 4)
        ]

    def rollout(self, work_item: "WorkItem") -> dict[str, np.ndarray]:
        """Play the episode of `work_item.seed` to its end, sampling the actions.

        Returns, for an episode of T steps (1 <= T <= 500):
            observations      (T, 4) float32    what the policy saw before each action
            actions           (T,)   int64
            log_probs         (T,)   float32    log-probability of each action when it was taken
            rewards           (T,)   float32    1 for every step
            terminated        (T,)   bool       true at the end if the pole fell
            truncated         (T,)   bool       true at the end if the time ran out
            last_observation  (4,)   float32    what came after the last action
        """
        observations: list[np.ndarray] = []
        logits: list[np.ndarray] = []
        actions: list[int] = []
        rewards: list[float] = []
        # The second number of the seed keeps the actions' stream apart from the environment's own.
        noise = np.random.default_rng([work_item.seed, 1])
        observation, _ = self.environment.reset(seed=work_item.seed)
        terminated = truncated = False
        while not (terminated or truncated):
            scores = self._logits(observation)
            # The largest of logits plus Gumbel noise is a sample from their softmax.
            action = int((scores + noise.gumbel(size=ACTION_COUNT)).argmax())
            observations.append(observation)
            logits.append(scores)
            actions.append(action)
            observation, reward, terminated, truncated, _ = self.environment.step(action)
            rewards.append(float(reward))

        steps = np.arange(len(actions))
        at_end = steps == steps[-1]
        all_log_probs = np.stack(logits)
        all_log_probs -= np.logaddexp.reduce(all_log_probs, axis=1, keepdims=True)
        return {
            "observations": np.stack(observations),
            "actions": np.array(actions),
            "log_probs": all_log_probs[steps, actions],
            "rewards": np.array(rewards, np.float32),
            "terminated": at_end & terminated,
            "truncated": at_end & truncated,
            "last_observation": observation,
        }

    def _logits(self, observation: np.ndarray) -> np.ndarray:
        (weight1, bias1), (weight2, bias2), (weight3, bias3) = self.layers
        hidden = np.tanh(observation @ weight1 + bias1)
        hidden = np.tanh(hidden @ weight2 + bias2)
        logits: np.ndarray = hidden @ weight3 + bias3
        return logits


# --- Learning: PPO over batches of episodes ----------------------------------------------------------------------


@dataclass(frozen=True)
class PPOSettings:
    """The table `[policy.args]` of the job file."""

    learning_rate: float = 1e-3
    discount: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.2
    epochs: int = 6
    minibatch_size: int = 512
    entropy_bonus: float = 0.01
    max_gradient_norm: float = 0.5
    hidden_size: int = 64
    evaluate_every: int = 4  # steps
    evaluate_above: float = 300.0  # the batch's mean return; below it, a good evaluation would be luck
    evaluation_episodes: int = 100
    evaluation_seed: int = 1_000_000


@dataclass(frozen=True)
class Batch:
    """Episodes laid end to end; every tensor has the same first dimension."""

    observations: torch.Tensor
    actions: torch.Tensor
    log_probs: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor


class CartPoleTrainer:
    """Improves the policy with clipped PPO, and measures it with greedy episodes once it does well."""

    def setup(self, context: "ReplicaContext") -> None:
        self.settings = PPOSettings(**context.args)
        self.ranks = Ranks(context)
        torch.set_num_threads(1)  # the networks are tiny, and the rollout replicas need the other cores
        torch.manual_seed(context.seed)
        self.actor = network(self.settings.hidden_size, ACTION_COUNT, last_gain=0.01)
        self.critic = network(self.settings.hidden_size, 1, last_gain=1.0)
        self.parameters = [*self.actor.parameters(), *self.critic.parameters()]
        self.optimiser = torch.optim.Adam(self.parameters, lr=self.settings.learning_rate)
        self.shuffle = torch.Generator().manual_seed(context.seed)
        self.steps = 0

    def weights(self) -> dict[str, np.ndarray]:
        """Copies of the actor's parameters; the critic is of no use to a rollout."""
        return {name: tensor.numpy().copy() for name, tensor in self.actor.state_dict().items()}

    def train_step(self, trajectories: "Sequence[Trajectory]") -> dict[str, float]:
        """Do one PPO update on whole episodes and return its metrics.

        There is an `evaluation_return` among them every few steps, once the episodes are long enough.
        """
        episodes = [trajectory.arrays for trajectory in trajectories]
        batch = self._batch(episodes)
        metrics = {
            "mean_return": float(np.mean([episode["rewards"].sum() for episode in episodes])),
            "samples": float(len(batch.actions)),
            **self._update(batch),
        }
        self.steps += 1
        promising = self.ranks.first and metrics["mean_return"] >= self.settings.evaluate_above
        if promising and self.steps % self.settings.evaluate_every == 0:
            metrics["evaluation_return"] = self.evaluate()
        return metrics

    def evaluate(self) -> float:
        """The mean return of greedy episodes from fixed starting states, played side by side."""
        episodes = self.settings.evaluation_episodes
        returns, running = np.zeros(episodes), np.ones(episodes, bool)
        vector = gym.make_vec(ENVIRONMENT, num_envs=episodes, vectorization_mode="vector_entry_point")
        with closing(vector), torch.inference_mode():
            observations, _ = vector.reset(seed=self.settings.evaluation_seed)
            while running.any():
                actions = self.actor(torch.from_numpy(observations)).argmax(dim=1).numpy()
                observations, rewards, terminated, truncated, _ = vector.step(actions)
                returns += rewards * running  # the environment starts ended episodes again: those do not count
                running &= ~(terminated | truncated)
        return float(returns.mean())

    def save(self, folder: Path) -> None:
        """Write everything that the next step depends on into `folder`, which exists: all of it or nothing."""
        partial = folder / "trainer.pt.partial"
        with partial.open("wb") as file:
            torch.save(self._state(), file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / "trainer.pt")

    def load(self, folder: Path) -> None:
        """Resume from what `save` wrote. Only tensors and plain values are read: nothing is executed."""
        state = torch.load(folder / "trainer.pt", weights_only=True)
        self.actor.load_state_dict(state["actor"])
        self.critic.load_state_dict(state["critic"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.shuffle.set_state(state["shuffle"])
        self.steps = state["steps"]

    def _state(self) -> dict[str, Any]:
        return {
            "actor": self.actor.state_dict(),
            "critic": self.critic.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "shuffle": self.shuffle.get_state(),
            "steps": self.steps,
        }

    def _batch(self, episodes: Sequence[Mapping[str, np.ndarray]]) -> Batch:
        advantages, returns = [], []
        for episode in episodes:
            seen = np.vstack([episode["observations"], episode["last_observation"]])
            with torch.inference_mode():
                values = self.critic(torch.from_numpy(seen)).squeeze(1).numpy()
            advantage = generalised_advantage(
                # A return is then a discounted mean of rewards, between 0 and 1: easy to learn for the critic.
                rewards=episode["rewards"] * (1 - self.settings.discount),
                values=values,
                terminated=bool(episode["terminated"][-1]),
                discount=self.settings.discount,
                gae_lambda=self.settings.gae_lambda,
            )
            advantages.append(advantage)
            returns.append(advantage + values[:-1])

        def joined(parts: Sequence[np.ndarray]) -> torch.Tensor:
            return torch.from_numpy(np.concatenate(parts))

        return Batch(
            observations=joined([episode["observations"] for episode in episodes]),
            actions=joined([episode["actions"] for episode in episodes]),
            log_probs=joined([episode["log_probs"] for episode in episodes]),
            advantages=joined(advantages),
            returns=joined(returns),
        )

    def _update(self, batch: Batch) -> dict[str, float]:
        """Several passes over the batch in random minibatches; returns the means over all of them."""
        settings = self.settings
        spread = batch.advantages.std(correction=0) + 1e-8
        advantages = (batch.advantages - batch.advantages.mean()) / spread
        records = []
        for _ in range(settings.epochs):
            order = torch.randperm(len(batch.actions), generator=self.shuffle)
            for rows in self.ranks.minibatches(order, settings.minibatch_size):
                log_probs = nn.functional.log_softmax(self.actor(batch.observations[rows]), dim=1)
                chosen = log_probs.gather(1, batch.actions[rows, None]).squeeze(1)
                log_ratio = chosen - batch.log_probs[rows]  # of the policy now to the one that acted
                ratio = log_ratio.exp()
                clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
                policy_loss = -torch.minimum(ratio * advantages[rows], clipped * advantages[rows]).mean()
                values = self.critic(batch.observations[rows]).squeeze(1)
                value_loss = nn.functional.mse_loss(values, batch.returns[rows])
                entropy = -(log_probs.exp() * log_probs).sum(dim=1).mean()
                loss = policy_loss + value_loss - settings.entropy_bonus * entropy

                self.optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                self.ranks.average_gradients(self.parameters, len(rows))
                nn.utils.clip_grad_norm_(self.parameters, settings.max_gradient_norm)
                self.optimiser.step()

                with torch.no_grad():
                    divergence = (ratio - 1 - log_ratio).mean()  # estimates the KL divergence of the two
                    records.append(torch.stack([loss, policy_loss, value_loss, entropy, divergence]))
        names = ("loss", "policy_loss", "value_loss", "entropy", "divergence")
        return dict(zip(names, torch.stack(records).mean(dim=0).tolist(), strict=True))


def network(hidden_size: int, outputs: int, last_gain: float) -> nn.Sequential:
    """Two hidden tanh layers, initialised orthogonally; a small `last_gain` makes the first policy uniform."""
    layers = [
        nn.Linear(OBSERVATION_SIZE, hidden_size),
        nn.Linear(hidden_size, hidden_size),
        nn.Linear(hidden_size, outputs),
    ]
    for layer, gain in zip(layers, (2**0.5, 2**0.5, last_gain), strict=True):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def generalised_advantage(
    rewards: np.ndarray, values: np.ndarray, terminated: bool, discount: float, gae_lambda: float
) -> np.ndarray:
    """Advantages of one episode by GAE (Schulman et al. 2016, arXiv:1506.02438).

    `rewards` has shape (T,), `values` (T + 1,): the last value is that of the observation after the last action.
    It counts unless the episode `terminated`: an episode cut off by the clock would have continued.
    Returns (T,) float32.
    """
    following = values[1:].copy()
    if terminated:
        following[-1] = 0.0
    errors = rewards + discount * following - values[:-1]
    advantages = np.empty(len(rewards), np.float32)
    running = 0.0
    for step in reversed(range(len(rewards))):
        running = errors[step] + discount * gae_lambda * running
        advantages[step] = running
    return advantages
