from dataclasses import dataclass

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from components.agents.ppo import PpoConfig, train_ppo
from components.environments.constrained_actions import ConstrainedActions
from components.environments.continuous import ContinuousEnvironment, Outcome
from components.interactions.tensor_record import TensorRecord
from components.policies.pulled_back import ActionCloud, PulledBack

#: Actions N((0.1, 0), 0.1²) were logged.
CLOUD = ActionCloud(
    mean=torch.tensor([0.1, 0.0], dtype=torch.float64),
    covariance=0.01 * torch.eye(2, dtype=torch.float64),
    radius=3.0,
    n=1_000,
)


@dataclass(frozen=True)
class Nobody(TensorRecord):
    seen: Float[Tensor, "B 1"]


class Watched:
    """One-step sessions that pay a₀ + 2 a₁, and remember the actions that were taken."""

    observation_size, action_size = 1, 2
    observation_scale = torch.ones(1)

    def __init__(self) -> None:
        self.actions: list[Float[Tensor, "B 2"]] = []

    def reset(self, n_users: int, generator: torch.Generator) -> Nobody:
        return Nobody(torch.zeros(n_users, 1))

    def observe(self, state: Nobody) -> Float[Tensor, "B 1"]:
        return state.seen

    def step(self, state: Nobody, actions: Float[Tensor, "B 2"], generator: torch.Generator) -> tuple[Outcome, Nobody]:
        self.actions.append(actions)
        rewards = actions[:, 0] + 2 * actions[:, 1]
        return Outcome(rewards, torch.ones(len(actions), dtype=torch.bool)), state


def taken(wanted: list[float], radius: float) -> Float[Tensor, "B 2"]:
    watched = Watched()
    environment = ConstrainedActions(watched, CLOUD, radius)
    assert isinstance(environment, ContinuousEnvironment)
    generator = torch.Generator().manual_seed(0)
    state = environment.reset(20_000, generator)
    environment.step(state, torch.tensor([wanted]).expand(20_000, -1), generator)
    return watched.actions[0]


@pytest.mark.parametrize("radius", [0.0, 1.0, 2.0])
def test_actions_are_drawn_around_what_is_left_of_the_way(radius: float) -> None:
    actions = taken([0.9, 0.0], radius)

    # As far as the radius, in deviations of 0.1.
    torch.testing.assert_close(actions.mean(0), torch.tensor([0.1 + 0.1 * radius, 0.0]), atol=0.004, rtol=0)
    torch.testing.assert_close(actions.std(0), torch.tensor([0.1, 0.1]), atol=0.003, rtol=0)


def test_what_lies_within_is_where_actions_are_drawn() -> None:
    torch.testing.assert_close(taken([0.15, 0.05], 2.0).mean(0), torch.tensor([0.15, 0.05]), atol=0.004, rtol=0)


def test_an_agent_finds_the_best_that_the_constraint_allows() -> None:
    radius = 1.5
    environment = ConstrainedActions(Watched(), CLOUD, radius)
    config = PpoConfig(steps=40_000, sessions=500, hidden=(8,), learning_rate=1e-2, seeking=0.0)
    trained = train_ppo(environment, config, seed=0)

    middle = PulledBack(trained, CLOUD, radius).mode(torch.zeros(1, 1))[0]

    # Within 0.15 of (0.1, 0), a₀ + 2 a₁ is largest along (1, 2).
    expected = torch.tensor([0.1 + 0.15 / 5**0.5, 0.3 / 5**0.5], dtype=torch.float64)
    torch.testing.assert_close(middle.detach(), expected, atol=0.03, rtol=0)
