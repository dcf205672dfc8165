"""A Gaussian squashed into the box (-1, 1)^A by tanh (Haarnoja et al., SAC, 2018, appendix C).

    a = tanh(u),  u ~ N(μ, diag σ²);     log π(a) = Σ_i [log N(u_i; μ_i, σ_i²) − log(1 − a_i²)]

The second term is taken of u, as 2 (log 2 − u − softplus(−2u)), which stays finite where 1 − a² rounds to 0.

Shape letters: B observations, A numbers of an action.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

#: Actions of logs are asked for no closer to the edge than float32 tells from it.
EDGE = 1.0 - 2.0**-24


def log_density(
    latent: Float[Tensor, "B A"], mean: Float[Tensor, "B A"], log_deviation: Float[Tensor, "B A"]
) -> Float[Tensor, " B"]:
    """Logarithm of π(tanh u) of the points u = `latent`."""
    standardised = (latent - mean) * (-log_deviation).exp()
    gaussian = -0.5 * standardised.square() - log_deviation - 0.5 * math.log(2 * math.pi)
    stretch = 2.0 * (math.log(2.0) - latent - functional.softplus(-2.0 * latent))
    return (gaussian - stretch).sum(1)


def draw(
    mean: Float[Tensor, "B A"], log_deviation: Float[Tensor, "B A"], generator: torch.Generator
) -> Float[Tensor, "B A"]:
    """One action each, as its u; gradients flow into mean and deviation."""
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    return mean + log_deviation.exp() * noise


def latent_of(actions: Float[Tensor, "B A"]) -> Float[Tensor, "B A"]:
    """The u of given actions, atanh(a); on the edge that of the nearest number within."""
    return actions.clamp(-EDGE, EDGE).atanh()
