"""The loop that DDPG, TD3 and SAC share: act, remember, learn from what is remembered."""

import math
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from components.agents.replay import Replay
from components.agents.watch import Watch
from components.environments.continuous import ContinuousEnvironment, RunningSessions, State, Transitions
from components.errors import InputError
from components.policies.continuous_policy import ContinuousPolicy, UniformActions


class OffPolicyConfig(BaseModel):
    """How long an agent acts, how much it learns from it, and the sizes of its networks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(default=20_000, ge=1, description="Environment steps of all sessions together.")
    sessions: int = Field(default=32, ge=1, description="Sessions that run side by side.")
    random_steps: int = Field(default=2_000, ge=0, description="Steps at the start with uniform actions.")
    updates_per_step: float = Field(default=0.25, gt=0, description="Updates for each environment step.")
    batch: int = Field(default=128, ge=1, description="Steps of an update.")
    replay: int = Field(default=1_000_000, ge=1, description="Last steps that are remembered.")
    hidden: int = Field(default=128, ge=1, description="Units of each of the two hidden layers.")
    layer_norm: bool = Field(default=False, description="Whether hidden layers are normalised before their activation.")
    scale_observations: bool = Field(default=True, description="Whether observations are divided by their scale.")
    actor_rate: float = Field(default=3e-4, gt=0, description="Adam's learning rate of the actor.")
    critic_rate: float = Field(default=1e-3, gt=0, description="Adam's learning rate of a critic.")
    annealed: float = Field(
        default=0.0, ge=0, le=1, description="Share of the steps, the last ones, over which learning rates fall to 0."
    )
    gamma: float = Field(default=0.0, ge=0, le=1, description="Discount of the next step's value.")
    tau: float = Field(default=0.005, gt=0, le=1, description="How far targets follow when they do.")


@runtime_checkable
class Learner(Protocol):
    """An agent that learns from steps of any policy."""

    chance: torch.Generator

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """Whose learning rates may fall."""
        ...

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


def learn(environment: ContinuousEnvironment[State], learner: Learner, config: OffPolicyConfig, watch: Watch) -> None:
    """Each iteration steps all sessions once and then does round(updates_per_step · sessions) updates.

    The first update comes once more than `batch` steps are remembered and the random ones are over. Learning rates fall
    in a line over the last `annealed` share of the iterations; the next one's would be 0.

    Raises:
        InputError: an iteration would do no update, or the replay cannot hold the steps of one.
    """
    updates = round(config.updates_per_step * config.sessions)
    if updates < 1:
        raise InputError(
            f"updates_per_step = {config.updates_per_step} with sessions = {config.sessions}: "
            "expected a product of more than 0.5, which rounds to at least one update an iteration"
        )
    iterations = math.ceil(config.steps / config.sessions)
    capacity = min(config.replay, iterations * config.sessions)
    if capacity < config.sessions:
        raise InputError(f"replay = {config.replay}: expected at least sessions = {config.sessions}")
    device = environment.observation_scale.device
    replay = Replay(capacity, environment.observation_size, environment.action_size, device)
    uniform = UniformActions(environment.action_size)
    running = RunningSessions(environment, config.sessions, learner.chance)
    rates = [(group, group["lr"]) for optimizer in learner.optimizers for group in optimizer.param_groups]
    for iteration in range(iterations):
        steps = iteration * config.sessions
        if steps < config.random_steps:
            actions = uniform.act(running.observations, learner.chance).actions
        else:
            actions = learner.explore(running.observations)
        replay.add(running.step(actions))
        steps += config.sessions
        left = (iterations - iteration) / max(config.annealed * iterations, 1.0)
        for group, rate in rates:
            group["lr"] = rate * min(left, 1.0)
        if len(replay) > config.batch and steps >= config.random_steps:
            for _ in range(updates):
                learner.update(replay.sample(config.batch, learner.chance))
        watch(learner.policy, steps)
