"""What searches for one constant action share: the vectors of an iteration are judged on the same users, in one batch.

A search draws vectors, learns from what each of them earns, and has a mean. The landscape may have plateaus, on which
nothing that is drawn tells the way; so a search that has not got better for a while starts anew, and of all the means
seen the one that earned most is the policy. What counts is the mean reward of a step.

Shape letters: V vectors, A numbers of an action, B sessions, S numbers of an observation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from components.agents.watch import Watch
from components.environments.continuous import ContinuousEnvironment, State, finish_sessions
from components.policies import tanh_gaussian
from components.policies.constant_action import ConstantAction
from components.policies.deterministic_policy import DeterministicPolicy


class SearchConfig(BaseModel):
    """How long a search goes on, and on how many sessions it judges."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(
        default=1_000_000,
        ge=1,
        description="Environment steps of all sessions together; the last iteration is finished.",
    )
    users: int = Field(default=1_000, ge=1, description="Users of whom all sessions are, each with one first state.")
    sessions: int = Field(
        default=1,
        ge=1,
        description="Sessions on which each vector is judged, of the same users for all of an iteration.",
    )
    mean_sessions: int = Field(
        default=100, ge=1, description="Sessions on which the mean is judged: of the first users, in every iteration."
    )
    patience: int = Field(
        default=10, ge=1, description="Iterations without a better mean after which the search starts anew."
    )
    deviation: float = Field(default=0.1, gt=0, description="Deviation of each number of the first vectors around 0.")
    population: int = Field(default=128, ge=2, description="Vectors of an iteration.")

    @model_validator(mode="after")
    def _means_are_judged_on_the_users(self) -> "SearchConfig":
        if self.mean_sessions > self.users:
            raise ValueError(f"mean_sessions = {self.mean_sessions}: expected at most users = {self.users}")
        return self


@runtime_checkable
class Search(Protocol):
    """A distribution of vectors that learns."""

    def draw(self) -> Float[Tensor, "V A"]:
        """Vectors to be judged; they may lie outside of the box, and count as the nearest within."""
        ...

    def learn(self, vectors: Float[Tensor, "V A"], values: Float[Tensor, " V"]) -> None:
        """Move towards what earned most."""
        ...

    def mean(self) -> Float[Tensor, " A"]:
        """Its middle."""
        ...


def search(
    environment: ContinuousEnvironment[State],
    start: Callable[[torch.Generator], Search],
    config: SearchConfig,
    seed: int,
    watch: Watch,
) -> DeterministicPolicy:
    """The best mean of as many searches as the budget of steps allows.

    Args:
        environment: its sessions must end.
        start: a new search, whose chance is the generator's.
        config: budget and sizes.
        seed: of the only source of chance.
        watch: told of the best mean so far, after each iteration.
    """
    device = environment.observation_scale.device
    generator = torch.Generator(device).manual_seed(seed)
    users = environment.reset(config.users, generator)
    # Means are compared across iterations, so all of them are judged on the same users.
    of_mean = torch.arange(config.mean_sessions, device=device)
    n_sessions = torch.tensor([config.sessions] * config.population + [config.mean_sessions], device=device)
    vectors_of = torch.arange(len(n_sessions), device=device).repeat_interleave(n_sessions)
    policy, best, steps = None, -torch.inf, 0
    while steps < config.steps:
        current, top, waited = start(generator), -torch.inf, 0
        while steps < config.steps and waited < config.patience:
            drawn, mean = current.draw(), current.mean().clamp(-1, 1)
            chosen = torch.randint(config.users, (config.sessions,), generator=generator, device=device)
            sessions = users.select(torch.cat([chosen.repeat(config.population), of_mean]))
            judged = mean_rewards(environment, sessions, torch.cat([drawn, mean[None]]), vectors_of, generator)
            current.learn(drawn, judged.values[:-1])
            value, steps = float(judged.values[-1]), steps + judged.steps
            top, waited = (value, 0) if value > top else (top, waited + 1)
            if policy is None or value > best:
                policy, best = constant_policy(mean), value
            watch(policy, steps)
    assert policy is not None
    return policy


@dataclass(frozen=True)
class Judged:
    """What vectors earned."""

    values: Float[Tensor, " V"]
    """Mean reward of a step."""
    steps: int
    """Environment steps that it took."""


def mean_rewards(
    environment: ContinuousEnvironment[State],
    sessions: State,
    vectors: Float[Tensor, "V A"],
    vectors_of: Int[Tensor, " B"],
    generator: torch.Generator,
) -> Judged:
    """Mean reward of a step of whole sessions under each vector.

    Args:
        environment: its sessions must end.
        sessions: B of them, each with one vector's action at all its steps.
        vectors: each must have a session.
        vectors_of: number of each session's vector.
        generator: of the users' chance.
    """
    totals = finish_sessions(environment, sessions, lambda _, alive: vectors[vectors_of[alive]], generator)
    rewards = vectors.new_zeros(len(vectors)).index_add(0, vectors_of, totals.rewards)
    steps = torch.zeros(len(vectors), dtype=torch.long, device=vectors.device).index_add(0, vectors_of, totals.steps)
    return Judged(rewards / steps, int(steps.sum()))


def constant_policy(action: Float[Tensor, " A"]) -> DeterministicPolicy:
    """One action of the box, whatever is observed; smoothed where it must have a density."""
    return DeterministicPolicy(ConstantAction(tanh_gaussian.latent_of(action[None])[0]))
