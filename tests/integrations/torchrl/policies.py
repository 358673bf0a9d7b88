"""A policy whose actions show its weights, in a module that workers can import."""

import torch
from tensordict.nn import TensorDictModule
from torchrl.envs import PendulumEnv

Pendulum = PendulumEnv


class Constant(torch.nn.Module):
    """Acts by its only weight. It has a buffer of another dtype as well."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.full((1,), value))
        self.register_buffer("unused", torch.ones(3, dtype=torch.bfloat16))

    def forward(self, th: torch.Tensor) -> torch.Tensor:
        return self.value.expand(*th.shape, 1) * self.unused[0]


def constant_policy(value: float = 0.0) -> TensorDictModule:
    return TensorDictModule(Constant(value), in_keys=["th"], out_keys=["action"])
