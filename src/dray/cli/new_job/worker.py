"""Plays episodes: a pole stands on a cart, and a push to the left or right in each step must keep it upright.

Put your own environment and policy here. A rollout replica creates one `Worker` and calls `setup` once,
`load_weights` whenever the trainer has published new weights, and `rollout` for each work item.
"""

import math
from collections.abc import Mapping

import numpy as np

from dray.jobs import ReplicaContext, WorkItem

GRAVITY, CART, POLE, LENGTH, FORCE, SECONDS = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02  # Barto, Sutton and Anderson 1983
TRACK, MAX_ANGLE = 2.4, math.radians(12)  # an episode ends when the cart leaves the track or the pole falls


class Worker:
    """Acts with the newest weights of the trainer."""

    def setup(self, context: ReplicaContext) -> None:
        # context.args is the table [rollout.args] of job.toml.
        self.max_steps = int(context.args["max_steps"])

    def load_weights(self, weights: Mapping[str, np.ndarray], version: int) -> None:
        self.policy = weights["policy"].copy()  # dray reuses the arrays: copy what is kept

    def rollout(self, work_item: WorkItem) -> dict[str, np.ndarray]:
        # The seed belongs to the work item, so a retry plays the same episode.
        random = np.random.default_rng(work_item.seed)
        state = random.uniform(-0.05, 0.05, size=4)
        states: list[np.ndarray] = []
        actions: list[bool] = []
        while len(states) < self.max_steps and abs(state[0]) < TRACK and abs(state[2]) < MAX_ANGLE:
            probability = 1 / (1 + math.exp(-float(state @ self.policy)))  # of a push to the right
            action = random.random() < probability
            states.append(state)
            actions.append(action)
            state = pushed(state, FORCE if action else -FORCE)
        # These arrays become one payload. dray shows the mean sum of "rewards" as mean_return.
        return {
            "states": np.array(states, np.float32),
            "actions": np.array(actions, np.float32),
            "rewards": np.ones(len(states), np.float32),
        }


def pushed(state: np.ndarray, force: float) -> np.ndarray:
    """The state (position, speed, angle, angular speed) after one step with a force on the cart."""
    position, speed, angle, turn = state.tolist()
    sine, cosine, mass = math.sin(angle), math.cos(angle), CART + POLE
    push = (force + POLE * LENGTH * turn**2 * sine) / mass
    bend = (GRAVITY * sine - cosine * push) / (LENGTH * (4 / 3 - POLE * cosine**2 / mass))
    pull = push - POLE * LENGTH * bend * cosine / mass
    change = np.array([speed, pull, turn, bend])
    return np.array([position, speed, angle, turn]) + SECONDS * change
