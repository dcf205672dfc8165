"""What agents share that learn from steps of their own latest policy: networks, collection, annealing, entropy.

Shape letters: B sessions, T steps, M = T·B steps in a row, S numbers of an observation, A of an action.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from components.environments.continuous import ContinuousEnvironment, RunningSessions, State
from components.interactions.tensor_record import TensorRecord
from components.objectives.advantages import generalised_advantages
from components.policies import tanh_gaussian
from components.policies.continuous_policy import Scaled, TanhGaussianPolicy, layers


class OnPolicyConfig(BaseModel):
    """How long an agent learns, from what advantages, and with which networks and step sizes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(
        default=400_000, ge=1, description="Environment steps of all sessions; the last update is whole."
    )
    sessions: int = Field(default=1024, ge=1, description="Sessions that run side by side.")
    hidden: tuple[int, ...] = Field(default=(64, 64), description="Units of the layers of policy and critic.")
    gamma: float = Field(default=0.0, ge=0, le=1, description="Discount per step; 0 looks at one step alone.")
    seeking: float = Field(
        default=1.0,
        ge=0,
        description="β, per unit of reward: 0 maximises the expected return; above 0 actions that did far better than "
        "expected weigh more, which leaves plateaus but likes gambles.",
    )
    standardise: bool = Field(default=True, description="Whether advantages are standardised in each update.")
    entropy: float = Field(default=0.0, ge=0, description="η: reward per nat of entropy; keeps the policy exploring.")
    log_deviation: float = Field(default=-0.5, ge=-5, le=2, description="log σ at first, of actions before tanh.")
    learning_rate: float = Field(default=3e-3, gt=0, le=1, description="Adam's step size at first.")
    critic_rate: float = Field(default=3e-3, gt=0, le=1, description="Adam's step size of the critic at first.")
    anneal: bool = Field(default=True, description="Whether step sizes fall to 0 as the steps are used up.")
    clip_norm: float = Field(default=0.5, gt=0, description="Largest norm of the gradient of each network.")


#: Factor of the last layer's first weights: all observations begin with nearly the same action, near the middle.
FIRST_ACTIONS = 0.01


def actor_and_critic(
    environment: ContinuousEnvironment[State], hidden: Sequence[int], log_deviation: float, seed: int
) -> tuple[TanhGaussianPolicy, Scaled]:
    """A squashed Gaussian with one deviation for all observations, and a critic of as many layers of its own; of tanh.

    Args:
        environment: whose sizes and scale they take, and on whose device they come to lie.
        hidden: units of the layers between.
        log_deviation: log σ at first.
        seed: of the initial weights, which are the same on every device.
    """
    generator, scale = torch.Generator().manual_seed(seed), environment.observation_scale
    actor = layers((len(scale), *hidden, environment.action_size), generator, activation=nn.Tanh)
    critic = layers((len(scale), *hidden, 1), generator, activation=nn.Tanh)
    start_alike(actor)
    policy = TanhGaussianPolicy(Scaled(actor.to(scale.device), scale), environment.action_size, log_deviation)
    return policy.to(scale.device), Scaled(critic.to(scale.device), scale)


def start_alike(actor: nn.Module) -> None:
    """Shrink the weights of a network's last layer."""
    *_, weight, _ = actor.parameters()
    weight.data.mul_(FIRST_ACTIONS)


@dataclass(frozen=True)
class Experience(TensorRecord):
    """M steps of the policy as it stood."""

    observations: Float[Tensor, "M S"]
    latents: Float[Tensor, "M A"]
    """The actions before tanh, so that no update needs its inverse."""
    log_probs: Float[Tensor, " M"]
    advantages: Float[Tensor, " M"]
    returns: Float[Tensor, " M"]
    """What the critic is to say of the observations."""


@torch.no_grad()
def collect(
    sessions: RunningSessions[State],
    policy: TanhGaussianPolicy,
    critic: nn.Module,
    n_steps: int,
    gamma: float,
    trace: float,
    generator: torch.Generator,
) -> Experience:
    """T steps in each of B sessions, with their advantages (`generalised_advantages`).

    Args:
        sessions: go on where they stood.
        policy: acts.
        critic: values (M, 1) of observations.
        n_steps: T.
        gamma: discount γ per step.
        trace: λ.
        generator: of the actions.
    """
    steps, latents, log_probs = [], [], []
    for _ in range(n_steps):
        mean, log_deviation = policy.parameters_of(sessions.observations)
        latent = tanh_gaussian.draw(mean, log_deviation, generator)
        steps.append(sessions.step(latent.tanh()))
        latents.append(latent)
        log_probs.append(tanh_gaussian.log_density(latent, mean, log_deviation))
    observations = torch.cat([step.observations for step in steps])
    values = critic(observations)[:, 0]
    advantages = generalised_advantages(
        torch.stack([step.rewards for step in steps]),
        torch.stack([step.ended for step in steps]),
        values.view(n_steps, -1),
        critic(steps[-1].next_observations)[:, 0],
        gamma,
        trace,
    ).flatten()
    return Experience(
        observations=observations,
        latents=torch.cat(latents),
        log_probs=torch.cat(log_probs),
        advantages=advantages,
        returns=advantages + values,
    )


def entropy(
    mean: Float[Tensor, "M A"], log_deviation: Float[Tensor, "M A"], generator: torch.Generator
) -> Float[Tensor, ""]:
    """Entropy of squashed Gaussians in nats, a mean over observations, from one new draw each; gradients flow.

    That of the actions, not of the Gaussian before tanh: the latter grows with σ for ever, the former is A log 2 at
    most.
    """
    latent = tanh_gaussian.draw(mean, log_deviation, generator)
    return -tanh_gaussian.log_density(latent, mean, log_deviation).mean()


def anneal(optimizer: torch.optim.Optimizer, rates: Sequence[float], share: float) -> None:
    """Set the step size of each group of parameters to a share of its first."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * share


def clip_gradients(policy: nn.Module, critic: nn.Module, norm: float) -> None:
    """Shorten the gradient of each of the two networks to a norm."""
    for network in (policy, critic):
        nn.utils.clip_grad_norm_(network.parameters(), norm, foreach=True)
