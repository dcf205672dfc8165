"""A policy with one action for each observation, and a Gaussian around it where it must have a density.

A deterministic agent cannot be logged for off-policy estimates, since nothing else than its own actions has a positive
density. It is logged with Gaussian smoothing, truncated to the box (`truncated_gaussian.py`), around μ = tanh(f(s)).

Shape letters: B observations, S numbers of an observation, A of an action.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from components.policies import truncated_gaussian
from components.policies.continuous_policy import ActionChoice

#: σ of the smoothing, where nobody says another.
SMOOTHING = 0.1


class DeterministicPolicy(nn.Module):
    """Acts with the smoothing; `mode` is the action itself.

    Args:
        network: f, with A outputs.
        deviation: σ, above 0.
    """

    def __init__(self, network: nn.Module, deviation: float = SMOOTHING) -> None:
        super().__init__()
        self.network = network
        self.deviation = deviation

    def mode(self, observations: Float[Tensor, "B S"]) -> Float[Tensor, "B A"]:
        """The policy's action; gradients flow through it."""
        return self.network(observations).tanh()

    @torch.no_grad()
    def act(self, observations: Float[Tensor, "B S"], generator: torch.Generator) -> ActionChoice:
        """Draw an action each."""
        mode = self.mode(observations)
        # Distribution functions of points far below a mode near the edge lie too close together for float32.
        drawn = truncated_gaussian.draw(mode.double(), self._deviations(mode), generator)
        actions = drawn.to(mode.dtype)
        return ActionChoice(actions, self._log_density(mode, actions))

    def log_prob(self, observations: Float[Tensor, "B S"], actions: Float[Tensor, "B A"]) -> Float[Tensor, " B"]:
        """Log-density of given actions; −∞ outside of the box."""
        return self._log_density(self.mode(observations), actions)

    def _log_density(self, mode: Float[Tensor, "B A"], actions: Float[Tensor, "B A"]) -> Float[Tensor, " B"]:
        return truncated_gaussian.log_density(actions, mode.double(), self._deviations(mode)).to(mode.dtype)

    def _deviations(self, mode: Float[Tensor, "B A"]) -> Float64[Tensor, " A"]:
        return torch.full((mode.shape[1],), self.deviation, dtype=torch.float64, device=mode.device)
