"""Two environments of continuous actions that are solved by hand, on a processor or a GPU."""

from dataclasses import dataclass

import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor

from components.environments.continuous import Outcome
from components.interactions.tensor_record import TensorRecord

on_each_device = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU on this machine")
        ),
    ],
)


@dataclass(frozen=True)
class ArmState(TensorRecord):
    bias: Float[Tensor, "B 1"]


class TwoArms:
    """One step: a positive action pulls the better arm (Bernoulli 0.8), any other the worse one (Bernoulli 0.2)."""

    observation_size, action_size = 1, 1
    observation_scale = torch.ones(1)
    better, worse = 0.8, 0.2

    def reset(self, n_users: int, generator: torch.Generator) -> ArmState:
        return ArmState(torch.ones(n_users, 1))

    def observe(self, state: ArmState) -> Float[Tensor, "B 1"]:
        return state.bias

    def step(
        self, state: ArmState, actions: Float[Tensor, "B 1"], generator: torch.Generator
    ) -> tuple[Outcome, ArmState]:
        share = torch.where(actions[:, 0] > 0, self.better, self.worse)
        rewards = (torch.rand(len(share), generator=generator) < share).float()
        return Outcome(rewards, torch.ones_like(share, dtype=torch.bool)), state


@dataclass(frozen=True)
class QuadraticState(TensorRecord):
    position: Float[Tensor, "B 2"]
    step: Int[Tensor, " B"]


class LinearQuadratic:
    """x' = x + a/2, cost |x'|² + |a|²/10, ten steps from x ~ U(−1, 1)²; the best gain solves the Riccati recursion."""

    observation_size, action_size = 2, 2
    horizon, push, price = 10, 0.5, 0.1

    def __init__(self, device: str = "cpu") -> None:
        self.observation_scale = torch.ones(2, device=device)

    def reset(self, n_users: int, generator: torch.Generator) -> QuadraticState:
        position = 2.0 * torch.rand(n_users, 2, generator=generator, device=generator.device) - 1.0
        return QuadraticState(position, torch.zeros(n_users, dtype=torch.long, device=generator.device))

    def observe(self, state: QuadraticState) -> Float[Tensor, "B 2"]:
        return state.position

    def step(
        self, state: QuadraticState, actions: Float[Tensor, "B 2"], generator: torch.Generator
    ) -> tuple[Outcome, QuadraticState]:
        actions = actions.clamp(-1, 1)
        position = state.position + self.push * actions
        cost = position.square().sum(1) + self.price * actions.square().sum(1)
        step = state.step + 1
        return Outcome(-cost, step >= self.horizon), QuadraticState(position, step)

    def best_action(self, observations: Float[Tensor, "B 2"]) -> Float[Tensor, "B 2"]:
        """The gain of an endless horizon, which ten steps hardly tell from it, clipped to the box."""
        value = 1.0
        for _ in range(200):
            gain = self.push * value / (self.price + self.push**2 * value)
            value = 1.0 + value * self.price / (self.price + self.push**2 * value)
        return (-gain * observations).clamp(-1, 1)
