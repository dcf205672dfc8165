"""The loop that DDPG, TD3 and SAC share: act, remember, learn from what is remembered."""

import math
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from components.agents.replay import Replay
from components.agents.watch import Watch
from components.environments.continuous import ContinuousEnvironment, RunningSessions, State, Transitions
from components.errors import InputError
from components.policies.continuous_policy import ContinuousPolicy, UniformActions


@runtime_checkable
class Schedule(Protocol):
    """How long an agent acts and how much it learns from it; the configurations of agents are such schedules."""

    @property
    def steps(self) -> int:
        """Environment steps of all sessions together."""
        ...

    @property
    def sessions(self) -> int:
        """Sessions side by side."""
        ...

    @property
    def random_steps(self) -> int:
        """Environment steps at the start whose actions are drawn uniformly."""
        ...

    @property
    def updates_per_step(self) -> float:
        """Updates for each environment step."""
        ...

    @property
    def batch(self) -> int:
        """Steps of an update."""
        ...

    @property
    def replay(self) -> int:
        """Steps remembered."""
        ...


@runtime_checkable
class Learner(Protocol):
    """An agent that learns from steps of any policy."""

    chance: torch.Generator

    @property
    def policy(self) -> ContinuousPolicy:
        """As it stands."""
        ...

    def explore(self, observations: Float[Tensor, "B S"]) -> Float[Tensor, "B A"]:
        """Actions to learn from."""
        ...

    def update(self, batch: Transitions) -> None:
        """Learn once."""
        ...


def learn(environment: ContinuousEnvironment[State], learner: Learner, schedule: Schedule, watch: Watch) -> None:
    """Each iteration steps all sessions once and then does round(updates_per_step · sessions) updates.

    The first update comes once more than `batch` steps are remembered and the random ones are over.

    Raises:
        InputError: an iteration would do no update, or the replay cannot hold the steps of one.
    """
    updates = round(schedule.updates_per_step * schedule.sessions)
    if updates < 1:
        raise InputError(
            f"updates_per_step = {schedule.updates_per_step} with sessions = {schedule.sessions}: "
            "expected a product of more than 0.5, which rounds to at least one update an iteration"
        )
    iterations = math.ceil(schedule.steps / schedule.sessions)
    capacity = min(schedule.replay, iterations * schedule.sessions)
    if capacity < schedule.sessions:
        raise InputError(f"replay = {schedule.replay}: expected at least sessions = {schedule.sessions}")
    device = environment.observation_scale.device
    replay = Replay(capacity, environment.observation_size, environment.action_size, device)
    uniform = UniformActions(environment.action_size)
    running = RunningSessions(environment, schedule.sessions, learner.chance)
    for iteration in range(iterations):
        steps = iteration * schedule.sessions
        if steps < schedule.random_steps:
            actions = uniform.act(running.observations, learner.chance).actions
        else:
            actions = learner.explore(running.observations)
        replay.add(running.step(actions))
        steps += schedule.sessions
        if len(replay) > schedule.batch and steps >= schedule.random_steps:
            for _ in range(updates):
                learner.update(replay.sample(schedule.batch, learner.chance))
        watch(learner.policy, steps)
