"""CMA-ES over one constant action, by the library `cmaes`: a Gaussian that learns its whole covariance.

    a ~ N(m, σ² C);  m, σ and C follow the vectors ranked by mean reward of a step   (Hansen, arXiv 1604.00772)

The search knows no box: a vector counts as the nearest within. It is minimised, so the library is told minus rewards.

Shape letters: V vectors, A numbers of an action.
"""

import numpy as np
import torch
from cmaes import CMA
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from components.agents.constant_search import SearchConfig, search
from components.agents.watch import Watch, unwatched
from components.environments.continuous import ContinuousEnvironment, State
from components.policies.deterministic_policy import DeterministicPolicy


class CmaEsConfig(SearchConfig):
    """CMA-ES over a constant action."""

    population: int = Field(default=32, ge=2, description="Vectors of an iteration.")


class _Covariance:
    """The library's optimiser, with tensors at its edges."""

    def __init__(self, n_numbers: int, config: CmaEsConfig, generator: torch.Generator) -> None:
        device = generator.device
        seed = int(torch.randint(2**31, (), generator=generator, device=device))
        self._optimizer = CMA(np.zeros(n_numbers), config.deviation, population_size=config.population, seed=seed)
        self._device = device

    def draw(self) -> Float[Tensor, "V A"]:
        drawn = np.stack([self._optimizer.ask() for _ in range(self._optimizer.population_size)])
        return torch.tensor(drawn, dtype=torch.float32, device=self._device)

    def learn(self, vectors: Float[Tensor, "V A"], values: Float[Tensor, " V"]) -> None:
        pairs = zip(vectors.cpu().double().numpy(), (-values).tolist(), strict=True)
        self._optimizer.tell(list(pairs))

    def mean(self) -> Float[Tensor, " A"]:
        return torch.tensor(self._optimizer.mean, dtype=torch.float32, device=self._device)


def train_cma_es(
    environment: ContinuousEnvironment[State], config: CmaEsConfig, seed: int, watch: Watch = unwatched
) -> DeterministicPolicy:
    """Search for the constant action with the highest mean reward of a step.

    Args:
        environment: its sessions must end.
        config: the defaults are tuned on Virtual Taobao.
        seed: of the only source of chance; the same one gives the same action.
        watch: told of the best mean so far, after each iteration.
    """

    def start(generator: torch.Generator) -> _Covariance:
        return _Covariance(environment.action_size, config, generator)

    return search(environment, start, config, seed, watch)
