"""What searches for one constant action share: the vectors of an iteration are judged on the same users, in one batch.

A search draws vectors, learns from what each of them earns, and has a mean. The landscape may have plateaus, on which
nothing that is drawn tells the way; so a search that has not got better for a while starts anew, and of all the means
seen the one that earned most is the policy. What counts is the mean reward of a step.

Shape letters: V vectors, A numbers of an action, U users.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from components.agents.watch import Watch
from components.environments.continuous import ContinuousEnvironment, State, finish_sessions
from components.policies import tanh_gaussian
from components.policies.deterministic_policy import DeterministicPolicy


class SearchConfig(BaseModel):
    """How long a search goes on, and on how many sessions it judges."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(
        default=400_000, ge=1, description="Environment steps of all sessions together; the last iteration is finished."
    )
    sessions: int = Field(default=2, ge=1, description="Sessions on which each vector is judged.")
    mean_sessions: int = Field(default=100, ge=1, description="Sessions on which the mean is judged in each iteration.")
    patience: int = Field(
        default=8, ge=1, description="Iterations without a better mean after which the search starts anew."
    )
    deviation: float = Field(default=0.1, gt=0, description="Deviation of each number of the first vectors around 0.")
    population: int = Field(default=256, ge=2, description="Vectors of an iteration.")


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
    generator = torch.Generator(environment.observation_scale.device).manual_seed(seed)
    policy, best, steps = None, -torch.inf, 0
    sessions = torch.tensor([config.sessions] * config.population + [config.mean_sessions])
    while steps < config.steps:
        current, top, waited = start(generator), -torch.inf, 0
        while steps < config.steps and waited < config.patience:
            drawn, mean = current.draw(), current.mean().clamp(-1, 1)
            judged = mean_rewards(environment, torch.cat([drawn, mean[None]]), sessions, generator)
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
    vectors: Float[Tensor, "V A"],
    sessions: Int[Tensor, " V"],
    generator: torch.Generator,
) -> Judged:
    """Mean reward of a step of whole sessions under each vector.

    Args:
        environment: its sessions must end.
        vectors: each is the action of all the steps of its sessions.
        sessions: how many each vector has, with users of one list from its first: differences of vectors that have
            equally many are not differences of users.
        generator: of the users' chance.
    """
    sessions = sessions.to(vectors.device)
    users = torch.cat([torch.arange(n, device=vectors.device) for n in sessions.tolist()])
    owners = torch.arange(len(vectors), device=vectors.device).repeat_interleave(sessions)
    state = environment.reset(int(sessions.max()), generator).select(users)
    totals = finish_sessions(environment, state, lambda _, alive: vectors[owners[alive]], generator)
    rewards = vectors.new_zeros(len(vectors)).index_add(0, owners, totals.rewards)
    steps = torch.zeros_like(sessions).index_add(0, owners, totals.steps)
    return Judged(rewards / steps, int(steps.sum()))


class _Constant(nn.Module):
    def __init__(self, outputs: Float[Tensor, " A"]) -> None:
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, observations: Float[Tensor, "B S"]) -> Float[Tensor, "B A"]:
        return self.outputs.expand(len(observations), -1)


def constant_policy(action: Float[Tensor, " A"]) -> DeterministicPolicy:
    """One action of the box, whatever is observed; smoothed where it must have a density."""
    return DeterministicPolicy(_Constant(tanh_gaussian.latent_of(action)))
