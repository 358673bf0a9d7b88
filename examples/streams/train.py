"""Learns CartPole by PPO from what any number of `play.py` put into a stream, and publishes the weights.

Rollouts and training run at the same time, so their actions come from weights that are a few versions old. PPO
allows for that, as each action comes with the log-probability that it had when it was taken.
"""

import argparse
import time
from collections import deque
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

import dray

DISCOUNT, GAE_LAMBDA, CLIP = 0.99, 0.95, 0.2
PASSES, MINIBATCH, ENTROPY_BONUS = 6, 512, 0.01


class Learner:
    """A policy, its critic, and PPO."""

    def __init__(self, seed: int, learning_rate: float = 1e-3) -> None:
        torch.manual_seed(seed)
        self.actor = network(2, last_gain=0.01)
        self.critic = network(1, last_gain=1.0)
        self._parameters = [*self.actor.parameters(), *self.critic.parameters()]
        self._optimiser = torch.optim.Adam(self._parameters, lr=learning_rate)

    def weights(self, solved: bool) -> dict[str, np.ndarray]:
        """The parameters of the actor, and whether the rollouts can stop."""
        named = {name: tensor.detach().numpy() for name, tensor in self.actor.named_parameters()}
        return {**named, "solved": np.array(solved)}

    def learn(self, rollout: Mapping[str, torch.Tensor]) -> None:
        """Do one update with the arrays that `play.Player.play` describes."""
        advantages, returns = self._advantages(rollout)
        used = rollout["used"]
        observations, actions = rollout["observations"][:-1][used], rollout["actions"][used]
        before, advantages, returns = rollout["log_probs"][used], advantages[used], returns[used]
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        for _ in range(PASSES):
            for rows in torch.split(torch.randperm(len(actions)), MINIBATCH):
                log_probs = nn.functional.log_softmax(self.actor(observations[rows]), dim=1)
                ratio = (log_probs.gather(1, actions[rows, None]).squeeze(1) - before[rows]).exp()
                clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
                policy_loss = -torch.minimum(ratio * advantages[rows], clipped * advantages[rows]).mean()
                value_loss = nn.functional.mse_loss(self.critic(observations[rows]).squeeze(1), returns[rows])
                entropy = -(log_probs.exp() * log_probs).sum(dim=1).mean()
                loss = policy_loss + value_loss - ENTROPY_BONUS * entropy
                self._optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(self._parameters, 0.5)
                self._optimiser.step()

    def _advantages(self, rollout: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Advantages by GAE (Schulman et al. 2016, arXiv:1506.02438), and the returns for the critic: (T, N)."""
        with torch.inference_mode():
            values = self.critic(rollout["observations"]).squeeze(2)
        # A return is then a discounted mean of rewards, between 0 and 1: easy to learn for the critic.
        rewards = rollout["rewards"] * (1 - DISCOUNT)
        advantages = torch.zeros_like(rewards)
        running = torch.zeros_like(rewards[0])
        for step in reversed(range(len(rewards))):
            following = values[step + 1] * ~rollout["terminated"][step]
            error = rewards[step] + DISCOUNT * following - values[step]
            continues = ~(rollout["terminated"][step] | rollout["truncated"][step])
            running = error + DISCOUNT * GAE_LAMBDA * running * continues
            advantages[step] = running
        return advantages, advantages + values[:-1]


def network(outputs: int, last_gain: float, hidden: int = 64) -> nn.Sequential:
    """Two hidden tanh layers, initialised orthogonally; a small `last_gain` makes the first policy uniform."""
    layers = [nn.Linear(4, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, outputs)]
    for layer, gain in zip(layers, (2**0.5, 2**0.5, last_gain), strict=True):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="%(default)s")
    parser.add_argument("--updates", type=int, default=1000, help="the most updates (%(default)s)")
    parser.add_argument(
        "--solved", type=float, default=475.0, help="stop at this mean return of 100 episodes (%(default)s)"
    )
    options = parser.parse_args()

    torch.set_num_threads(1)  # the networks are tiny, and the rollouts need the other cores
    learner = Learner(options.seed)
    returns: deque[float] = deque(maxlen=100)
    began, updates, solved, stopping = time.monotonic(), 0, False, False
    with dray.Publisher("cartpole-weights") as publisher, dray.Consumer("cartpole") as consumer:
        publisher.publish(learner.weights(False))
        for payload in consumer:  # until all rollouts have ended
            if stopping:
                continue
            rollout = payload.torch()
            learner.learn(rollout)
            updates += 1
            returns.extend(rollout["returns"].tolist())
            mean = sum(returns) / max(1, len(returns))
            solved = len(returns) == returns.maxlen and mean >= options.solved
            stopping = solved or updates >= options.updates
            publisher.publish(learner.weights(stopping))
            if updates % 10 == 0 or stopping:
                seconds = time.monotonic() - began
                print(f"{seconds:5.1f} s  update {updates:4}  mean return {mean:6.1f}", flush=True)
    print("solved" if solved else "not solved", flush=True)


if __name__ == "__main__":
    main()
