"""Variance reduction by what users did before the A/B (CUPED; Deng, Xu, Kohavi and Walker 2013), for ratios of sums.

A user's influence on the arm's mean m = Σ R / Σ n is ψ_u = (R_u − m n_u) / n̄, with n̄ the mean number of sessions a
user. Its regression on a covariate X_u from before the assignment is taken out of each arm's mean:

    m' = m − θ (X̄_arm − X̄)        θ = Σ_arms Σ_u ψ_u (X_u − X̄_arm) / Σ_arms Σ_u (X_u − X̄_arm)²

with one θ for both arms. The assignment does not depend on X, so m' estimates what m does (up to terms of 1/U, from
estimating θ), and its variance is that of ψ_u − θ (X_u − X̄_arm): 1 − ρ² times the old one where ψ and X correlate by
ρ in both arms. Users without a past get the mean of the others and so contribute nothing.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field

from components.errors import InputError
from components.experiment.arm import ArmMean


class CovariateAdjustment(BaseModel):
    """What adjusting by users' past did to the comparison."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    slope: float = Field(description="θ: reward of a session that goes with one more of the covariate.")
    known_share: float = Field(gt=0, le=1, description="Share of users who have a past.")
    variance_ratio: float = Field(ge=0, description="Variance of the difference over that without the adjustment.")
    unadjusted_difference: float = Field(description="Treatment mean minus control mean without the adjustment.")


@dataclass(frozen=True)
class AdjustedArms:
    """Both arms' adjusted means, and what the adjustment did."""

    treatment: ArmMean
    control: ArmMean
    adjustment: CovariateAdjustment


def adjust_by_covariate(
    totals: Float[np.ndarray, " U"],
    n_sessions: Int[np.ndarray, " U"],
    covariate: Float[np.ndarray, " U"],
    in_treatment: Bool[np.ndarray, " U"],
    treatment: ArmMean,
    control: ArmMean,
) -> AdjustedArms | None:
    """Take out of both arms' means what the users' past foretold; None where no user has one.

    Args:
        totals: summed reward of each user.
        n_sessions: sessions of each user.
        covariate: mean reward of each user before the A/B; NaN where there is no past.
        in_treatment: whether each user is in the treatment.
        treatment: the treatment's mean, not adjusted.
        control: the control's.

    Raises:
        InputError: a covariate is infinite.
    """
    if np.isinf(covariate).any():
        raise InputError(f"A/B: {np.count_nonzero(np.isinf(covariate))} covariates are infinite; expected numbers")
    known = ~np.isnan(covariate)
    if not known.any():
        return None
    past = np.where(known, covariate, covariate[known].mean())
    arms = [(treatment, in_treatment), (control, ~in_treatment)]
    influences = [(totals[rows] - arm.mean * n_sessions[rows]) / n_sessions[rows].mean() for arm, rows in arms]
    centered = [past[rows] - past[rows].mean() for _, rows in arms]
    spread = sum(float(x @ x) for x in centered)
    slope = sum(float(psi @ x) for psi, x in zip(influences, centered, strict=True)) / spread if spread > 0 else 0.0
    adjusted = []
    for (arm, rows), psi, x in zip(arms, influences, centered, strict=True):
        residuals = psi - slope * x
        adjusted.append(
            arm.model_copy(
                update={
                    "mean": arm.mean - slope * float(past[rows].mean() - past.mean()),
                    "variance": float(residuals @ residuals) / (arm.n_users * (arm.n_users - 1)),
                }
            )
        )
    before = treatment.variance + control.variance
    return AdjustedArms(
        treatment=adjusted[0],
        control=adjusted[1],
        adjustment=CovariateAdjustment(
            slope=slope,
            known_share=float(known.mean()),
            variance_ratio=(adjusted[0].variance + adjusted[1].variance) / before if before > 0 else 1.0,
            unadjusted_difference=treatment.mean - control.mean,
        ),
    )
