"""Policies whose actions are vectors in [-1, 1]^A: each acts, and can be asked for the log-density of any action.

Shape letters: B observations, S numbers of an observation, A of an action.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from components.interactions.tensor_record import TensorRecord
from components.policies import tanh_gaussian


@dataclass(frozen=True)
class ActionChoice(TensorRecord):
    """Actions with the log-density under which they were drawn."""

    actions: Float[Tensor, "B A"]
    log_probs: Float[Tensor, " B"]


@runtime_checkable
class ContinuousPolicy(Protocol):
    """A density over the box for each observation."""

    def act(self, observations: Float[Tensor, "B S"], generator: torch.Generator) -> ActionChoice:
        """Draw an action each."""
        ...

    def log_prob(self, observations: Float[Tensor, "B S"], actions: Float[Tensor, "B A"]) -> Float[Tensor, " B"]:
        """Log-density of given actions."""
        ...

    def mode(self, observations: Float[Tensor, "B S"]) -> Float[Tensor, "B A"]:
        """The action that stands for the policy where nothing is to be left to chance."""
        ...


def layers(
    sizes: Sequence[int], generator: torch.Generator, *, norm: bool = False, activation: type[nn.Module] = nn.ReLU
) -> nn.Sequential:
    """Linear layers with an activation after each but the last, initialised as torch does, from a generator.

    Args:
        sizes: of inputs, hidden layers and outputs.
        generator: of the initial weights.
        norm: LayerNorm before each activation.
        activation: between layers.
    """
    modules: list[nn.Module] = []
    for inward, outward in pairwise(sizes):
        linear = nn.utils.skip_init(nn.Linear, inward, outward)
        bound = inward**-0.5
        for parameter in linear.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        modules += [linear, *([nn.LayerNorm(outward)] if norm else []), activation()]
    # The last layer's outputs are what the network says.
    return nn.Sequential(*modules[: -2 if norm else -1])


class Scaled(nn.Module):
    """A network that sees observations divided by their largest sizes."""

    def __init__(self, network: nn.Module, scale: Float[Tensor, " S"]) -> None:
        super().__init__()
        self.network = network
        self.scale: Tensor
        self.register_buffer("scale", scale.clone())

    def forward(self, observations: Float[Tensor, "B S"]) -> Float[Tensor, "B O"]:
        """The network's outputs."""
        return self.network(observations / self.scale)


class TanhGaussianPolicy(nn.Module):
    """A squashed Gaussian whose mean depends on the observation, and so does its deviation if the network says it.

    Args:
        network: A or 2 A outputs; of 2 A the latter half is log σ.
        action_size: A.
        log_deviation: log σ at first, where it is one vector for all observations.
        bounds: within which log σ stays.
    """

    def __init__(
        self,
        network: nn.Module,
        action_size: int,
        log_deviation: float = -0.5,
        bounds: tuple[float, float] = (-5.0, 2.0),
    ) -> None:
        super().__init__()
        self.network = network
        self.action_size = action_size
        self.bounds = bounds
        self.log_deviation = nn.Parameter(torch.full((action_size,), log_deviation))

    def parameters_of(self, observations: Float[Tensor, "B S"]) -> tuple[Float[Tensor, "B A"], Float[Tensor, "B A"]]:
        """Mean and log-deviation before tanh."""
        outputs = self.network(observations)
        mean, own = outputs[:, : self.action_size], outputs[:, self.action_size :]
        log_deviation = own if own.shape[1] else self.log_deviation.expand_as(mean)
        return mean, log_deviation.clamp(*self.bounds)

    def act(self, observations: Float[Tensor, "B S"], generator: torch.Generator) -> ActionChoice:
        """Draw an action each; gradients flow through it (the reparametrisation trick)."""
        mean, log_deviation = self.parameters_of(observations)
        latent = tanh_gaussian.draw(mean, log_deviation, generator)
        return ActionChoice(latent.tanh(), tanh_gaussian.log_density(latent, mean, log_deviation))

    def log_prob(self, observations: Float[Tensor, "B S"], actions: Float[Tensor, "B A"]) -> Float[Tensor, " B"]:
        """Log-density of given actions."""
        mean, log_deviation = self.parameters_of(observations)
        return tanh_gaussian.log_density(tanh_gaussian.latent_of(actions), mean, log_deviation)

    def mode(self, observations: Float[Tensor, "B S"]) -> Float[Tensor, "B A"]:
        """The squashed mean."""
        return self.parameters_of(observations)[0].tanh()


class UniformActions:
    """Every action of the box alike."""

    def __init__(self, action_size: int) -> None:
        self.action_size = action_size

    def act(self, observations: Float[Tensor, "B S"], generator: torch.Generator) -> ActionChoice:
        """Draw an action each."""
        shape = (len(observations), self.action_size)
        actions = 2.0 * torch.rand(shape, generator=generator, device=observations.device) - 1.0
        return ActionChoice(actions, self.log_prob(observations, actions))

    def log_prob(self, observations: Float[Tensor, "B S"], actions: Float[Tensor, "B A"]) -> Float[Tensor, " B"]:
        """−A log 2."""
        return actions.new_full((len(actions),), -self.action_size * math.log(2.0))

    def mode(self, observations: Float[Tensor, "B S"]) -> Float[Tensor, "B A"]:
        """The middle of the box."""
        return torch.zeros(len(observations), self.action_size, device=observations.device)
