"""A policy of actions pulled back to where a log's actions lie, so that the log can judge it.

    distance   d(a)² = (a − μ)ᵀ Σ⁻¹ (a − μ)        μ, Σ: mean and covariance of the logged actions (Mahalanobis)

Distances know nothing of density: in many dimensions a policy whose every action is among the logged ones may still
have weights of which a handful carry everything. So the pulled-back policy is made by its effective sample size. It is
a Gaussian of the logged actions' own deviations, truncated to the box, whose middle is the policy's action moved along
the straight line to μ until it is no farther out than

    r = √log(n / (margin · floor)),        since ESS / n = exp(−d²) of two Gaussians that are d apart and as wide

so that about margin · floor of n logged requests stay effective, where they were drawn from one Gaussian of independent
numbers; fewer where what was logged depends on the observation, or is spread in another way. It gives up what the log
cannot judge: how narrow the policy was, and how far it went.

Shape letters: M requests, B observations, S numbers of an observation, A of an action.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from components.policies import truncated_gaussian
from components.policies.continuous_policy import ActionChoice, ContinuousPolicy

#: By how much the effective sample size of a pulled-back policy is to exceed its floor.
MARGIN = 1.5
_LEAST_DISTANCE = 1e-12


@dataclass(frozen=True)
class ActionCloud:
    """Where the actions of a log lie."""

    mean: Float64[Tensor, " A"]
    covariance: Float64[Tensor, "A A"]
    radius: float
    """Distance within which 99 of 100 logged actions lie."""
    n: int

    @cached_property
    def deviation(self) -> Float64[Tensor, " A"]:
        """Of each number."""
        return self.covariance.diagonal().sqrt()

    def distances(self, actions: Float[Tensor, "M A"]) -> Float64[Tensor, " M"]:
        """Mahalanobis distance of each action."""
        centred = actions.double() - self.mean
        return (centred @ self._precision * centred).sum(1).clamp(min=0.0).sqrt()

    @cached_property
    def _precision(self) -> Float64[Tensor, "A A"]:
        return torch.linalg.pinv(self.covariance, hermitian=True)


def radius_for(n: int, floor: float) -> float:
    """How far out a pulled-back policy may go, r; 0 where the log has too few requests for any other policy."""
    return math.sqrt(math.log(max(n / (MARGIN * floor), 1.0)))


def towards(wanted: Float64[Tensor, "B A"], cloud: ActionCloud, radius: float) -> Float64[Tensor, "B A"]:
    """From the logged actions' mean straight towards actions, no farther than a radius."""
    share = (radius / cloud.distances(wanted).clamp(min=_LEAST_DISTANCE)).clamp(max=1.0)
    return cloud.mean + share[:, None] * (wanted - cloud.mean)


class PulledBack:
    """A policy pulled back to where a log's actions lie, as the module says.

    Args:
        policy: whose `mode` is pulled back.
        cloud: the log's actions.
        radius: r; at 0 the policy is the Gaussian of the logged actions.
    """

    def __init__(self, policy: ContinuousPolicy, cloud: ActionCloud, radius: float) -> None:
        self.policy, self.cloud, self.radius = policy, cloud, radius

    def act(self, observations: Float[Tensor, "B S"], generator: torch.Generator) -> ActionChoice:
        """Draw an action each."""
        middle = self.mode(observations)
        actions = truncated_gaussian.draw(middle, self.cloud.deviation, generator)
        return ActionChoice(actions, truncated_gaussian.log_density(actions, middle, self.cloud.deviation))

    def log_prob(self, observations: Float[Tensor, "B S"], actions: Float[Tensor, "B A"]) -> Float[Tensor, " B"]:
        """Log-density of given actions."""
        return truncated_gaussian.log_density(actions, self.mode(observations), self.cloud.deviation)

    def mode(self, observations: Float[Tensor, "B S"]) -> Float[Tensor, "B A"]:
        """The pulled-back action."""
        wanted = self.policy.mode(in_precision_of(self.policy, observations)).double()
        return towards(wanted, self.cloud, self.radius)


def in_precision_of(policy: ContinuousPolicy, values: Float[Tensor, "M W"]) -> Float[Tensor, "M W"]:
    """Values as a policy's own networks compute: float32 where they do, else float64."""
    parameters = policy.parameters() if isinstance(policy, nn.Module) else iter(())
    return values.to(next((parameter.dtype for parameter in parameters), torch.float64))
