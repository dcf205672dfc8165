"""The cross-entropy method over one constant action: what every agent has to beat, since it looks at nobody.

    a ~ N(μ, diag σ²);  keep the elite by mean reward of a step;  μ, σ ← mean, deviation of the elite  (Rubinstein 1999)

Actions are clipped to the box before the distribution is fitted to them. `cem.py` is the same method over the weights
of a ranking of items.

Shape letters: V vectors, A numbers of an action.
"""

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from components.agents.constant_search import SearchConfig, search
from components.agents.watch import Watch, unwatched
from components.environments.continuous import ContinuousEnvironment, State
from components.policies.deterministic_policy import DeterministicPolicy


class ConstantCemConfig(SearchConfig):
    """Cross-entropy method over a constant action."""

    elite: int = Field(default=5, ge=1, description="Best vectors, to which the distribution is fitted.")
    deviation_floor: float = Field(default=0.05, ge=0, description="Deviation added so that the search goes on.")

    @model_validator(mode="after")
    def _elite_is_of_the_population(self) -> "ConstantCemConfig":
        if self.elite > self.population:
            raise ValueError(f"elite = {self.elite}: expected at most population = {self.population}")
        return self


class _CrossEntropy:
    """A Gaussian of independent numbers."""

    def __init__(self, n_numbers: int, config: ConstantCemConfig, generator: torch.Generator) -> None:
        self._config = config
        self._generator = generator
        self._mean = torch.zeros(n_numbers, device=generator.device)
        self._deviation = torch.full_like(self._mean, config.deviation)

    def draw(self) -> Float[Tensor, "V A"]:
        shape = (self._config.population, len(self._mean))
        noise = torch.randn(shape, generator=self._generator, device=self._generator.device)
        return (self._mean + self._deviation * noise).clamp(-1, 1)

    def learn(self, vectors: Float[Tensor, "V A"], values: Float[Tensor, " V"]) -> None:
        elite = vectors[values.topk(self._config.elite).indices]
        self._mean = elite.mean(0)
        self._deviation = elite.std(0, correction=0) + self._config.deviation_floor

    def mean(self) -> Float[Tensor, " A"]:
        return self._mean


def train_constant_cem(
    environment: ContinuousEnvironment[State], config: ConstantCemConfig, seed: int, watch: Watch = unwatched
) -> DeterministicPolicy:
    """Search for the constant action with the highest mean reward of a step.

    Args:
        environment: its sessions must end.
        config: the defaults are tuned on Virtual Taobao.
        seed: of the only source of chance; the same one gives the same action.
        watch: told of the best mean so far, after each iteration.
    """

    def start(generator: torch.Generator) -> _CrossEntropy:
        return _CrossEntropy(environment.action_size, config, generator)

    return search(environment, start, config, seed, watch)
