"""Plays CartPole in a vector environment, with the newest weights, and puts what it sees into a stream.

Start as many of these as there are cores to spare; `train.py` makes no difference between them.
"""

import argparse
import os
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress

import gymnasium as gym
import numpy as np

import dray

STEPS = 128
"""Steps of each environment in one payload."""


class Player:
    """A vector environment and the episodes in it."""

    def __init__(self, environments: int, seed: int) -> None:
        self._environment = gym.make_vec(
            "CartPole-v1", num_envs=environments, vectorization_mode="vector_entry_point"
        )
        self._noise = np.random.default_rng(seed)
        self._observations, _ = self._environment.reset(seed=seed)
        self._ended = np.zeros(environments, bool)
        self._returns = np.zeros(environments, np.float32)

    def play(self, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """T steps of each of N environments.

        Returns:
            observations    (T + 1, N, 4) float32   what the policy saw, and what came after the last step
            actions         (T, N)        int64
            log_probs       (T, N)        float32   log-probability of each action when it was taken
            rewards         (T, N)        float32
            terminated      (T, N)        bool      the pole fell
            truncated       (T, N)        bool      the time ran out
            used            (T, N)        bool      false where an ended episode was only replaced by a new one
            returns         (E,)          float32   of the episodes that have ended
        """
        rows: defaultdict[str, list[np.ndarray]] = defaultdict(list)
        returns = []
        for _ in range(STEPS):
            log_probs = log_policy(weights, self._observations)
            # The largest of log-probabilities plus Gumbel noise is a sample.
            actions = (log_probs + self._noise.gumbel(size=log_probs.shape)).argmax(axis=1)
            after, rewards, terminated, truncated, _ = self._environment.step(actions)
            step = {
                "observations": self._observations,
                "actions": actions,
                "log_probs": log_probs[np.arange(len(actions)), actions],
                "rewards": rewards.astype(np.float32),
                "terminated": terminated,
                "truncated": truncated,
                "used": ~self._ended,
            }
            for name, values in step.items():
                rows[name].append(values)
            self._returns += rewards.astype(np.float32)
            self._observations, self._ended = after, terminated | truncated
            returns.append(self._returns[self._ended])
            self._returns[self._ended] = 0
        rows["observations"].append(self._observations)
        return {**{name: np.stack(values) for name, values in rows.items()}, "returns": np.concatenate(returns)}

    def close(self) -> None:
        self._environment.close()


def log_policy(weights: Mapping[str, np.ndarray], observations: np.ndarray) -> np.ndarray:
    """Log-probabilities (N, 2) of both actions: two hidden layers, as in `train.py`."""
    hidden = np.tanh(observations @ weights["0.weight"].T + weights["0.bias"])
    hidden = np.tanh(hidden @ weights["2.weight"].T + weights["2.bias"])
    logits = hidden @ weights["4.weight"].T + weights["4.bias"]
    log_probs: np.ndarray = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return log_probs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=int, default=16, help="environments in this process (%(default)s)")
    parser.add_argument("--seed", type=int, default=os.getpid(), help="by default the process id")
    options = parser.parse_args()

    player = Player(options.environments, options.seed)
    with dray.Producer("cartpole", slots=2) as producer, dray.Subscriber("cartpole-weights") as subscriber:
        newest = subscriber.newest(timeout=None)
        # A copy: a version that is in use here could not be replaced.
        version, weights = newest.version, newest.copy()
        del newest
        while not weights["solved"]:
            producer.put(player.play(weights))
            with suppress(dray.errors.StreamTimeout):
                newest = subscriber.newest(after=version, timeout=0)
                version, weights = newest.version, newest.copy()
                del newest
    player.close()


if __name__ == "__main__":
    main()
