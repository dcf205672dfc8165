"""An environment under a support constraint: every action is pulled back to where a log's actions lie.

An agent says where it wants to go; the action that is taken is drawn as its pulled-back policy would draw it
(`policies/pulled_back.py`). What it learns there is what is best of all that the log can judge.

Shape letters: B users, S numbers of an observation, A of an action.
"""

from dataclasses import replace
from typing import Generic

import torch
from jaxtyping import Float
from torch import Tensor

from components.environments.continuous import ContinuousEnvironment, Outcome, State
from components.policies import truncated_gaussian
from components.policies.pulled_back import ActionCloud, towards


class ConstrainedActions(Generic[State]):
    """Another environment's users, who are shown pulled-back actions alone.

    Args:
        environment: whose users they are.
        cloud: the logged actions.
        radius: how far from their mean an action's middle may lie.
    """

    def __init__(self, environment: ContinuousEnvironment[State], cloud: ActionCloud, radius: float) -> None:
        device = environment.observation_scale.device
        self._environment, self._radius = environment, radius
        self._cloud = replace(cloud, mean=cloud.mean.to(device), covariance=cloud.covariance.to(device))
        self.observation_size, self.action_size = environment.observation_size, environment.action_size
        self.observation_scale = environment.observation_scale

    def reset(self, n_users: int, generator: torch.Generator) -> State:
        """Open a session of each of so many new users."""
        return self._environment.reset(n_users, generator)

    def observe(self, state: State) -> Float[Tensor, "B S"]:
        """What a policy may see."""
        return self._environment.observe(state)

    def step(self, state: State, actions: Float[Tensor, "B A"], generator: torch.Generator) -> tuple[Outcome, State]:
        """Act around the pulled-back actions."""
        middle = towards(actions.double().clamp(-1, 1), self._cloud, self._radius)
        drawn = truncated_gaussian.draw(middle, self._cloud.deviation, generator)
        return self._environment.step(state, drawn.to(actions.dtype), generator)
