"""A Gaussian truncated to the box [-1, 1]^A, each number of an action by itself.

    π(a) = Π_i φ((a_i − μ_i) / σ_i) / (σ_i Z_i),    Z_i = Φ((1 − μ_i) / σ_i) − Φ((−1 − μ_i) / σ_i)

with φ and Φ the density and the distribution function of N(0, 1), and μ inside the box; in float64.

Shape letters: B observations, A numbers of an action.
"""

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor


def log_density(
    actions: Float[Tensor, "B A"], mean: Float64[Tensor, "B A"], deviation: Float64[Tensor, " A"]
) -> Float64[Tensor, " B"]:
    """Log-density of given actions; −∞ outside of the box."""
    points = actions.double()
    below, above = _edges(mean, deviation)
    gaussian = -0.5 * ((points - mean) / deviation).square() - deviation.log() - 0.5 * math.log(2.0 * math.pi)
    inside = (points.abs() <= 1.0).all(1)
    return (gaussian - (above - below).log()).sum(1).masked_fill(~inside, -torch.inf)


def draw(
    mean: Float64[Tensor, "B A"], deviation: Float64[Tensor, " A"], generator: torch.Generator
) -> Float64[Tensor, "B A"]:
    """One action each, by the inverse of its distribution function."""
    below, above = _edges(mean, deviation)
    share = torch.rand(mean.shape, generator=generator, device=mean.device, dtype=torch.float64)
    return (mean + deviation * torch.special.ndtri(below + share * (above - below))).clamp(-1.0, 1.0)


def _edges(
    mean: Float64[Tensor, "B A"], deviation: Float64[Tensor, " A"]
) -> tuple[Float64[Tensor, "B A"], Float64[Tensor, "B A"]]:
    """Φ at both edges of the box."""
    return torch.special.ndtr((-1.0 - mean) / deviation), torch.special.ndtr((1.0 - mean) / deviation)
