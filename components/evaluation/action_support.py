"""How far a policy's actions lie outside what a log of actions shows.

    distance       d(a)² = (a − μ)ᵀ Σ⁻¹ (a − μ)        μ, Σ: mean and covariance of the logged actions (Mahalanobis)
    outside share  the share of the policy's draws, one a logged request, that lie farther out than 99 of 100 logged
                   actions do

Shape letters: M requests, A numbers of an action.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float64
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from components.errors import InputError
from components.interactions.continuous_batches import read_actions
from components.interactions.log_folder import Log
from components.policies.pulled_back import ActionCloud

#: Share of the logged actions that count as within.
WITHIN = 0.99
#: Variance below which a number counts as never varied: about what float32 tells from 1.
_LEAST_VARIANCE = 1e-12


class ActionSupport(BaseModel):
    """How far a policy's actions lie outside what a log shows."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    policy: str
    outside_share: float = Field(
        ge=0, le=1, description="Share of its draws that lie farther out than 99 of 100 logged actions."
    )
    median_distance: float = Field(ge=0, description="Half of its draws lie farther out (Mahalanobis).")
    radius: float = Field(ge=0, description="Distance within which 99 of 100 logged actions lie.")


def action_cloud(log: Log, half: int | None = None) -> ActionCloud:
    """Mean, covariance and radius of a log's actions, in two passes over its parts.

    Args:
        log: of actions.
        half: 0 or 1: mean and covariance are those of one half of the users.

    Raises:
        ContractError: the log has no actions.
        InputError: it, or the half, has fewer than two.
    """
    moments = _Moments(log.manifest.action_size)
    for part in read_actions(log):
        moments.add(part.actions.double() if half is None else part.actions[part.users % 2 == half].double())
    if moments.n < 2:
        raise InputError(f"{log.path}: has {moments.n} actions; expected at least two")
    mean, covariance = moments.mean, moments.covariance
    covariance.diagonal().clamp_(min=_LEAST_VARIANCE)
    cloud = ActionCloud(mean, covariance, math.nan, moments.n)
    logged = torch.cat([cloud.distances(part.actions) for part in read_actions(log)])
    # torch's own quantile takes no more than 2^24 values.
    return replace(cloud, radius=float(np.quantile(logged.numpy(), WITHIN)))


class _Moments:
    """First and second moments, summed part by part around the first part's mean."""

    def __init__(self, size: int) -> None:
        self.n = 0
        self._origin = torch.zeros(size, dtype=torch.float64)
        self._sum = torch.zeros(size, dtype=torch.float64)
        self._squares = torch.zeros(size, size, dtype=torch.float64)

    def add(self, values: Float64[Tensor, "M A"]) -> None:
        if not len(values):
            return
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


def action_support(name: str, drawn: Float64[Tensor, " M"], cloud: ActionCloud) -> ActionSupport:
    """Support distance of a policy on a log of actions.

    Args:
        name: of the policy.
        drawn: distances of its draws, one a logged request.
        cloud: the log's actions.
    """
    return ActionSupport(
        policy=name,
        outside_share=float((drawn > cloud.radius).double().mean()),
        median_distance=float(drawn.median()),
        radius=cloud.radius,
    )
