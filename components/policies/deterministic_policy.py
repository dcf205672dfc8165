"""A policy with one action for each observation, and a Gaussian around it where it must have a density.

A deterministic agent cannot be logged for off-policy estimates, since nothing else than its own actions has a positive
density. It is logged with Gaussian smoothing, truncated to the box, each number of the action by itself:

    μ = tanh(f(s));   π(a | s) = Π_i φ((a_i − μ_i) / σ) / (σ Z_i),   Z_i = Φ((1 − μ_i) / σ) − Φ((−1 − μ_i) / σ)

with φ and Φ the density and the distribution function of N(0, 1); an action outside of the box has density 0.

Shape letters: B observations, S numbers of an observation, A of an action.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

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
        """Draw an action each, by the inverse of its distribution function."""
        mode = self.mode(observations)
        # Distribution functions of points far below a mode near the edge lie too close together for float32.
        below, above = self._edges(mode.double())
        share = torch.rand(mode.shape, generator=generator, device=mode.device, dtype=torch.float64)
        quantile = torch.special.ndtri(below + share * (above - below))
        actions = (mode + self.deviation * quantile).clamp(-1.0, 1.0).to(mode.dtype)
        return ActionChoice(actions, self._log_density(mode, actions))

    def log_prob(self, observations: Float[Tensor, "B S"], actions: Float[Tensor, "B A"]) -> Float[Tensor, " B"]:
        """Log-density of given actions; −∞ outside of the box."""
        return self._log_density(self.mode(observations), actions)

    def _edges(self, mode: Float[Tensor, "B A"]) -> tuple[Float[Tensor, "B A"], Float[Tensor, "B A"]]:
        """Φ at both edges of the box."""
        return (
            torch.special.ndtr((-1.0 - mode) / self.deviation),
            torch.special.ndtr((1.0 - mode) / self.deviation),
        )

    def _log_density(self, mode: Float[Tensor, "B A"], actions: Float[Tensor, "B A"]) -> Float[Tensor, " B"]:
        centre, points = mode.double(), actions.double()
        below, above = self._edges(centre)
        gaussian = -0.5 * ((points - centre) / self.deviation).square() - math.log(
            self.deviation * math.sqrt(2.0 * math.pi)
        )
        inside = (points.abs() <= 1.0).all(1)
        densities = (gaussian - (above - below).log()).sum(1)
        return densities.masked_fill(~inside, -torch.inf).to(mode.dtype)
