"""How far a policy's actions lie outside what a log of actions shows, and the policy pulled back to where they do not.

    distance       d(a)² = (a − μ)ᵀ Σ⁻¹ (a − μ)        μ, Σ: mean and covariance of the logged actions (Mahalanobis)
    outside share  the share of the policy's draws, one a logged request, that lie farther out than 99 of 100 logged
                   actions do

Distances know nothing of density: in many dimensions a policy whose every action is among the logged ones may still
have weights of which a handful carry everything. So the pulled-back policy is made by its effective sample size. It is
a Gaussian of the logged actions' own deviations, truncated to the box, whose middle is the policy's action moved along
the straight line to μ until it is no farther out than

    r = √log(n / (margin · floor)),        since ESS / n = exp(−d²) of two Gaussians that are d apart and as wide

so that about margin · floor of n logged requests stay effective. It gives up what the log cannot judge: how narrow the
policy was, and how far it went.

Shape letters: M requests, S numbers of an observation, A of an action.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from components.errors import InputError
from components.interactions.continuous_batches import read_actions
from components.interactions.log_folder import Log
from components.policies import truncated_gaussian
from components.policies.continuous_policy import ActionChoice, ContinuousPolicy

#: Share of the logged actions that count as within.
WITHIN = 0.99
#: Share of a policy's draws that may lie farther out.
MOST_OUTSIDE = 0.1
#: By how much the effective sample size of a pulled-back policy is to exceed its floor.
MARGIN = 1.5
#: Variance below which a number counts as never varied: about what float32 tells from 1.
_LEAST_VARIANCE = 1e-12
_LEAST_DISTANCE = 1e-12


@dataclass(frozen=True)
class ActionCloud:
    """Where the actions of a log lie."""

    mean: Float64[Tensor, " A"]
    covariance: Float64[Tensor, "A A"]
    radius: float
    """Distance within which 99 of 100 logged actions lie."""
    n: int

    @property
    def deviation(self) -> Float64[Tensor, " A"]:
        """Of each number."""
        return self.covariance.diagonal().sqrt()

    def distances(self, actions: Float[Tensor, "M A"]) -> Float64[Tensor, " M"]:
        """Mahalanobis distance of each action."""
        return _distances(actions, self.mean, self.covariance)


class ActionSupport(BaseModel):
    """How far a policy's actions lie outside what a log shows."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    policy: str
    outside_share: float = Field(
        ge=0, le=1, description="Share of its draws that lie farther out than 99 of 100 logged actions."
    )
    median_distance: float = Field(ge=0, description="Half of its draws lie farther out (Mahalanobis).")
    radius: float = Field(ge=0, description="Distance within which 99 of 100 logged actions lie.")

    @property
    def inside(self) -> bool:
        """Whether nearly all of its draws lie where the log has actions."""
        return self.outside_share <= MOST_OUTSIDE


def action_cloud(log: Log) -> ActionCloud:
    """Mean, covariance and radius of a log's actions, in two passes over its parts.

    Raises:
        ContractError: the log has no actions.
        InputError: it has fewer than two.
    """
    moments = _Moments(log.manifest.action_size)
    for part in read_actions(log):
        moments.add(part.actions.double())
    if moments.n < 2:
        raise InputError(f"{log.path}: has {moments.n} actions; expected at least two")
    mean, covariance = moments.mean, moments.covariance
    covariance.diagonal().clamp_(min=_LEAST_VARIANCE)
    distances = torch.cat([_distances(part.actions, mean, covariance) for part in read_actions(log)])
    # torch's own quantile takes no more than 2^24 values.
    radius = float(np.quantile(distances.numpy(), WITHIN))
    return ActionCloud(mean, covariance, radius, moments.n)


class _Moments:
    """First and second moments, summed part by part around the first part's mean."""

    def __init__(self, size: int) -> None:
        self.n = 0
        self._origin = torch.zeros(size, dtype=torch.float64)
        self._sum = torch.zeros(size, dtype=torch.float64)
        self._squares = torch.zeros(size, size, dtype=torch.float64)

    def add(self, values: Float64[Tensor, "M A"]) -> None:
        if self.n == 0:
            self._origin = values.mean(0)
        centred = values - self._origin
        self.n += len(values)
        self._sum += centred.sum(0)
        self._squares += centred.T @ centred

    @property
    def mean(self) -> Float64[Tensor, " A"]:
        return self._origin + self._sum / self.n

    @property
    def covariance(self) -> Float64[Tensor, "A A"]:
        return (self._squares - torch.outer(self._sum, self._sum) / self.n) / (self.n - 1)


def _distances(
    actions: Float[Tensor, "M A"], mean: Float64[Tensor, " A"], covariance: Float64[Tensor, "A A"]
) -> Float64[Tensor, " M"]:
    centred = actions.double() - mean
    return (centred @ torch.linalg.pinv(covariance, hermitian=True) * centred).sum(1).clamp(min=0.0).sqrt()


def radius_for(n: int, floor: float) -> float:
    """How far out a pulled-back policy may go, r; 0 where the log has too few requests for any other policy."""
    return math.sqrt(math.log(max(n / (MARGIN * floor), 1.0)))


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
        share = (self.radius / self.cloud.distances(wanted).clamp(min=_LEAST_DISTANCE)).clamp(max=1.0)
        return self.cloud.mean + share[:, None] * (wanted - self.cloud.mean)


def in_precision_of(policy: ContinuousPolicy, values: Float[Tensor, "M W"]) -> Float[Tensor, "M W"]:
    """Values as a policy's own networks compute: float32 where they do, else float64."""
    parameters = policy.parameters() if isinstance(policy, nn.Module) else iter(())
    return values.to(next((parameter.dtype for parameter in parameters), torch.float64))


def action_support(name: str, distances: Float64[Tensor, " M"], cloud: ActionCloud) -> ActionSupport:
    """Support distance of a policy on a log of actions.

    Args:
        name: of the policy.
        distances: of its draws, one a logged request.
        cloud: the log's actions.
    """
    return ActionSupport(
        policy=name,
        outside_share=float((distances > cloud.radius).double().mean()),
        median_distance=float(distances.median()),
        radius=cloud.radius,
    )
