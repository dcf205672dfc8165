"""How much an estimate owes to its cap: one-request NCIS along a grid of caps.

A value that moves with the cap rests on few large weights: a low cap hides them (bias), a high one is ruled by them
(variance). The usual cap of 10 and the gate's √n are points of the grid.
"""

from collections.abc import Mapping
from typing import Unpack

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from components.evaluation.logged_requests import LoggedRequests
from components.evaluation.ncis import USUAL_CAP, one_request_sums
from components.evaluation.policy_value import About, Estimand
from components.evaluation.ratio_sums import RatioSums, value_from_sums
from components.evaluation.weights import default_cap
from components.interactions.contract import RatioAssumption

N_CAPS = 13


class CapPoint(BaseModel):
    """One-request NCIS under one cap."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    cap: float
    value: float
    lower: float | None
    upper: float | None
    effective_sample_size: float
    cap_share: float = Field(description="Share of requests whose weight was cut.")


class CapSensitivity(BaseModel):
    """The curve, and the two caps to look for on it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    policy: str
    usual_cap: float = Field(description="The cap of the literature.")
    gating_cap: float = Field(description="√n: the lowest that gates.")
    points: tuple[CapPoint, ...] = Field(description="In order of their caps.")


def cap_sensitivity(log: LoggedRequests, **about: Unpack[About]) -> CapSensitivity:
    """One-request NCIS from a cap of 1 up to 100 √n, on a grid that is even in the logarithm."""
    return curve_from_sums(cap_sums(log, len(log.rewards), about["ratio"]), **about)


def cap_sums(log: LoggedRequests, n: int, ratio: RatioAssumption) -> dict[float, RatioSums]:
    """Sums per user of one shard of a log of n requests, by cap."""
    gating = default_cap(n)
    caps = sorted({*np.geomspace(1.0, 100.0 * gating, N_CAPS).tolist(), USUAL_CAP, gating})
    return {cap: one_request_sums(log, cap, ratio) for cap in caps}


def curve_from_sums(sums: Mapping[float, RatioSums], **about: Unpack[About]) -> CapSensitivity:
    """The curve from the merged sums of a log."""
    points = []
    for of_cap in sums.values():
        value = value_from_sums(of_cap, "NCIS", Estimand.ONE_REQUEST, **about)
        points.append(CapPoint(**value.model_dump(include=set(CapPoint.model_fields))))
    gating = default_cap(of_cap.n_requests)
    return CapSensitivity(policy=about["policy"], usual_cap=USUAL_CAP, gating_cap=gating, points=tuple(points))
