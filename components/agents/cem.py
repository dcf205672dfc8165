"""The cross-entropy method over one constant vector of ranking weights: what industry tunes, and our baseline.

    w ~ N(μ, diag σ²);  keep the elite by mean session reward;  μ, σ ← mean, deviation of the elite   (Rubinstein 1999)

Vectors of one iteration are judged on the same users, all of them in one rollout: each session follows its own vector.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from components.environments.interface import Environment, State
from components.environments.rollout import rollout
from components.interactions.batching import Requests
from components.policies.ranking_policy import EncodedPolicy, RankingPolicy, bounded
from components.policies.slate_policy import SessionState
from components.world_model.training import Progress

#: Sessions of one rollout, at most (but for those of a single vector): what bounds memory.
ROLLOUT_SESSIONS = 16_384


class CemConfig(BaseModel):
    """Cross-entropy method."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: float = Field(
        default=12.0,
        ge=0,
        le=100,
        description="How sharply the first mean ranks by what the world model expects of items, in nats for each nat "
        "of expected reward, as REINFORCE's start does; 0 starts without a preference.",
    )
    iterations: int = Field(default=10, ge=1, le=1_000, description="Updates of the sampling distribution.")
    population: int = Field(default=48, ge=2, description="Weight vectors of an iteration.")
    elite: int = Field(default=10, ge=1, description="Best vectors, to which the distribution is fitted.")
    sessions: int = Field(default=500, ge=1, description="Sessions on which each vector is judged.")
    max_steps: int = Field(default=20, ge=1, le=1_000, description="Requests after which sessions are cut.")
    initial_deviation: float = Field(default=0.5, gt=0, description="Deviation of each weight at the start.")
    deviation_floor: float = Field(default=0.05, ge=0, description="Deviation added so that the search goes on.")

    @model_validator(mode="after")
    def _elite_is_of_the_population(self) -> "CemConfig":
        if self.elite > self.population:
            raise ValueError(f"elite = {self.elite}: expected at most population = {self.population}")
        return self


@dataclass(frozen=True)
class CemTraining:
    """Mean session reward of the elite after each iteration; the policy's weights are set in place."""

    history: tuple[float, ...]


def train_cem(
    policy: RankingPolicy,
    environment: Environment[State],
    users: Int[Tensor, " U"],
    config: CemConfig,
    seed: int,
    progress: Progress,
) -> CemTraining:
    """Tune the weights of a ranking policy in any environment.

    Args:
        policy: its `weights` are where the search starts; they are set in place.
        environment: world model or simulator.
        users: codes of users whose sessions may be generated.
        config: sizes.
        seed: of the only generator.
        progress: told after each iteration.
    """
    generator = torch.Generator().manual_seed(seed)
    mean = policy.weights.clone()
    deviation = torch.full_like(mean, config.initial_deviation)
    history = []
    for iteration in range(config.iterations):
        noise = torch.randn(config.population, len(mean), generator=generator)
        weights = mean + deviation * noise
        # The same users for every vector: differences between vectors are not differences between users.
        chosen = users[torch.randint(len(users), (config.sessions,), generator=generator)]
        values = _mean_rewards(policy, weights, environment, chosen, generator, config.max_steps)
        elite = weights[values.topk(config.elite).indices]
        mean = elite.mean(0)
        deviation = elite.std(0, correction=0) + config.deviation_floor
        history.append(float(values.topk(config.elite).values.mean()))
        progress(f"CEM: iteration {iteration + 1}, elite {history[-1]:.3f}", (iteration + 1) / config.iterations)
    policy.weights.copy_(mean)
    return CemTraining(tuple(history))


def _mean_rewards(
    policy: RankingPolicy,
    weights: Float[Tensor, "V P"],
    environment: Environment[State],
    users: Int[Tensor, " U"],
    generator: torch.Generator,
    max_steps: int,
) -> Float[Tensor, " V"]:
    rewards = []
    for vectors in weights.split(max(1, ROLLOUT_SESSIONS // len(users))):
        sessions = rollout(environment, _Population(policy, vectors), users.repeat(len(vectors)), generator, max_steps)
        rewards.append(sessions.rewards.sum((1, 2)).reshape(len(vectors), -1).mean(1))
    return torch.cat(rewards)


@dataclass(frozen=True, kw_only=True)
class _OwnedState(SessionState):
    """A session's state, and the number of the vector that ranks for it."""

    vector: Int[Tensor, " B"]


class _Population(EncodedPolicy):
    """Ranks the sessions of one rollout by a vector each: the first U by the first vector, and so on."""

    def __init__(self, policy: RankingPolicy, weights: Float[Tensor, "V P"]) -> None:
        super().__init__(policy.features, policy.slate_size)
        self.weights = weights

    def start(self, requests: Requests) -> SessionState:
        """The encoder's state, with the vectors dealt out evenly."""
        n_vectors = len(self.weights)
        vector = torch.arange(n_vectors).repeat_interleave(len(requests.candidates) // n_vectors)
        return _OwnedState(**vars(super().start(requests)), vector=vector)

    def advance(
        self,
        state: SessionState,
        slates: Int[Tensor, "B K"],
        clicks: Float[Tensor, "B K"],
        purchases: Float[Tensor, "B K"],
        requests: Requests,
    ) -> SessionState:
        """The encoder's next state; the vector stays the session's."""
        assert isinstance(state, _OwnedState)
        following = super().advance(state, slates, clicks, purchases, requests)
        return _OwnedState(**vars(following), vector=state.vector)

    def logits(self, state: SessionState, requests: Requests) -> Float[Tensor, "B N"]:
        """Bounded utilities by each session's own vector."""
        assert isinstance(state, _OwnedState)
        utility = torch.einsum("bnp,bp->bn", self.features(state, requests), self.weights[state.vector])
        return bounded(utility, requests)
