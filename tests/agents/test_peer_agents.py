"""A stranger's agents learn on the Gymnasium adapter, unchanged. `make test-peers` installs them."""

from typing import Any

import pytest
import torch
from toy_environments import LinearQuadratic

from components.environments.continuous import run_sessions
from components.environments.gymnasium_adapter import GymnasiumEnvironment

sb3 = pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed: make test-peers")


class BoundedQuadratic(LinearQuadratic):
    """Ten pushes of at most a half move what starts in [-1, 1]² no further than 6."""

    observation_bounds = (torch.full((2,), -6.0), torch.full((2,), 6.0))


def cost(agent: Any) -> float:
    """Mean cost of a step, acting without chance."""

    def act(observations: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(agent.predict(observations.numpy(), deterministic=True)[0])

    return -run_sessions(LinearQuadratic(), act, 2_000, torch.Generator().manual_seed(9)).mean_reward


def best_cost() -> float:
    environment = LinearQuadratic()
    return -run_sessions(environment, environment.best_action, 2_000, torch.Generator().manual_seed(9)).mean_reward


def learned(agent: Any, steps: int) -> tuple[float, float]:
    before = cost(agent)
    agent.learn(steps)
    return before, cost(agent)


def test_ppo_of_stable_baselines3_learns_to_come_to_rest() -> None:
    agent = sb3.PPO("MlpPolicy", GymnasiumEnvironment(BoundedQuadratic()), n_steps=512, seed=0, device="cpu")

    before, after = learned(agent, 4_096)

    assert before > 4 * best_cost()
    assert after < 2 * best_cost()


def test_sac_of_stable_baselines3_learns_to_come_to_rest() -> None:
    agent = sb3.SAC("MlpPolicy", GymnasiumEnvironment(BoundedQuadratic()), seed=0, device="cpu")

    before, after = learned(agent, 1_000)

    assert before > 4 * best_cost()
    assert after < before / 8
