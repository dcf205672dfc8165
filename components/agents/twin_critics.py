"""Two critics of the same steps, which TD3 and SAC believe only as far as both agree."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from components.policies.continuous_policy import layers


class TwinCritics(nn.Module):
    """Q₁(s, a) and Q₂(s, a), two networks of two hidden layers.

    Args:
        input_size: S + A, numbers of an observation and of an action.
        hidden: units of each hidden layer.
        layer_norm: whether hidden layers are normalised before their activation.
        generator: of the initial weights.
    """

    def __init__(self, input_size: int, hidden: int, layer_norm: bool, generator: torch.Generator) -> None:
        super().__init__()
        sizes = (input_size, hidden, hidden, 1)
        self.first, self.second = (layers(sizes, generator, norm=layer_norm) for _ in range(2))

    def forward(
        self, observations: Float[Tensor, "B S"], actions: Float[Tensor, "B A"]
    ) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Both critics' values."""
        both = torch.cat([observations, actions], dim=1)
        return self.first(both)[:, 0], self.second(both)[:, 0]

    def first_of(self, observations: Float[Tensor, "B S"], actions: Float[Tensor, "B A"]) -> Float[Tensor, " B"]:
        """The first critic's values alone."""
        return self.first(torch.cat([observations, actions], dim=1))[:, 0]
